"""Where a metric grades and hardly any run gets its full mark, runs no worse than the average are learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
import pytest
from fakes import field_of, number_of, numbers, plain_lm, reply, right, two_step_program

from bettertogether import LoRAFinetune, PreferenceFinetune
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, TraceSet, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.select_traces import select_traces
from bettertogether.testing import FakeEngine, FakeRequest

TEMPERATURES = (0.0, 0.3, 0.6)
"""Of the first run and of two more."""

MARKS = {
    "poor": (0.2, 0.9, 0.4),
    "mean": (0.5, 0.3, 0.5),
    "good": (0.8, 0.1, 0.2),
    "none": (0.0, 0.0, 0.0),
    "best": (1.0, 0.7, 0.7),
    "near": (0.5, 0.6, 0.55),
}
"""By example, what its runs score; the first ones 0.5 on average."""

TWO_MORE = Sampling(2, TEMPERATURES[1:], rescue=False)


def mark_of(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(prediction.mark)


def grading_engine(marks: Mapping[str, tuple[float, ...]] = MARKS) -> FakeEngine:
    def answer(request: FakeRequest) -> str:
        return reply(request, mark=str(marks[field_of(request, "name")][TEMPERATURES.index(request.temperature or 0)]))

    return FakeEngine(answer)


def program(engine: FakeEngine) -> dspy.Predict:
    made = dspy.Predict("name -> mark")
    made.set_lm(plain_lm(engine))
    return made


def named(*names: str) -> list[dspy.Example]:
    return [dspy.Example(name=name).with_inputs("name") for name in names]


def graded(
    sampling: Sampling = TWO_MORE,
    metric: Any = mark_of,
    threshold: float | None = None,
    marks: Mapping[str, tuple[float, ...]] = MARKS,
) -> TraceSet:
    options = ExamplePass(metric, threshold, RunSettings(), "run")
    return collect_traces(program(grading_engine(marks)), named(*marks), options, sampling=sampling)


def passing(traces: TraceSet) -> list[tuple[str, float]]:
    return [(trace.example.name, trace.score) for trace in traces.passing]


def test_runs_as_good_as_the_mean_of_the_first_ones_pass_where_hardly_any_has_the_full_mark() -> None:
    traces = graded()
    assert passing(traces) == [
        ("poor", 0.9),
        *[("mean", 0.5)] * 2,
        ("good", 0.8),
        ("best", 1.0),
        *[("near", 0.5), ("near", 0.6), ("near", 0.55)],
    ]
    assert traces.warnings == (
        "run: 1 of 6 examples reach the full mark, 1.0, so the best runs from 0.500 on, what the first ones score, "
        "count too. threshold= gives another mark.",
    )


@pytest.mark.parametrize(("count", "mark"), [(3, 0.524), (8, 0.5)])
def test_where_few_examples_have_a_run_as_good_as_the_mean_it_is_the_median(count: int, mark: float) -> None:
    alike = {f"alike {number}": (0.5, 0.5, 0.4) for number in range(count - 1)}
    marks = {**alike, "one": (0.5 + 0.024 * count, 0.9, 0.9)}
    traces = graded(marks=marks)
    assert traces.mark == pytest.approx(mark)
    assert {name for name, _ in passing(traces)} == ({"one"} if count == 3 else set(marks))


@pytest.mark.parametrize(("enough", "taken"), [(0, True), (1, False), (2, True)])
def test_where_enough_examples_have_the_full_mark_it_stays(enough: int, taken: bool) -> None:
    traces = graded(Sampling(2, TEMPERATURES[1:], rescue=False, enough=enough))
    assert {name for name, _ in passing(traces)} == ({"poor", "good", "best", "near", "mean"} if taken else {"best"})
    assert (traces.mark, bool(traces.warnings)) == (0.5 if taken else None, taken)


def test_where_half_of_the_examples_have_the_full_mark_it_stays() -> None:
    traces = graded(marks={name: MARKS[name] for name in ("best", "good")})
    assert passing(traces) == [("best", 1.0)]


def test_where_some_are_solved_the_commonest_bad_score_is_no_near_miss() -> None:
    marks = {f"{score} {number}": (score,) * 3 for score in (1.0, 0.1) for number in range(2 if score == 1 else 8)}
    traces = graded(marks=marks)
    assert passing(traces) == [("1.0 0", 1.0), ("1.0 1", 1.0)]
    assert traces.mark is None


def test_a_threshold_is_kept_to() -> None:
    assert passing(graded(threshold=0.85)) == [("poor", 0.9), ("best", 1.0)]


def test_a_metric_that_says_yes_or_no_is_kept_to() -> None:
    traces = graded(metric=lambda e, p, trace=None: float(p.mark) >= 0.9)
    assert passing(traces) == [("poor", 1.0), ("best", 1.0)]
    assert traces.warnings == ()


def test_where_all_runs_score_the_same_none_passes() -> None:
    traces = graded(metric=lambda e, p, trace=None: 0.5)
    assert (passing(traces), traces.warnings) == ([], ())


def test_of_the_runs_of_an_example_the_best_are_learned_from() -> None:
    found = select_traces(graded().traces, near_misses=True)
    assert [(trace.example.name, trace.score) for trace in found] == [
        ("poor", 0.9),
        ("mean", 0.5),
        ("good", 0.8),
        ("best", 1.0),
        ("near", 0.6),
    ]


def test_a_rescued_run_that_talks_about_the_hint_does_not_pass_by_a_part_of_the_mark() -> None:
    def answer(request: FakeRequest) -> str:
        if "1. `parity`" not in request.system:
            return reply(request, remark="Given the hint, it is" if "is known" in request.system else "bad")
        return reply(request, parity=right(number_of(request)))

    def longest_remark(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return len(trace[0][2].remark) / 100

    options = ExamplePass(longest_remark, None, RunSettings(), "run")
    traces = collect_traces(two_step_program(FakeEngine(answer)), numbers(4), options, sampling=Sampling(0))
    assert max(trace.score for trace in traces.traces) == 0.21
    assert {trace.score for trace in traces.passing} == {0.03}
    assert traces.reasons() == {"answer talks about the hint": 4}


def test_a_weight_step_learns_the_best_runs_of_a_metric_that_grades() -> None:
    step = LoRAFinetune(mark_of, num_samples=2, temperature=TEMPERATURES[1:], rescue=False, balance=False)
    engine = grading_engine()
    collected = step.collect(program(engine), trainset=named("poor", "mean", "good", "none"))
    assert [row.completion for row in collected.rows] == [*map(reply_of, ("0.9", "0.5", "0.8"))]
    assert collected.warnings[0].startswith("collect training data: 0 of 4 examples reach the full mark, 1.0")


def test_pairs_of_a_metric_that_grades_prefer_what_is_no_worse_than_the_mean() -> None:
    step = PreferenceFinetune(mark_of, num_samples=2, temperature=TEMPERATURES[1:])
    collected = step.collect(program(grading_engine()), trainset=named("poor", "mean", "good", "none"))
    assert [(row.completion, row.rejected) for row in collected.rows] == [
        (reply_of("0.9"), reply_of("0.2")),
        (reply_of("0.4"), reply_of("0.2")),
        (reply_of("0.5"), reply_of("0.3")),
        (reply_of("0.8"), reply_of("0.1")),
        (reply_of("0.8"), reply_of("0.2")),
    ]


def reply_of(mark: str) -> str:
    return f"[[ ## mark ## ]]\n{mark}\n\n[[ ## completed ## ]]\n"
