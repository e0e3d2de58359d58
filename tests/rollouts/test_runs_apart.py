"""What a program does beside its run, or in spite of its options, reaches no other run and ends no step."""

from __future__ import annotations

import concurrent.futures
import time
from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, parity_match, plain_lm, two_step_engine

from bettertogether import BetterTogether, BootstrapFewShotRS, PolicyFinetune, evaluate
from bettertogether.errors import ConfigError
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, TraceSet, collect_traces
from bettertogether.rollouts.tries import Sampling


def collected(program: dspy.Module, count: int, **sampling: Any) -> TraceSet:
    options = ExamplePass(parity_match, settings=RunSettings(num_threads=1))
    return collect_traces(program, numbers(count), options, sampling=Sampling(**{"rescue": False} | sampling))


class Late(dspy.Module):
    """Leaves a thread behind that makes a call while the next example runs."""

    def __init__(self) -> None:
        super().__init__()
        self.remark = dspy.Predict("number: int -> remark: str")
        self.decide = dspy.Predict(Parity)

    def slow(self, number: int) -> None:
        time.sleep(0.15)
        self.remark(number=number)

    def forward(self, number: int) -> dspy.Prediction:
        pool = concurrent.futures.ThreadPoolExecutor(1)
        pool.submit(self.slow, number)
        pool.shutdown(wait=False)
        time.sleep(0.1)
        return self.decide(number=number)


def test_a_call_of_a_thread_that_outlives_its_run_is_of_no_other_run() -> None:
    program = Late()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    for trace in collected(program, 4, num_samples=0).traces:
        assert [(call.predictor, call.inputs["number"]) for call in trace.calls] == [("decide", trace.index)]


class Alone(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = dspy.Predict(Parity)

    def forward(self, number: int) -> Any:
        return self.one(number=number)


class Within(Alone):
    """Asks through dspy.Parallel, which gives None where an answer can't be read; `stumbles` itself, or the metric."""

    stumbles = True

    def forward(self, number: int) -> Any:
        (answer,) = dspy.Parallel(num_threads=1, disable_progress_bar=True)([(self.one, {"number": number})])
        return dspy.Prediction(parity=answer.parity) if self.stumbles else answer


class Returned(Within):
    stumbles = False


@pytest.mark.parametrize("kind", [Alone, Within, Returned])
def test_an_answer_that_cannot_be_read_is_no_error_of_a_program_that_asks_in_parallel(kind: type[dspy.Module]) -> None:
    engine = parity_engine(lambda request, number: True)
    right = engine.answer
    engine.answer = lambda request: "no idea" if len(engine.requests) % 3 else right(request)
    program = kind()
    program.set_lm(plain_lm(engine))
    result = evaluate(program, numbers(30), parity_match, max_errors=0, num_threads=1, progress=False)
    assert {failure.kind for failure in result.failures} == {"parse failure"}
    assert 0 < result.failures[0].count < 30


def test_a_step_goes_on_over_answers_that_cannot_be_read_in_parallel() -> None:
    program = Within()
    program.set_lm(plain_lm(parity_engine(lambda request, number: number % 3 == 0)))
    compiled = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=2)).compile(
        program, trainset=numbers(24, start=40), valset=numbers(12), strategy="p", progress=False
    )
    assert [record.status for record in compiled.report.rounds] == ["complete", "complete"]


def test_tries_are_drawn_whatever_the_predictors_own_temperature() -> None:
    engine = parity_engine(lambda *_: False)
    program = dspy.Predict(Parity, temperature=0.0, seed=3)
    program.set_lm(plain_lm(engine))
    collected(program, 2, num_samples=2)
    tries = [(request.temperature, request.seed) for request in engine.requests]
    assert {temperature for temperature, _ in tries} == {0.0, 0.3, 0.6}
    assert len({seed for temperature, seed in tries if temperature}) == len([t for t, _ in tries if t])
    assert program.config == {"temperature": 0.0, "seed": 3}


@pytest.mark.parametrize("option", [{"top_p": 0.5}, {"n": 3}, {"top_k": 5}])
def test_a_policy_refuses_a_predictor_whose_own_options_narrow_its_answers(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = dspy.Predict(Parity, **option)
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    monkeypatch.setattr("bettertogether.steps.policy_step.PolicyEngine", object)
    with pytest.raises(ConfigError, match=next(iter(option))):
        PolicyFinetune(parity_match).trainable(program)
