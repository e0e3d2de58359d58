"""Which passing traces are learned from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from fakes import numbers

from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Call, Source
from bettertogether.rollouts.traces import Trace
from bettertogether.steps.select_traces import select_traces


def trace(index: int, answer: str = "x", *, source: Source = "student", attempt: int = 0, passed: bool = True) -> Trace:
    call = Call("self", {"number": index}, {"parity": answer})
    example = numbers(1, start=index)[0]
    return Trace(index, example, None, (call,), Verdict(float(passed), passed), source, attempt)


def test_selection_drops_failed_and_empty_traces() -> None:
    empty = Trace(2, numbers(1)[0], None, (), Verdict(1.0, True), "student")
    assert select_traces([trace(0), trace(1, passed=False), empty]) == [trace(0)]


def test_selection_keeps_one_trace_of_equal_content_of_an_example() -> None:
    other = replace(trace(0), calls=(Call("other", {"number": 0}, {"parity": "x"}),))
    traces = [trace(0), trace(0, source="sample", attempt=1), other, trace(1)]
    assert select_traces(traces, max_per_example=5) == [traces[0], *traces[2:]]


def test_selection_caps_the_traces_of_an_example() -> None:
    traces = [trace(0, str(i), source="sample", attempt=i) for i in range(5)]
    assert select_traces(traces, max_per_example=2) == traces[:2]


def scored(index: int, answer: str, score: float) -> Trace:
    return replace(trace(index, answer), verdict=Verdict(score, True))


def test_the_best_traces_of_an_example_are_kept_and_of_near_misses_one() -> None:
    solved, near = [scored(0, "a", 1.0), scored(0, "b", 1.0)], [scored(1, "a", 0.7), scored(1, "b", 0.9)]
    third = scored(0, "c", 0.9)
    assert select_traces([third, *solved, *near]) == [*solved, near[1], near[0]]
    assert select_traces([third, *solved, *near], near_misses=True) == [*solved, near[1]]


@pytest.mark.parametrize(("share", "rescues"), [(0.5, 4), (0.6, 6), (0.65, 7)])
def test_rescued_traces_are_at_most_their_share(share: float, rescues: int) -> None:
    own = [trace(i) for i in range(4)]
    rescued = [trace(10 + i, source="rescue", attempt=1) for i in range(8)]
    kept = select_traces([*own, *rescued], max_rescue_share=share)
    assert Counter(t.source for t in kept) == {"student": 4, "rescue": rescues}


def test_a_rescue_share_of_zero_keeps_none_and_of_one_all() -> None:
    traces = [trace(0), trace(1, source="rescue")]
    assert select_traces(traces, max_rescue_share=0.0) == traces[:1]
    assert select_traces(traces, max_rescue_share=1.0) == traces
