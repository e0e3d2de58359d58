"""What the LM calls of a run, of a metric or of an optimizer used."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.usage_tracker import UsageTracker

from ..records import Ledger, total_cost
from .failures import error_text, lm_advice


class Bill(BaseCallback):
    """Counts the answers of LMs, and leaves those who ask alone. As one of DSPy's `caller_modules` it is told each."""

    def __init__(self) -> None:
        self.answers = 0
        """Of which it was told."""
        self.costs: list[float | None] = []
        """In US dollars, of each that was paid; None where DSPy knows no price."""
        self._calls = 0
        self._usages: list[Mapping[str, Any]] = []
        self._lock = threading.Lock()
        self.history = self

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        with self._lock:
            self._calls += exception is None

    def __len__(self) -> int:
        """As a history, none of whose entries is to be dropped."""
        return 0

    def append(self, entry: Mapping[str, Any]) -> None:
        """As a history."""
        with self._lock:
            self.answers += 1
        # Those of DSPy's cache have none.
        if entry["usage"]:
            self._usages.append(entry["usage"])
            # Entries of DSPy's TypeSafe name neither.
            if not _is_free(entry.get("model")):
                self.costs.append(entry.get("cost"))

    def add(self, other: Bill) -> None:
        """What another was told, but for its calls, which callbacks tell."""
        with self._lock:
            self.answers += other.answers
        self.costs += other.costs
        self._usages += other._usages

    @property
    def ledger(self) -> Ledger:
        """Of all of them. Where DSPy's histories are off, only their number is known, and the cost is None."""
        calls = self._calls
        if calls and (dspy.settings.disable_history or dspy.settings.max_history_size == 0):
            return Ledger(lm_calls=calls, cost=None)
        return _ledger(calls, self._usages, self.costs)


class Refusals(BaseCallback):
    """Counts the LM calls that failed."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}
        """Of calls that did not end yet, by id."""
        self._ended: dict[str, Counter[str | None]] = defaultdict(Counter)
        """Of each model: how often its calls raised which error; None: those that were answered."""
        self._lock = threading.Lock()

    def on_lm_start(self, call_id: str, instance: Any, inputs: Any) -> None:
        self._models[call_id] = str(getattr(instance, "model", type(instance).__name__))

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        model = self._models.pop(call_id)
        said = None if exception is None else error_text(exception)
        with self._lock:
            self._ended[model][said] += 1

    def told(self) -> list[str]:
        """What to say of each model of whose calls more than half failed."""
        said = []
        with self._lock:  # Threads that were left behind may still add to it.
            ended_of = {model: ended.copy() for model, ended in self._ended.items()}
        for model, ended in ended_of.items():
            errors = Counter({text: count for text, count in ended.items() if text is not None})
            failed, calls = errors.total(), ended.total()
            if 2 * failed > calls:
                reason = errors.most_common(1)[0][0]
                told = f"{failed} of {calls} calls of {model} failed (most often {reason})."
                said.append(" ".join(filter(None, (told, lm_advice(reason)))))
        return said


class SharedTracker(UsageTracker):
    """A count of tokens that DSPy does not copy for each of its threads."""

    def __deepcopy__(self, memo: Any) -> SharedTracker:
        return self


@contextmanager
def billed() -> Iterator[Bill]:
    """The bill of what is asked within the block. A tracker of DSPy's outside of it is told at its end."""
    bill, callers = Bill(), dspy.settings.caller_modules or []
    outer, tracker = dspy.settings.usage_tracker, SharedTracker()
    options = {"usage_tracker": tracker} if outer is not None else {}
    with dspy.context(callbacks=[*dspy.settings.callbacks, bill], caller_modules=[*callers, bill], **options):
        try:
            yield bill
        finally:
            _tell(outer, tracker)


def hand_on_usage(bill: Bill, tracker: UsageTracker, prediction: Any) -> None:
    """To DSPy's tracker and to bills outside of the run, and to the prediction, as DSPy would have."""
    if dspy.settings.track_usage and isinstance(prediction, dspy.Prediction):
        prediction.set_lm_usage(tracker.get_total_tokens())
    _tell(dspy.settings.usage_tracker, tracker)
    for caller in dspy.settings.caller_modules or []:
        if isinstance(caller, Bill):
            caller.add(bill)


def _tell(outer: UsageTracker | None, tracker: UsageTracker) -> None:
    if outer is None:
        return
    # Threads that were left behind may still add to it.
    for model, entries in list(tracker.usage_data.items()):
        for entry in entries:
            outer.add_usage(model, entry)


def used(bill: Bill, tracker: UsageTracker, calls: int, *, is_told: bool) -> Ledger:
    """What a run used that made so many calls; `is_told` is whether DSPy's histories are on, which tell the bill of
    answers of LMs that are none of the predictors'. The cost is None where it misses paid ones for that."""
    usages = [usage for of_model in tracker.usage_data.values() for usage in of_model]
    paid = sum(len(of_model) for model, of_model in tracker.usage_data.items() if not _is_free(model))
    missing: list[float | None] = [] if is_told else [None] * (paid - len(bill.costs))
    return replace(_ledger(max(calls, bill.answers), usages, [*bill.costs, *missing]), program_calls=1)


def _is_free(model: Any) -> bool:
    """Whether it is a model of this machine."""
    return str(model).startswith("local/")


def _ledger(calls: int, usages: Sequence[Mapping[str, Any]], costs: Sequence[float | None]) -> Ledger:
    """Of so many calls; those without usage were answered by the cache."""
    return Ledger(
        lm_calls=max(calls, len(usages)),
        cache_hits=max(0, calls - len(usages)),
        prompt_tokens=sum(int(usage.get("prompt_tokens") or 0) for usage in usages),
        generated_tokens=sum(int(usage.get("completion_tokens") or 0) for usage in usages),
        cost=total_cost(costs),
    )
