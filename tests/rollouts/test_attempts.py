"""Of several attempts of a module (`dspy.BestOfN`, `dspy.Refine`) the chosen one's calls are the program's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from fakes import Parity, TwoSteps, number_of, numbers, reply
from watched import ALWAYS, One, Pooled, over, prompts, rows_of

from bettertogether.rollouts.rollout import Attempt, Call
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine, FakeRequest


class Best(dspy.Module):
    """`dspy.BestOfN` or `dspy.Refine` around a predictor or a program of its own."""

    def __init__(self, kind: Any, inner: dspy.Module, count: int = 3) -> None:
        super().__init__()
        self.inner = inner
        self.best = kind(module=inner, N=count, reward_fn=even_reward, threshold=1.0)

    def forward(self, number: int) -> dspy.Prediction:
        return self.best(number=number)


def even_reward(arguments: dict[str, Any], prediction: Any) -> float:
    return float(prediction.parity == "even")


def even_at(attempt: int) -> Callable[[FakeRequest], str]:
    """Says even from this call of the parity predictor on, counted for each number."""
    counts: dict[int, int] = {}

    def answer(request: FakeRequest) -> str:
        if "advice" in request.system:
            return reply(request, discussion="d", advice={"self": "think"})
        number = number_of(request)
        if "`parity`" not in request.system:
            return reply(request, remark=f"try {counts.get(number, 0)}")
        counts[number] = counts.get(number, 0) + 1
        return reply(request, parity="even" if counts[number] > attempt else "odd")

    return answer


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_of_several_attempts_the_chosen_ones_calls_are_the_programs(kind: Any, attempt: int) -> None:
    program = over(Best(kind, TwoSteps()), FakeEngine(even_at(attempt)))
    with dspy.context(lm=program.inner.decide.lm):
        run = Runner(program).run(numbers(1)[0])
    remark = f"try {attempt}"
    assert run.calls == (
        Call("inner.remark", {"number": 0}, {"remark": remark}),
        Call("inner.decide", {"number": 0, "remark": remark}, {"parity": "even"}),
    )
    assert run.strangers == 0, "the advice that a Refine asks for is its own"


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_a_row_of_the_chosen_attempt_has_a_prompt_that_is_sent_and_no_advice(kind: Any) -> None:
    engine = FakeEngine(even_at(1))
    program = over(Best(kind, dspy.Predict(Parity)), engine)
    with dspy.context(lm=program.inner.lm):
        rows = rows_of(program, 1)
    assert [row.completion for row in rows] == ["[[ ## parity ## ]]\neven\n\n[[ ## completed ## ]]\n"]
    assert {repr(row.messages) for row in rows} <= prompts(engine)
    assert "hint_" not in repr(rows)


def test_several_attempts_of_a_program_with_two_predictors_can_be_sampled() -> None:
    program = over(Best(dspy.BestOfN, TwoSteps()), FakeEngine(even_at(0)))
    run = Runner(program).run(numbers(1)[0], Attempt("sample", 1, 1.0))
    assert (run.error, len(run.calls)) == (None, 2)


def test_each_of_several_attempts_is_sampled_with_a_seed_of_its_own_and_a_second_run_with_the_same() -> None:
    def seeds() -> list[int | None]:
        engine = FakeEngine(even_at(9))
        Runner(over(Best(dspy.BestOfN, dspy.Predict(Parity)), engine)).run(numbers(1)[0], Attempt("sample", 1, 1.0))
        return [request.seed for request in engine.requests]

    assert len(set(seeds())) == 3
    assert seeds() == seeds()


def test_several_attempts_of_a_program_with_threads_keep_the_chosen_ones_calls() -> None:
    program = over(Best(dspy.BestOfN, Pooled()), FakeEngine(even_at(1)))
    run = Runner(program).run(numbers(1)[0])
    assert [call.outputs["parity"] for call in run.calls if call.inputs["number"] == 0] == ["even"]


def test_deep_copies_of_predictors_that_are_copies_of_each_other_are_told_apart() -> None:
    class Same(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            first = dspy.Predict(Parity)
            self.steps = [first, copy.deepcopy(first)]

        def forward(self, number: int) -> dspy.Prediction:
            copy.deepcopy(self.steps[1])(number=number)
            return copy.deepcopy(self.steps[0])(number=number)

    run = Runner(over(Same(), ALWAYS)).run(numbers(1)[0])
    assert [call.predictor for call in run.calls] == ["steps[1]", "steps[0]"]


def test_a_metric_sees_the_programs_own_predictors_in_every_attempt() -> None:
    program = over(One(), ALWAYS)
    program.forward = program.p
    run = Runner(Best(dspy.BestOfN, program.p)).run(numbers(1)[0], Attempt("sample", 1, 1.0))
    assert [entry[0] for entry in run.raw_trace] == [program.p]
