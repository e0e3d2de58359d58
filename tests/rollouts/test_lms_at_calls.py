"""A predictor's model that a call is given, or that the context has, is watched and sampled as the predictor's own."""

from __future__ import annotations

import contextvars
from typing import Any

import dspy
import pytest
from fakes import CutEngine, Parity, number_of, numbers, parity_engine, parity_match, plain_lm, reply, right
from watched import One, Pooled

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


def test_the_lm_of_a_context_answers_in_place_of_the_settings_in_further_tries_too() -> None:
    general, given = (parity_engine(lambda *_: True, base_name=name) for name in ("general", "given"))
    with dspy.context(lm=plain_lm(general)):
        runner = Runner(InContext(plain_lm(given)))
        for number in range(3):
            runner.run(numbers(1)[0], Attempt("sample", number, 1.0))
    assert (len(general.requests), len({request.seed for request in given.requests})) == (0, 3)


class InContextOfACopy(One):
    def forward(self, number: int) -> Any:
        with dspy.context(lm=dspy.settings.lm.copy(max_tokens=7)):
            return self.p(number=number)


def test_tries_in_the_context_of_a_copy_of_the_settings_lm_sample_as_others() -> None:
    engine = parity_engine(lambda *_: True)
    with dspy.context(lm=plain_lm(engine)):
        for number in (1, 2):
            Runner(InContextOfACopy()).run(numbers(1)[0], Attempt("sample", number, 1.0))
    assert [(request.temperature, request.seed) for request in engine.requests] == drawn(as_its_own)


def test_a_thread_without_the_context_asks_the_lm_of_its_try() -> None:
    engine = parity_engine(lambda *_: True)

    def run() -> None:
        dspy.configure(lm=plain_lm(engine))
        try:
            assert Runner(Pooled()).run(numbers(1)[0], Attempt("sample", 1, 1.0)).error is None
        finally:
            dspy.configure(lm=None)

    # Outside of the tests' own `dspy.context`, which has no LM.
    contextvars.Context().run(run)
    assert [(request.temperature, request.seed is None) for request in engine.requests] == [(1.0, False)] * 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_program_without_an_lm_is_told_so_by_dspy(number: int) -> None:
    error = Runner(dspy.Predict(Parity)).run(numbers(1)[0], Attempt("sample", number, 1.0)).error
    assert "No LM is loaded" in str(error)


@pytest.mark.parametrize(("settings", "kept"), [({}, 3), ({"max_history_size": 2}, 2), ({"disable_history": True}, 1)])
@pytest.mark.parametrize("kind", [AtCall, InContext])
def test_an_lm_given_at_the_call_has_its_answers_in_its_history(kind: Any, settings: Any, kept: int) -> None:
    lm = plain_lm(parity_engine(lambda *_: True))
    program = kind(lm)
    program.p.lm = None
    lm.history.append({"of": "the user"})
    with dspy.context(**settings):
        for example in numbers(2):
            assert Runner(program).run(example).error is None
    assert len(lm.history) == kept
    assert program.history == program.p.history == []
