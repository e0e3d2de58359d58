"""What was left out of the rows to train on, and what to do for more of them."""

from __future__ import annotations

from collections import Counter

import dspy

from ..rollouts.failures import NOT_RAISED, advice, commonest, count_failures, cuts
from ..rollouts.metrics import BELOW_THRESHOLD
from ..rollouts.traces import TraceSet
from ..rollouts.tries import MOST_TRIES
from .data_card import WHOLE_TRACE
from .prompt_capture import OTHERWISE, UNREADABLE
from .select_traces import NO_CALLS, OVER_SHARE, unseen_calls

CUT = "cut at max_tokens"

OWN_DEMO = "the demos that the call was given show its own inputs"

Dropped = Counter[tuple[str, str]]
"""What was left out: (predictor, or `WHOLE_TRACE`; reason) to how often."""


def own_demos(dropped: Dropped) -> list[str]:
    """What to do where no other reason left out more calls of the chosen traces."""
    answers: Counter[str] = Counter()
    for (name, reason), count in dropped.items():
        if name != WHOLE_TRACE:
            answers[reason] += count
    if not answers[OWN_DEMO] or answers[OWN_DEMO] < max(answers.values()):
        return []
    return [
        f"Nothing is learned from calls that were given their own example as a demo ({answers[OWN_DEMO]} answers): "
        "leave the example itself out of the search (dspy.KNN), or let it search other data."
    ]


def longer_answers(traces: TraceSet) -> list[str]:
    """What to do first where most answers were cut."""
    cut = cuts(traces.traces)
    return ["Most answers were cut: give the LM a larger max_tokens first."] if 2 * sum(cut) > len(cut) else []


def more_rows(traces: TraceSet, dropped: Dropped, *, balance: bool) -> str:
    """How rows of other labels come about, by what was not done yet."""
    left = [*_more_tries(traces, dropped), *([] if balance else ["balance=True"])]
    tries = [f"Try {', '.join(left)}."] if left else []
    return " ".join([*longer_answers(traces), *tries]) or "Give more examples."


def no_rows(traces: TraceSet, dropped: Dropped, *, prompted: bool) -> str:
    """What the runs came to, of which no row is left, and what to try."""
    others = {key: count for key, count in dropped.items() if key != (WHOLE_TRACE, NO_CALLS)}
    reasons = "; ".join(f"{count} x {reason}" for (_, reason), count in others.items()) or NO_CALLS
    runs = dropped.get((WHOLE_TRACE, NO_CALLS))
    unseen = f" {unseen_calls(runs)}" if runs else ""
    return (
        f"No training rows: {traces.size_text}, {len(traces.passing)} passed. "
        f"Dropped: {reasons}.{unseen} "
        + " ".join([*longer_answers(traces), *own_demos(dropped), _what_to_try(traces, dropped, prompted=prompted)])
    )


def _what_to_try(traces: TraceSet, dropped: Dropped, *, prompted: bool) -> str:
    """What was not done yet, and fits the reasons."""
    most = commonest(count_failures(traces.traces), len(traces.traces))
    if most is not None and most.kind not in NOT_RAISED:
        return advice(most)
    first = f"{advice(most)} " if most is not None else ""
    reasons, sources = {reason for _, reason in dropped}, {trace.source for trace in traces.traces}
    options = ", ".join(_more_tries(traces, dropped))
    things = {
        "run a prompt step first (strategy 'p -> w')": not prompted,
        f"let failing examples be tried again ({options})": bool(options),
        "give a teacher program": "teacher" not in sources,
        "give a lower threshold": BELOW_THRESHOLD in reasons,
        "answer in JSON (dspy.configure(adapter=dspy.JSONAdapter()))": any(map(_is_other_than_json, reasons)),
        "take a larger model": True,
    }
    return f"{first}Things to try: {'; '.join(thing for thing, fits in things.items() if fits)}."


def _is_other_than_json(reason: str) -> bool:
    """Whether this says that an adapter, which is no JSONAdapter, does not read what it wrote."""
    return reason.endswith((UNREADABLE, OTHERWISE)) and not reason.startswith(dspy.JSONAdapter.__name__)


def _more_tries(traces: TraceSet, dropped: Dropped) -> list[str]:
    """The options by which failing examples would give more to learn from, those left out that were in force."""
    sources = {trace.source for trace in traces.traces}
    tried = max((trace.attempt for trace in traces.traces if trace.source == "sample"), default=0)
    failing = len({trace.index for trace in traces.passing}) < traces.examples
    more = {
        f"num_samples={MOST_TRIES}": failing and tried < MOST_TRIES,
        "rescue=True": failing and "rescue" not in sources,
        "max_rescue_share=1.0": any(reason == OVER_SHARE for _, reason in dropped),
    }
    return [option for option, fits in more.items() if fits]
