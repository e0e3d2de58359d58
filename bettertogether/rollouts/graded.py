"""Which runs to learn from where a metric grades and hardly any run gets its full mark.

Rejection sampling by rank (RAFT, arXiv 2304.06767): what is better than the program's average teaches it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .metrics import BELOW_THRESHOLD, EQUAL

if TYPE_CHECKING:
    from .traces import Trace, TraceSet


def with_above_average(traces: TraceSet, enough: int = 0) -> TraceSet:
    """Of the examples that no run solved, the runs that score above the mean of all first runs have passed too, and
    that mean is the set's `mark`. As it is where the metric does not grade, where no run is above the mean, and where
    `enough` examples are solved (0: any number) or half of them."""
    solved = {trace.index for trace in traces.passing}
    if len(solved) >= min(enough or traces.examples, traces.examples / 2):
        return traces
    firsts = [trace.score for trace in traces.traces if not trace.attempt]
    mean = sum(firsts) / len(firsts)
    better = {
        id(trace): replace(trace, verdict=replace(trace.verdict, passed=True, reason=None))
        for trace in traces.traces
        if trace.index not in solved and trace.reason == BELOW_THRESHOLD and trace.score > mean + EQUAL
    }
    if not better:
        return traces

    def taken(trace: Trace) -> Trace:
        return better.get(id(trace), trace)

    points = (
        replace(point, run=taken(point.run), branches=tuple(map(taken, point.branches))) for point in traces.branches
    )
    return replace(traces, traces=tuple(map(taken, traces.traces)), branches=tuple(points), mark=mean)
