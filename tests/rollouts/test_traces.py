"""A pass over examples gives a judged trace of each, and what raised is dropped with its reason."""

from __future__ import annotations

import _thread
import math
import threading
import time
from typing import Any

import dspy
import pytest
from fakes import TwoSteps, numbers, parity_engine, parity_match, parity_program, placeless, plain_lm, two_step_engine
from tries import NO_MORE, at_most, attempts, collect, sampled_only

from bettertogether.callbacks import Callback, ProgressEvent, listening
from bettertogether.errors import ConfigError, PromptTooLongError, TooManyErrors
from bettertogether.programs.behaviour import program_key
from bettertogether.rollouts.rollout import Attempt, Call, RolloutStore
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.testing import FakeEngine, FakeRequest


def test_a_pass_gives_a_judged_trace_of_every_example_in_order() -> None:
    traces = collect(parity_engine(lambda _, number: number != 2), 4)
    assert attempts(traces) == [(i, "student", 0, i != 2) for i in range(4)]
    assert [trace.score for trace in traces.traces] == [1.0, 1.0, 0.0, 1.0]
    assert traces.reasons() == {"score below threshold": 1}
    assert traces.traces[1].calls == (Call("self", {"number": 1}, {"parity": "odd"}),)


def test_the_ledger_counts_program_metric_and_lm_calls() -> None:
    traces = collect(engine := parity_engine(lambda *_: True), 5)
    assert (traces.ledger.program_calls, traces.ledger.metric_calls, traces.ledger.lm_calls) == (5, 5, 5)
    assert len(engine.requests) == 5


def test_a_parse_failure_is_a_dropped_trace_and_no_metric_call() -> None:
    metric_calls = []
    engine = FakeEngine(lambda _: "no")
    traces = collect(engine, 30, metric=lambda *a, **k: metric_calls.append(1), max_errors=0)
    assert traces.reasons() == {"parse failure": 30}
    assert metric_calls == []
    assert traces.ledger.metric_calls == 0


class Raises(TwoSteps):
    """Raises on multiples of three."""

    def forward(self, number: int) -> dspy.Prediction:
        if number % 3 == 0:
            raise ValueError(f"can't do {number}\nsecond line")
        return super().forward(number)


def raising_program() -> Raises:
    program = Raises()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    return program


def test_a_raise_in_the_program_is_a_dropped_trace_with_its_reason() -> None:
    traces = collect_traces(raising_program(), numbers(5), ExamplePass(parity_match), sampling=NO_MORE)
    assert [trace.reason and placeless(trace.reason) for trace in traces.traces] == [
        "program error: ValueError: can't do 0 second line",
        None,
        None,
        "program error: ValueError: can't do 3 second line",
        None,
    ]


def test_an_error_of_ours_in_the_program_ends_the_pass() -> None:
    class Refuses(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            raise error

    error = ConfigError("not allowed")
    with pytest.raises(ConfigError) as caught:
        collect_traces(Refuses(), numbers(1), ExamplePass(parity_match), sampling=NO_MORE)
    assert caught.value is error


def test_a_raise_in_the_metric_is_a_dropped_trace_with_its_reason() -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        if example.number == 1:
            raise KeyError("unit")
        return True

    traces = collect(parity_engine(lambda *_: True), 3, metric=metric)
    reasons = [trace.reason and placeless(trace.reason) for trace in traces.traces]
    assert reasons == [None, "metric error: KeyError: 'unit'", None]
    assert [trace.failed for trace in traces.traces] == [False, True, False]


def test_a_metric_that_returns_none_is_a_metric_error() -> None:
    traces = collect(parity_engine(lambda *_: True), 1, metric=lambda e, p, t=None: None)
    assert "the metric must return a bool, a number or Prediction" in str(traces.traces[0].reason)


def test_a_timeout_is_a_dropped_trace() -> None:
    class Slow(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            raise TimeoutError("60 s")

    traces = collect_traces(Slow(), numbers(1), ExamplePass(parity_match), sampling=NO_MORE)
    assert [*map(placeless, traces.reasons())] == ["timeout: TimeoutError: 60 s"]


def test_as_many_examples_as_max_errors_may_raise() -> None:
    traces = collect_traces(raising_program(), numbers(9), at_most(3), sampling=NO_MORE)
    assert len(traces.passing) == 6


def test_one_more_is_an_error_with_the_reasons_and_what_to_do() -> None:
    with pytest.raises(TooManyErrors, match=r"3 of 9 examples raised, more than max_errors=2 allows.*can't do 0.*Mend"):
        collect_traces(raising_program(), numbers(9), at_most(2), sampling=NO_MORE)


def test_without_max_errors_dspys_setting_holds() -> None:
    with dspy.context(max_errors=1), pytest.raises(TooManyErrors, match="max_errors=1"):
        collect_traces(raising_program(), numbers(9), ExamplePass(parity_match), sampling=NO_MORE)


def test_an_example_that_raises_on_every_try_counts_once_for_max_errors() -> None:
    sampling = Sampling(num_samples=4)
    traces = collect_traces(raising_program(), numbers(3), at_most(1), sampling=sampling)
    assert {placeless(reason): count for reason, count in traces.reasons().items()} == {
        "program error: ValueError: can't do 0 second line": 7
    }
    at_once = [(0, Attempt("sample", number, 1.0)) for number in (1, 2, 3)]
    assert [trace.failed for trace in at_most(1).over(raising_program(), numbers(1), at_once)] == [True] * 3


def test_a_prompt_that_is_too_long_scores_zero_and_does_not_count_for_max_errors() -> None:
    def refuse(request: FakeRequest) -> str:
        raise PromptTooLongError("9 tokens, 8 fit")

    traces = collect_traces(parity_program(FakeEngine(refuse)), numbers(3), at_most(0), sampling=NO_MORE)
    assert [(trace.score, trace.reason, trace.failed) for trace in traces.traces] == [(0, "prompt too long", False)] * 3


def test_what_a_metric_does_to_example_and_prediction_does_not_show_when_the_run_is_judged_again() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        passed = parity_match(example, prediction)
        example.parity, prediction.parity = "even and odd", "neither"
        return passed

    program, examples = parity_program(parity_engine(lambda *_: True)), numbers(2)
    options = ExamplePass(metric, settings=RunSettings(store=RolloutStore()))
    for _ in range(2):
        assert len(collect_traces(program, examples, options, sampling=NO_MORE).passing) == 2


def test_an_error_of_the_configuration_is_raised_at_once() -> None:
    with pytest.raises(ConfigError, match="give threshold="):
        collect(parity_engine(lambda *_: True), 3, metric=lambda e, p, t=None: 50.0)


def test_the_metric_sees_the_trace() -> None:
    seen: list[Any] = []

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        seen.append(trace)
        return True

    program = TwoSteps()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    collect_traces(program, numbers(1), ExamplePass(metric), sampling=NO_MORE)
    ((first, second),) = seen
    assert [first[0], second[0]] == [program.remark, program.decide]
    assert second[1:] == ({"number": 0, "remark": "0 ends in 0"}, dspy.Prediction(parity="even"))


def test_a_metric_may_judge_by_the_trace() -> None:
    def called_twice(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        return trace is not None and len(trace) == 2

    program = TwoSteps()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    assert len(collect_traces(program, numbers(2), ExamplePass(called_twice), sampling=NO_MORE).passing) == 2


@pytest.mark.parametrize(
    ("score", "passed"), [(0.3, False), (1e-9, False), (-1.0, False), (math.nan, False), (1.0, True)]
)
def test_scores_pass_at_the_full_mark(score: float, passed: bool) -> None:
    (trace,) = collect(parity_engine(lambda *_: True), 1, metric=lambda e, p, t=None: score).traces
    assert trace.passed is passed


def test_a_threshold_decides_what_passes() -> None:
    traces = collect(parity_engine(lambda *_: True), 4, metric=lambda e, p, t=None: e.number / 4, threshold=0.5)
    assert [trace.passed for trace in traces.traces] == [False, False, True, True]


def test_a_second_pass_over_the_same_program_runs_nothing_again() -> None:
    engine, store = parity_engine(sampled_only), RolloutStore()
    first = collect(engine, 4, Sampling(2), store=store)
    made = len(engine.requests)
    second = collect(engine, 4, Sampling(2), store=store)
    assert len(engine.requests) == made
    assert attempts(second) == attempts(first)
    assert (second.ledger.lm_calls, second.ledger.metric_calls) == (0, first.ledger.metric_calls)


def test_an_interrupted_pass_leaves_the_finished_runs_in_the_store() -> None:
    store, finished = RolloutStore(), threading.Event()
    release = threading.Event()

    def slow_after_three(request: FakeRequest) -> float:
        if len(engine.requests) > 3:
            finished.set()
            release.wait(5)
        return 0.0

    engine = parity_engine(lambda *_: True, delay_s=slow_after_three)

    def interrupt() -> None:
        finished.wait(5)
        time.sleep(0.1)
        _thread.interrupt_main()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        collect(engine, 8, store=store, num_threads=1)
    release.set()
    interrupter.join()
    time.sleep(0.1)
    before = len(engine.requests)
    traces = collect(engine, 8, store=store, num_threads=1)
    assert len(traces.passing) == 8
    assert len(engine.requests) - before == 8 - before


def test_progress_is_reported_with_phase_count_and_tokens() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.events: list[ProgressEvent] = []

        def on_progress(self, event: ProgressEvent) -> None:
            self.events.append(event)

    watch = Watch()
    with listening([watch]):
        traces = collect(parity_engine(lambda *_: True), 3, phase="try")
    seen = [(event["phase"], event["done"], event["total"]) for event in watch.events]
    assert seen == [("try", i, 3) for i in range(4)]
    assert sum(event["tokens"] for event in watch.events) == traces.ledger.tokens


def test_the_result_does_not_depend_on_timing() -> None:
    def run(factor: float) -> list[Any]:
        engine = parity_engine(sampled_only, delay_s=lambda request: factor * (hash((request.user, factor)) % 7) / 1000)
        traces = collect(engine, 8, Sampling(2), num_threads=4)
        return [(trace.index, trace.attempt, trace.source, trace.calls, trace.verdict) for trace in traces.traces]

    assert run(0.0) == run(1.0) == run(2.0)


@pytest.mark.parametrize("number", [-1, 1.5, "3"])
def test_num_samples_must_be_a_whole_number(number: Any) -> None:
    with pytest.raises(ConfigError, match="give a whole number, 0 for none"):
        Sampling(num_samples=number)


@pytest.mark.parametrize("temperature", [0, -1.0, 2.5, (), (1.0, 0)])
def test_temperatures_must_be_above_zero_and_at_most_two(temperature: Any) -> None:
    with pytest.raises(ConfigError, match="give numbers above 0, at most 2"):
        Sampling(temperature=temperature)


def test_what_a_program_holds_is_looked_through_once_for_all_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[dspy.Module] = []

    def counted(program: dspy.Module) -> Any:
        looks.append(program)
        return program_key(program)

    monkeypatch.setattr("bettertogether.rollouts.runner.program_key", counted)
    traces = collect(parity_engine(lambda *_: False), 2, Sampling(num_samples=3), store=RolloutStore())
    assert (len(traces.traces), len(looks)) == (10, 1)
