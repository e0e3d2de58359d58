"""A pass over examples gives a judged trace of each, and what raised is dropped with its reason."""

from __future__ import annotations

import _thread
import math
import threading
import time
from collections import Counter
from typing import Any

import dspy
import pytest
from fakes import (
    TwoSteps,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    reply,
    right,
    two_step_engine,
    two_step_program,
    wrong,
)

from bettertogether.callbacks import Callback, ProgressEvent, listening
from bettertogether.errors import ConfigError, TooManyErrors
from bettertogether.programs.behaviour import program_key
from bettertogether.rollouts.rollout import Call, RolloutStore
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import (
    ExamplePass,
    Sampling,
    TraceSet,
    collect_traces,
)
from bettertogether.testing import FakeEngine, FakeRequest

NO_MORE = Sampling(num_samples=0, rescue=False)


def collect(
    engine: FakeEngine,
    count: int = 6,
    sampling: Sampling = NO_MORE,
    metric: Any = parity_match,
    *,
    threshold: float | None = None,
    phase: str = "run",
    **settings: Any,
) -> TraceSet:
    options = ExamplePass(metric, threshold, RunSettings(**settings), phase)
    return collect_traces(parity_program(engine), numbers(count), options, sampling=sampling)


def at_most(max_errors: int) -> ExamplePass:
    return ExamplePass(parity_match, settings=RunSettings(max_errors=max_errors))


def attempts(traces: TraceSet) -> list[tuple[int, str, int, bool]]:
    return [(trace.index, trace.source, trace.attempt, trace.passed) for trace in traces.traces]


def sampled_only(request: FakeRequest, number: int) -> bool:
    """Knows even numbers at once, odd ones when sampled."""
    return number % 2 == 0 or request.temperature > 0


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
    assert [trace.reason for trace in traces.traces] == [
        "program error: ValueError: can't do 0",
        None,
        None,
        "program error: ValueError: can't do 3",
        None,
    ]


def test_a_raise_in_the_metric_is_a_dropped_trace_with_its_reason() -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        if example.number == 1:
            raise KeyError("unit")
        return True

    traces = collect(parity_engine(lambda *_: True), 3, metric=metric)
    assert [trace.reason for trace in traces.traces] == [None, "metric error: KeyError: 'unit'", None]
    assert [trace.failed for trace in traces.traces] == [False, True, False]


def test_a_metric_that_returns_none_is_a_metric_error() -> None:
    traces = collect(parity_engine(lambda *_: True), 1, metric=lambda e, p, t=None: None)
    assert "the metric must return a bool, a number or Prediction" in str(traces.traces[0].reason)


def test_a_timeout_is_a_dropped_trace() -> None:
    class Slow(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            raise TimeoutError("60 s")

    traces = collect_traces(Slow(), numbers(1), ExamplePass(parity_match), sampling=NO_MORE)
    assert traces.reasons() == {"timeout: TimeoutError: 60 s": 1}


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
    assert traces.reasons() == {"program error: ValueError: can't do 0": 7}


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


def test_an_example_that_failed_is_tried_again_until_it_passes() -> None:
    sampling = Sampling(num_samples=3, rescue=False)
    traces = collect(engine := parity_engine(sampled_only), 4, sampling)
    assert attempts(traces) == [
        (0, "student", 0, True),
        (1, "student", 0, False),
        (1, "sample", 1, True),
        (2, "student", 0, True),
        (3, "student", 0, False),
        (3, "sample", 1, True),
    ]
    assert len(engine.requests) == 6


def test_an_example_that_never_passes_is_tried_num_samples_times() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 2, Sampling(num_samples=3, rescue=False))
    assert len(engine.requests) == 2 + 2 * 3


def solved_on_try(number_of_tries: int, numbers_known: int) -> FakeEngine:
    """An engine that answers the first numbers right on their n-th sample, and the others never."""
    tries: Counter[int] = Counter()

    def knows(request: FakeRequest, number: int) -> bool:
        tries[number] += request.temperature > 0
        return number < numbers_known and tries[number] == number_of_tries

    return parity_engine(knows)


@pytest.mark.parametrize(
    ("enough", "solved", "tries"),
    [
        (0, 0, {"sample": 12, "student": 6}),
        (1, 3, {"sample": 6 * 5, "student": 6}),
        (3, 3, {"sample": 6 * 5, "student": 6}),
        (4, 3, {"sample": 6 * 5 + 3 * 3, "student": 6}),
    ],
)
def test_where_hardly_any_is_solved_the_others_are_tried_up_to_eight_times(
    enough: int, solved: int, tries: dict[str, int]
) -> None:
    sampling = Sampling(num_samples=2, rescue=False, enough=enough)
    traces = collect(solved_on_try(5, 3), 6, sampling, num_threads=1)
    assert len(traces.passing) == solved
    assert Counter(trace.source for trace in traces.traces) == tries


def test_more_tries_than_asked_for_come_after_the_hint() -> None:
    engine = parity_engine(lambda request, _: "is known" in request.system)
    collect(engine, 2, Sampling(num_samples=1, enough=2))
    assert len(engine.requests) == 2 * 3


def test_num_samples_zero_is_no_more_tries_however_few_are_solved() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 3, Sampling(num_samples=0, rescue=False, enough=2))
    assert len(engine.requests) == 3


def test_num_samples_zero_without_rescue_is_one_run_an_example() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 5, NO_MORE)
    assert len(engine.requests) == 5


def test_sample_passing_tries_the_others_too() -> None:
    engine = parity_engine(lambda *_: True)
    traces = collect(engine, 3, Sampling(num_samples=2, rescue=False, sample_passing=True))
    assert len(engine.requests) == 9
    assert Counter(trace.source for trace in traces.traces) == {"student": 3, "sample": 6}


def test_the_temperature_schedule_is_used_in_turn() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 1, Sampling(num_samples=5, temperature=(0.5, 1.0), rescue=False))
    assert [request.temperature for request in engine.requests] == [0.0, 0.5, 1.0, 0.5, 1.0, 0.5]


def test_every_example_and_try_has_a_seed_of_its_own_and_a_second_run_the_same() -> None:
    def seeds(seed: int) -> set[tuple[str, int | None]]:
        engine = parity_engine(lambda *_: False)
        collect(engine, 4, Sampling(num_samples=3, rescue=False), seed=seed)
        return {(request.user, request.seed) for request in engine.requests if request.temperature > 0}

    assert len({seed for _, seed in seeds(0)}) == 12
    assert seeds(0) == seeds(0)
    assert not seeds(0) & seeds(1)


def test_rescue_tries_once_more_with_the_label_as_a_hint() -> None:
    engine = parity_engine(lambda request, _: "is known" in request.system)
    traces = collect(engine, 2, Sampling(num_samples=1))
    assert attempts(traces)[:3] == [(0, "student", 0, False), (0, "sample", 1, False), (0, "rescue", 1, True)]
    assert sum("is known" in request.system for request in engine.requests) == 2


def test_what_comes_before_the_answer_is_led_to_it_first_and_the_answer_given_only_where_that_fails() -> None:
    def answer(request: FakeRequest) -> str:
        told, number = "is known" in request.system, number_of(request)
        if "1. `parity`" not in request.system:
            return reply(request, remark="good" if told and number == 1 else "bad")
        return reply(request, parity=right(number) if told or "good" in request.user else wrong(number))

    program = two_step_program(FakeEngine(answer))
    traces = collect_traces(program, numbers(3, start=1), ExamplePass(parity_match), sampling=Sampling(0))
    passed = {trace.index: [call.outputs for call in trace.calls] for trace in traces.passing}
    assert passed == {
        0: [{"remark": "good"}, {"parity": "odd"}],
        1: [{"remark": "bad"}, {"parity": "even"}],
        2: [{"remark": "bad"}, {"parity": "odd"}],
    }
    assert [t.source for t in traces.traces] == ["student", "rescue", *["student", "rescue", "rescue"] * 2]


@pytest.mark.parametrize(
    "remark", ["As the right final result is known: `x`", "Given the hint, it is", "Write what leads to it."]
)
@pytest.mark.parametrize("hinted", [True, False])
def test_a_rescued_run_in_which_an_answer_talks_about_the_hint_has_not_passed(remark: str, hinted: bool) -> None:
    def answer(request: FakeRequest) -> str:
        told, number = "is known" in request.system, number_of(request)
        if "1. `parity`" not in request.system:
            return reply(request, remark=remark)
        return reply(request, parity=right(number) if told or not hinted else wrong(number))

    program = two_step_program(FakeEngine(answer))
    traces = collect_traces(program, numbers(1), ExamplePass(parity_match), sampling=Sampling(0))
    assert [trace.passed for trace in traces.traces] == ([False] * 3 if hinted else [True])
    assert traces.reasons().get("answer talks about the hint", 0) == int(hinted)


def test_rescue_false_never_hints() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 2, Sampling(num_samples=1, rescue=False))
    assert not any("is known" in request.system for request in engine.requests)


def test_an_example_without_a_label_is_not_rescued() -> None:
    engine = parity_engine(lambda *_: False)
    examples = [dspy.Example(number=1).with_inputs("number")]
    collect_traces(parity_program(engine), examples, ExamplePass(lambda e, p, t=None: False), sampling=Sampling(0))
    assert len(engine.requests) == 1


def test_a_named_label_field_alone_is_the_hint() -> None:
    engine = parity_engine(lambda *_: False)
    examples = [dspy.Example(number=1, parity="odd", secret="x").with_inputs("number")]
    options = ExamplePass(parity_match)
    collect_traces(parity_program(engine), examples, options, sampling=Sampling(0), label_field="parity")
    assert "secret" not in engine.requests[-1].system
    assert "`parity` = 'odd'" in engine.requests[-1].system


def test_traces_carry_their_label_where_labels_repeat() -> None:
    traces = collect(parity_engine(lambda *_: True), 4)
    assert [trace.label for trace in traces.traces] == ["even", "odd", "even", "odd"]


def test_a_teacher_makes_the_runs_instead_of_the_student() -> None:
    student, teacher = parity_engine(lambda *_: False), parity_engine(lambda *_: True, base_name="big")
    traces = collect_traces(
        parity_program(student),
        numbers(3),
        ExamplePass(parity_match),
        sampling=NO_MORE,
        teachers=[parity_program(teacher)],
    )
    assert attempts(traces) == [(i, "teacher", 0, True) for i in range(3)]
    assert (len(student.requests), len(teacher.requests)) == (0, 3)


def test_each_of_several_teachers_makes_a_run_of_every_example() -> None:
    engines = [parity_engine(lambda *_: True, base_name=name) for name in ("a", "b")]
    teachers = [parity_program(engine) for engine in engines]
    student = parity_program(parity_engine(lambda *_: False))
    traces = collect_traces(student, numbers(3), ExamplePass(parity_match), sampling=NO_MORE, teachers=teachers)
    assert [len(engine.requests) for engine in engines] == [3, 3]
    assert len(traces.passing) == 6


def test_the_first_teacher_makes_the_further_tries() -> None:
    engines = [parity_engine(lambda *_: False, base_name=name) for name in ("a", "b")]
    teachers = [parity_program(engine) for engine in engines]
    student = parity_engine(lambda *_: False)
    sampling = Sampling(1, rescue=False)
    collect_traces(parity_program(student), numbers(2), ExamplePass(parity_match), sampling=sampling, teachers=teachers)
    assert [len(engine.requests) for engine in engines] == [2 + 2, 2]
    assert student.requests == []


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
    assert seen == [("try", i, 3) for i in (1, 2, 3)]
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
