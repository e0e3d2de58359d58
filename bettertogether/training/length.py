"""How long a training run may take, said before it begins, and why it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean

from ..printable import get_logger
from .config import TrainingConfig
from .progress import TrainingProgress

TIMED_STEPS = 4
"""Optimizer steps after which the time of the whole run is foretold; the first is slower than the others."""

FALL = 0.01
"""A held-out loss is lower when it fell by this share of what it was before training. Less says nothing: where all rows
held out are answered right, it goes on falling towards 0 for ever."""
NEARLY_ZERO = 0.04
"""A loss below this share of what it was before training has hardly anything left to fall by."""

PLATEAU_STEPS = 40
"""Optimizer steps for which a loss may stay where it is, neither falling nor rising. A model that learns to tell labels
apart first learns how often each occurs, and stays there for some 20 to 60 steps."""

logger = get_logger(__name__)


def told_held_out(history: Sequence[TrainingProgress]) -> list[float]:
    """The held-out loss before training, then after each epoch."""
    return [line.validation_loss for line in history if line.validation_loss is not None]


def epochs_without_fall(losses: Sequence[float]) -> int:
    """How many of the last epochs brought no lower held-out loss; `losses` before training, then after each epoch."""
    return len(_since_low(losses))


def has_settled(losses: Sequence[float], trained: float, steps_per_epoch: int, patience: int) -> bool:
    """Whether more epochs won't lower the held-out loss: `patience` of them brought no fall, and it rose in all of them
    as rows were learned by heart, or it has hardly anything left to fall by, or there was none for `PLATEAU_STEPS`.

    `trained`: the mean loss of the last epoch's steps. Where that is no lower than the held-out loss ever was, nothing
    is learned by heart yet: a rise is the noise of a plateau.
    """
    since = _since_low(losses)
    if len(since) < patience:
        return False
    low, least = min(losses[1:]), FALL * losses[0]
    by_heart = trained < low < min(since[-patience:]) - least
    return by_heart or low < NEARLY_ZERO * losses[0] or len(since) * steps_per_epoch >= PLATEAU_STEPS


def _since_low(losses: Sequence[float]) -> list[float]:
    """The losses of the epochs after the last that brought a lower one."""
    low, since = math.inf, list[float]()
    for loss in losses[1:]:
        if loss < low - FALL * losses[0]:
            low, since = loss, []
        else:
            since.append(loss)
    return since


class RunLength:
    """The bounds of a run. `asked` is the configuration as it was given, with "auto" in it; `epochs` the bound."""

    def __init__(self, asked: TrainingConfig, epochs: int, rows: int, held_out: bool) -> None:
        self.epochs = epochs
        self.steps_per_epoch = math.ceil(rows / asked.batch_size)
        self.total_steps = self.steps_per_epoch * epochs
        self.held_out_seconds = 0.0
        """What measuring the held-out loss took."""
        self._rows, self._max_minutes = rows, asked.max_minutes
        self._patience = asked.patience if asked.epochs == "auto" and asked.keep_best and held_out else None
        self._steps, self._first_step_done = 0, 0.0

    @property
    def fewest_epochs(self) -> int:
        """After which it ends where the held-out loss never falls."""
        return self.epochs if self._patience is None else min(self.epochs, 1 + self._patience)

    def announce(self) -> None:
        """Say what the run takes at most, before it begins."""
        minutes = "" if self._max_minutes is None else f", {self._max_minutes:g} minutes"
        patience = ""
        if self._patience is not None:
            patience = f"; ends {self._patience} epochs or more after the last lower held-out loss"
        logger.info(
            "Training on %d rows: at most %d epochs, %d steps%s%s.",
            self._rows,
            self.epochs,
            self.total_steps,
            minutes,
            patience,
        )

    def step_done(self, step: int, seconds: float) -> None:
        """After each step of this sitting; `seconds` since the run began. Says, once, how long it will take at most."""
        self._steps, now = self._steps + 1, time.perf_counter()
        if self._steps == 1:
            self._first_step_done = now
        if self._steps != TIMED_STEPS:
            return
        per_step = (now - self._first_step_done) / (TIMED_STEPS - 1)
        measures = self.epochs - (step - 1) // self.steps_per_epoch
        expected = seconds + per_step * (self.total_steps - step) + measures * self.held_out_seconds
        if self._max_minutes is not None:
            expected = min(expected, 60 * self._max_minutes)
        logger.info("The training takes about %.1f minutes at most (%.2f s a step).", expected / 60, per_step)

    def too_long(self, seconds: float) -> bool:
        """Whether the time is over."""
        return self._max_minutes is not None and seconds > 60 * self._max_minutes

    def next_too_long(self, epoch: int, seconds: float) -> bool:
        """Whether another epoch, as long as the `epoch` before it, would end after the time is over."""
        return self.too_long(seconds * (epoch + 1) / epoch)

    def lost_patience(self, history: Sequence[TrainingProgress]) -> bool:
        """Whether the held-out loss has not fallen for too long, after a whole epoch."""
        if self._patience is None:
            return False
        trained = [line.loss for line in history[-1 - self.steps_per_epoch :] if line.loss is not None]
        return has_settled(told_held_out(history), fmean(trained), self.steps_per_epoch, self._patience)

    def say_why(self, epoch: int, history: Sequence[TrainingProgress], step: int) -> None:
        """Say why the run has ended before its last epoch."""
        if self.lost_patience(history):
            reason = f"no lower held-out loss since epoch {epoch - epochs_without_fall(told_held_out(history))}"
        elif step < epoch * self.steps_per_epoch:
            reason = f"max_minutes={self._max_minutes:g} are over, within the first epoch"
        else:
            reason = f"another epoch would pass max_minutes={self._max_minutes:g}"
        logger.info("Training ends after %d of %d steps: %s.", step, self.total_steps, reason)
