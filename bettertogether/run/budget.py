"""A limit on what a compile run may use, and the meter that holds a run to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..callbacks import events
from ..checks import with_plain_numbers
from ..errors import BudgetExceeded, ConfigError, UnknownPriceError
from ..records import Ledger

_LIMITS = {"minutes": ("minutes", 1), "metric_calls": ("metric calls", 0), "tokens": ("tokens", 0), "cost": ("USD", 4)}
"""Name to unit and decimals; whole numbers where there are none."""


@dataclass(frozen=True)
class Budget:
    """Limits of a run; None is no limit. Checked between units of work, so a run overshoots by what is under way then:
    one unit, or as many as run at once (`num_threads`). What earlier calls with the same `run_dir` used counts, also
    for steps that failed or that Ctrl-C or the budget cut off; what a killed process used since its last step, and what
    was under way at Ctrl-C, is not known."""

    minutes: float | None = None
    """Wall time in minutes."""
    metric_calls: int | None = None
    """Calls of the metric. A run of the program that ends before its metric is called, as one whose answer can't be
    parsed, counts as one, too: one that always fails would have no end. `run.json` has them so in `spent`; records and
    reports have the calls that were made."""
    tokens: int | None = None
    """Prompt, generated and trained tokens together."""
    cost: float | None = None
    """US dollars for the answers of paid LMs, see `Ledger.cost`. An LM whose price is not known is an UnknownPriceError
    at its first answer; within a step it ends the run as any step that fails does (`on_step_error`)."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        for name, (_, decimals) in _LIMITS.items():
            value = getattr(self, name)
            kinds = int | float if decimals else int
            if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and value > 0):
                continue
            number = "a number" if decimals else "a whole number"
            raise ConfigError(f"Budget({name}={value!r}) is not allowed: give {number} above 0, or None for no limit.")

    def start(self, spent: Ledger = Ledger(), *, clock: Callable[[], float] = time.monotonic) -> BudgetMeter:
        """A meter whose clock runs from now on. `spent` is what earlier sittings used, their seconds included."""
        return BudgetMeter(self, spent, clock=clock)


class BudgetMeter:
    """What a run has used of its budget. Safe to use from many threads."""

    def __init__(
        self, budget: Budget, spent: Ledger = Ledger(), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget
        self._is_limited = budget != Budget()
        self._clock = clock
        self._started_s = clock() - spent.seconds
        self._charged = spent
        self._lock = threading.Lock()

    def charge(self, ledger: Ledger) -> None:
        """Add work that was done. Its seconds don't count: the meter's own clock has them."""
        with self._lock:
            self._charged += ledger

    @property
    def used(self) -> Ledger:
        """Everything charged so far, with the wall time since the start."""
        with self._lock:
            return self._charged.with_seconds(self._clock() - self._started_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until the budget's minutes are over; None where they aren't limited."""
        return None if self.budget.minutes is None else max(0.0, 60 * self.budget.minutes - self.used.seconds)

    def check(self) -> None:
        """Raise BudgetExceeded when a limit is reached; the message has what was used and the limits. Raise
        UnknownPriceError where the cost is limited and not known."""
        if not self._is_limited:
            return
        used = self.used
        amounts = {"minutes": used.seconds / 60, "metric_calls": used.metric_calls, "tokens": used.tokens}
        if self.budget.cost is not None:
            amounts["cost"] = _known(used.cost, self.budget.cost)
        limits = {name: limit for name in amounts if (limit := getattr(self.budget, name)) is not None}
        if not any(amounts[name] >= limit for name, limit in limits.items()):
            return
        parts = [
            f"{amounts[name]:,.{decimals}f} of {limits[name]:,} {unit}"
            for name, (unit, decimals) in _LIMITS.items()
            if name in limits
        ]
        raise BudgetExceeded(f"The budget is used up: {', '.join(parts)}.")


def _known(cost: float | None, limit: float) -> float:
    if cost is None:
        raise UnknownPriceError(
            f"Budget(cost={limit!r}) is not allowed here: an LM was called whose price DSPy does not know (it has "
            'LiteLLM\'s, and none with its histories off; only "local/..." models cost nothing). Bound tokens, '
            "metric_calls or minutes instead."
        )
    return cost


class BudgetWatch(events.Callback):
    """Charges the meter as work is done and stops it between two units when the budget is used up."""

    def __init__(self, meter: BudgetMeter) -> None:
        self._meter = meter
        self._spent, self._started_s = Ledger(), time.monotonic()

    @property
    def spent(self) -> Ledger:
        """Since it was made, without what only counts as a call of the metric."""
        return self._spent.with_seconds(time.monotonic() - self._started_s)

    def on_progress(self, event: events.ProgressEvent) -> None:
        if event["done"]:
            ledger = event.get("ledger") or Ledger()
            if not ledger.metric_calls:
                # It counts as a call, and was none.
                self._meter.charge(Ledger(metric_calls=1))
            self._charge_and_check(ledger)

    def on_training(self, event: events.TrainingEvent) -> None:
        self._charge_and_check(Ledger(trained_tokens=event["progress"].new_tokens))

    def _charge_and_check(self, ledger: Ledger) -> None:
        self.charge(ledger)
        self._meter.check()

    def charge(self, ledger: Ledger) -> None:
        """Add work that was done, without a look at the budget."""
        self._spent += ledger
        self._meter.charge(ledger)
