"""Predictors that are asked for several answers at once (`n`), of which the program makes one."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, parity_match, plain_lm, reply

from bettertogether.engines.protocol import TrainingRow
from bettertogether.rollouts.rollout import Attempt, Rollout
from bettertogether.rollouts.runner import Runner
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest


class Vote(dspy.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity, **config)

    def forward(self, number: int) -> dspy.Prediction:
        return dspy.majority(self.p(number=number))


class Compared(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.ChainOfThought(Parity, n=3)
        self.compare = dspy.MultiChainComparison(Parity, M=3)

    def forward(self, number: int) -> dspy.Prediction:
        return self.compare(self.p(number=number).completions, number=number)


def over(program: dspy.Module, engine: FakeEngine, **options: Any) -> dspy.Module:
    program.set_lm(plain_lm(engine, **options))
    return program


def odd_first() -> FakeEngine:
    """Of three answers the first says odd, the others even; a comparison says even."""
    engine = FakeEngine(lambda request: reply(request, **said(request)))

    def said(request: FakeRequest) -> dict[str, str]:
        compares = "rationale" in request.system
        first = (len(engine.requests) - 1) % (4 if "reasoning" in request.system else 3) == 0
        thought = "rationale" if compares else "reasoning"
        return {thought: f"of {len(engine.requests)}", "parity": "odd" if first and not compares else "even"}

    return engine


@pytest.mark.parametrize("program", [Vote(n=3), Compared()])
def test_a_call_has_the_answer_that_the_program_made_its_own(program: dspy.Module) -> None:
    run = Runner(over(program, odd_first())).run(numbers(1)[0])
    assert run.prediction.parity == "even", run.error
    assert run.calls[0].outputs["parity"] == "even"
    assert "even" in (run.calls[0].text or "")


def test_a_call_has_its_first_answer_where_the_program_returns_none_of_them() -> None:
    class Other(Vote):
        def forward(self, number: int) -> dspy.Prediction:
            self.p(number=number)
            return dspy.Prediction(parity="neither")

    run = Runner(over(Other(n=3), odd_first())).run(numbers(1)[0])
    assert run.calls[0].outputs == {"parity": "odd"}
    assert "odd" in (run.calls[0].text or "")


def test_what_was_voted_down_is_not_learned() -> None:
    engine = odd_first()
    step = LoRAFinetune(parity_match, num_samples=0, rescue=False, train_prompt="vanilla")
    step.compile(over(Vote(n=3), engine), trainset=[numbers(1)[0]])
    rows: tuple[TrainingRow, ...] = engine.trainings[0]
    assert ["even" in row.completion for row in rows] == [True]


def seeds(program: dspy.Module, attempt: Attempt, **options: Any) -> list[int | None]:
    engine = FakeEngine(lambda request: reply(request, parity="even"))
    run: Rollout = Runner(over(program, engine, **options)).run(numbers(1)[0], attempt)
    assert run.error is None
    return [request.seed for request in engine.requests]


@pytest.mark.parametrize("attempt", [Attempt(), Attempt("sample", 1, 0.6)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_answer_has_a_seed_of_its_own_and_the_same_in_another_run(attempt: Attempt, temperature: float) -> None:
    first, again = (seeds(Vote(n=3), attempt, temperature=temperature) for _ in range(2))
    assert first == again
    assert len(set(first) - {None}) == 3


def test_a_predictor_that_samples_over_an_lm_that_does_not_has_the_runs_seed() -> None:
    first, again = (seeds(Vote(temperature=0.7), Attempt()) for _ in range(2))
    assert first == again != [None]
