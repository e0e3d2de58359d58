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


def are_few(solved: float, examples: int, enough: int) -> bool:
    """Whether so many solved examples are too few to learn from them alone: fewer than half, and than `enough` (0: any
    number)."""
    return solved < min(enough or examples, examples / 2)


def with_near_misses(traces: TraceSet, enough: int = 0) -> TraceSet:
    """Of the examples that no run solved, the runs that score at least the mean of all first runs have passed too, and
    that mean is the set's `mark`. Where none is solved and hardly any example has such a run, it is the median, if that
    is lower. As it is where the metric does not grade, where all runs score the same, and where `enough` examples are
    solved (0: any number) or half of them."""
    solved = {trace.index for trace in traces.passing}
    if not are_few(len(solved), traces.examples, enough):
        return traces
    graded = [t for t in traces.traces if t.index not in solved and t.reason == BELOW_THRESHOLD and t.score > 0]
    if len({trace.score for trace in traces.traces}) < 2 or not graded:
        return traces
    firsts = [trace.score for trace in traces.traces if not trace.attempt]
    mark = fmean(firsts)
    better = [trace for trace in graded if reaches(trace.score, mark)]
    if not solved and len({trace.index for trace in better}) < FEW * traces.examples:
        # Nearly all score the same, and a few that score more lift the mean above that.
        mark = min(mark, median(firsts))
        better = [trace for trace in graded if reaches(trace.score, mark)]
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
