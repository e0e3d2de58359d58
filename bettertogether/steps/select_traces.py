"""Which of the passing traces rows and demos are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..rollouts.labels import stratified_order
from ..rollouts.metrics import EQUAL, FULL_MARK, passes
from ..rollouts.traces import Trace

NO_CALLS = "no calls to learn from"
"""Why a passing trace is left out: the program answered by itself, or its calls were not seen."""

OVER_SHARE = "over max_rescue_share"
"""Why a rescued trace is left out."""


def select_traces(
    traces: Iterable[Trace],
    *,
    max_per_example: int = 2,
    max_rescue_share: float = 1.0,
    near_misses: bool = False,
    dropped: Counter[str] | None = None,
) -> list[Trace]:
    """The passing traces to learn from: one of each kind of content, at most `max_per_example` of an example (those of
    the highest score first, of equal ones its own first and rescued last), rescued ones at most this share of all.
    `near_misses`: some passed below the full mark, of which only the best of an example teaches. `dropped` counts the
    passing ones left out."""
    counts = Counter() if dropped is None else dropped
    kept: list[Trace] = []
    seen: dict[int, set[str]] = {}
    for trace in sorted(traces, key=lambda trace: (trace.index, -trace.score)):
        if not trace.passed:
            continue
        if not trace.calls:
            counts[NO_CALLS] += 1
            continue
        content = repr([(call.predictor, sorted(call.outputs.items())) for call in trace.calls])
        known = seen.setdefault(trace.index, set())
        if content in known:
            counts["same as another of its example"] += 1
        elif len(known) >= (1 if near_misses and not passes(trace.score, FULL_MARK) else max_per_example):
            counts["over max_traces_per_example"] += 1
        else:
            known.add(content)
            kept.append(trace)
    return _limit_rescued(kept, max_rescue_share, counts)


def _limit_rescued(traces: list[Trace], max_share: float, dropped: Counter[str]) -> list[Trace]:
    own = [trace for trace in traces if trace.source != "rescue"]
    rescued = [trace for trace in traces if trace.source == "rescue"]
    room = len(rescued) if max_share >= 1 else int(len(own) * max_share / (1 - max_share) + EQUAL)
    if len(rescued) <= room:
        return traces
    dropped[OVER_SHARE] += len(rescued) - room
    # Spread over the labels, which the head of a sorted trainset would not be.
    chosen = stratified_order(rescued, [trace.label for trace in rescued], seed=0)[:room]
    return sorted([*own, *chosen], key=lambda trace: (trace.index, trace.attempt))


def unseen_calls(runs: int) -> str:
    """What is wrong with a program whose passing runs show no call, and how to mend it."""
    return (
        f"{runs} of the runs that passed made no call that was seen: calls in other processes, in threads that outlive "
        "the run, or by predictors that forward makes and calls in threads, are not. Keep predictors as attributes of "
        "the program, and wait for its threads."
    )
