"""What the LM calls of a run used."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.utils.usage_tracker import UsageTracker

from ..records import Ledger, total_cost
from .watching import Record


def hand_on_usage(tracker: UsageTracker, prediction: Any) -> None:
    """To DSPy's tracker outside of the run, and to the prediction, as DSPy would have."""
    if dspy.settings.track_usage and isinstance(prediction, dspy.Prediction):
        prediction.set_lm_usage(tracker.get_total_tokens())
    outer = dspy.settings.usage_tracker
    if outer:
        for model, entries in tracker.usage_data.items():
            for entry in entries:
                outer.add_usage(model, entry)


def used(record: Record, calls: int) -> Ledger:
    """The cost of a run that made so many calls."""
    entries = [entry for model_entries in record.tracker.usage_data.values() for entry in model_entries]
    return Ledger(
        program_calls=1,
        lm_calls=max(calls, len(entries)),
        cache_hits=max(0, calls - len(entries)),
        prompt_tokens=sum(int(entry.get("prompt_tokens") or 0) for entry in entries),
        generated_tokens=sum(int(entry.get("completion_tokens") or 0) for entry in entries),
        cost=total_cost(record.costs),
    )
