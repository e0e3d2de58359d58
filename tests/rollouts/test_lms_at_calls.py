"""A predictor's model that a call is given, or that the context has, is watched and sampled as the predictor's own."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import CutEngine, Parity, number_of, numbers, parity_engine, parity_match, plain_lm, reply, right
from watched import One

from bettertogether import LoRAFinetune
from bettertogether.rollouts.rollout import Attempt
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


class AtCall(One):
    def __init__(self, lm: Any, other: Any = None) -> None:
        super().__init__()
        self.p.lm, self.given = lm, other or lm

    def forward(self, number: int) -> Any:
        return self.p(number=number, lm=self.given)


class InContext(AtCall):
    def __init__(self, lm: Any) -> None:
        super().__init__(None, lm)

    def forward(self, number: int) -> Any:
        with dspy.context(lm=self.given):
            return self.p(number=number)


class Awaited(One):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.p.lm = self.given = lm

    async def aforward(self, number: int) -> Any:
        return await self.p.acall(number=number, lm=self.given)


def cut_engine() -> FakeEngine:
    return CutEngine(lambda request: reply(request, parity=right(number_of(request))))


@pytest.mark.parametrize("kind", [AtCall, InContext])
def test_a_cut_answer_of_an_lm_given_at_the_call_is_known(kind: Any) -> None:
    calls = [Runner(kind(plain_lm(cut_engine()))).run(example).calls[0] for example in numbers(2)]
    assert [call.cut for call in calls] == [True, False]
    assert [right(n) in str(call.text) for n, call in enumerate(calls)] == [True, True]


def test_a_cut_answer_of_an_lm_given_at_the_call_is_no_row() -> None:
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False)
    collected = optimizer.collect(AtCall(plain_lm(cut_engine())), trainset=numbers(6))
    assert [row.example for row in collected.rows] == [1, 2, 4, 5]
    assert collected.card.dropped_by_reason == {"cut at max_tokens": 2}


def drawn(make: Any) -> list[tuple[float, int | None]]:
    """Temperature and seed of two tries."""
    engine = parity_engine(lambda *_: True)
    runner = Runner(make(plain_lm(engine)))
    for number in (1, 2):
        assert runner.run(numbers(1)[0], Attempt("sample", number, 1.0)).error is None
    return [(request.temperature, request.seed) for request in engine.requests]


def as_its_own(lm: Any) -> dspy.Predict:
    predictor = dspy.Predict(Parity)
    predictor.lm = lm
    return predictor


@pytest.mark.parametrize("kind", [AtCall, InContext, Awaited, lambda lm: AtCall(lm, lm.copy(max_tokens=7))])
def test_tries_with_an_lm_given_at_the_call_sample_as_those_with_the_predictors_own(kind: Any) -> None:
    asked = drawn(kind)
    assert asked == drawn(as_its_own)
    assert [temperature for temperature, _ in asked] == [1.0, 1.0]
    assert len({seed for _, seed in asked}) == 2


def test_another_model_given_at_the_call_answers_as_it_is() -> None:
    other = parity_engine(lambda *_: True, base_name="other")
    program = AtCall(plain_lm(parity_engine(lambda *_: True)), plain_lm(other))
    (call,) = Runner(program).run(numbers(1)[0], Attempt("sample", 1, 1.0)).calls
    assert (call.unfit, call.text is None) == ("made with another LM than the predictor's", False)
    assert [(request.temperature, request.seed) for request in other.requests] == [(0.0, None)]
