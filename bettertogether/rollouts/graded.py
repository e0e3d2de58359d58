"""Which runs to learn from where a metric grades and hardly any run gets its full mark.

Rejection sampling by rank (RAFT, arXiv 2304.06767): of an example's runs the best teaches, if it is no worse than the
program's average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING

from .metrics import BELOW_THRESHOLD, reaches

if TYPE_CHECKING:
    from .traces import Trace, TraceSet


FEW = 0.25
"""A smaller share of the examples than this is too few to learn from."""


def with_near_misses(traces: TraceSet, enough: int = 0) -> TraceSet:
    """Of the examples that no run solved, the runs that score at least what the first runs do on average have passed
    too, and that average is the set's `mark`: the mean, or where hardly any example has such a run, the median. As it
    is where the metric does not grade, where all runs score the same, and where `enough` examples are solved (0: any
    number) or half of them."""
    solved = {trace.index for trace in traces.passing}
    if len(solved) >= min(enough or traces.examples, traces.examples / 2):
        return traces
    graded = [t for t in traces.traces if t.index not in solved and t.reason == BELOW_THRESHOLD and t.score > 0]
    if len({trace.score for trace in traces.traces}) < 2 or not graded:
        return traces
    firsts = [trace.score for trace in traces.traces if not trace.attempt]
    for mark in (fmean(firsts), median(firsts)):
        better = [trace for trace in graded if reaches(trace.score, mark)]
        if len({trace.index for trace in better}) >= FEW * traces.examples:
            break
    return _passed(traces, better, mark) if better else traces


def _passed(traces: TraceSet, better: Sequence[Trace], mark: float) -> TraceSet:
    """The set in which these runs have passed."""
    passed = {id(each): replace(each, verdict=replace(each.verdict, passed=True, reason=None)) for each in better}

    def taken(trace: Trace) -> Trace:
        return passed.get(id(trace), trace)

    points = (
        replace(point, run=taken(point.run), branches=tuple(map(taken, point.branches))) for point in traces.branches
    )
    return replace(traces, traces=tuple(map(taken, traces.traces)), branches=tuple(points), mark=mark)
