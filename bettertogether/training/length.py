"""How long a training run may take, said before it begins, and why it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..printable import get_logger
from .config import TrainingConfig
from .progress import TrainingProgress

TIMED_STEPS = 4
"""Optimizer steps after which the time of the whole run is foretold; the first is slower than the others."""

FALL = 0.01
"""What is measured of the rows held out is lower when it fell by this share of what it was before training. Less says
nothing: where all of them are answered right, it goes on falling towards 0 for ever."""
LITTLE_LEFT = 0.15
"""Below this share of what it was before training it has little left to fall by: the labels are told apart. Where they
are not yet (three of them at chance after an answer's form was learned) it is at 0.3 or more."""

BY_HEART = 0.25
"""Rows are learned by heart when the training loss is below this share of the lowest held-out one. Less of a gap is no
sign of it: what can't be foretold in a text is remembered long before labels are told apart."""
PLATEAU_STEPS = 60
"""Optimizer steps for which a loss may stay where it is, neither falling nor rising. A model that learns to tell labels
apart first learns how often each occurs, and stays there for some 20 to 60 steps."""

logger = get_logger(__name__)


def told_held_out(history: Sequence[TrainingProgress]) -> list[list[float]]:
    """Loss of the rows held out, and their error where there is one, before training, then after each epoch."""
    losses = [line.validation_loss for line in history if line.validation_loss is not None]
    errors = [line.validation_error for line in history if line.validation_error is not None]
    return [losses, errors] if errors else [losses]


def has_settled(measured: Sequence[float], by_heart: bool, steps_per_epoch: int, patience: int) -> bool:
    """Whether more epochs won't lower what is measured of the rows held out: `patience` of them brought no fall, and it
    rose in all of them as rows are learned `by_heart`, or it has little left to fall by, or there was none for
    `PLATEAU_STEPS`. Where nothing is learned by heart yet, a rise is the noise of a plateau."""
    since = since_low(measured)
    if len(since) < patience:
        return False
    low, least = min(measured[1:]), FALL * measured[0]
    rose = by_heart and min(since[-patience:]) > low + least
    return rose or low < LITTLE_LEFT * measured[0] or len(since) * steps_per_epoch >= PLATEAU_STEPS


def since_low(measured: Sequence[float]) -> list[float]:
    """What was measured in the epochs after the last that brought a lower one; `measured` before training, then after
    each epoch."""
    low, since = math.inf, list[float]()
    for each in measured[1:]:
        if each < low - FALL * measured[0]:
            low, since = each, []
        else:
            since.append(each)
    return since


def may_lose_patience(asked: TrainingConfig, held_out: bool) -> bool:
    """Whether a run may end before its last epoch because the rows held out are answered no better."""
    return asked.epochs == "auto" and asked.keep_best and held_out


class RunLength:
    """The bounds of a run. `asked` is the configuration as it was given, with "auto" in it; `epochs` the bound."""

    def __init__(self, asked: TrainingConfig, epochs: int, rows: int, held_out: bool) -> None:
        self.epochs = epochs
        self.steps_per_epoch = math.ceil(rows / asked.batch_size)
        self.total_steps = self.steps_per_epoch * epochs
        self.held_out_seconds = 0.0
        """What measuring the held-out loss took."""
        self._rows, self._max_minutes = rows, asked.max_minutes
        self._patience = asked.patience if may_lose_patience(asked, held_out) else None
        self._steps: list[float] = []

    @property
    def fewest_epochs(self) -> int:
        """After which it ends where the held-out loss never falls."""
        return self.epochs if self._patience is None else min(self.epochs, 1 + self._patience)

    def announce(self) -> None:
        """Say what the run takes at most, before it begins."""
        minutes = "" if self._max_minutes is None else f", {self._max_minutes:g} minutes"
        patience = ""
        if self._patience is not None:
            patience = f"; ends {self._patience} epochs or more after the best on the rows held out"
        logger.info(
            "Training on %d rows: at most %d epochs, %d steps%s%s.",
            self._rows,
            self.epochs,
            self.total_steps,
            minutes,
            patience,
        )

    def step_done(self, step: int, took: float, seconds: float) -> None:
        """After each step of this sitting, which `took` so many seconds; `seconds` since the run began. Says, once, how
        long it will take at most."""
        self._steps.append(took)
        if len(self._steps) != TIMED_STEPS:
            return
        per_step = fmean(self._steps[1:])
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
        """Whether neither loss nor error of the rows held out has fallen for too long, after a whole epoch."""
        if self._patience is None:
            return False
        trained = fmean(line.loss for line in history[-1 - self.steps_per_epoch :] if line.loss is not None)
        told = told_held_out(history)
        by_heart = trained < BY_HEART * min(told[0][1:])
        return all(has_settled(measured, by_heart, self.steps_per_epoch, self._patience) for measured in told)

    def say_why(self, epoch: int, history: Sequence[TrainingProgress], step: int) -> None:
        """Say why the run has ended before its last epoch."""
        if self.lost_patience(history):
            waited = min(len(since_low(measured)) for measured in told_held_out(history))
            reason = f"nothing better on the rows held out since epoch {epoch - waited}"
        elif step < epoch * self.steps_per_epoch:
            reason = f"max_minutes={self._max_minutes:g} are over, within the first epoch"
        else:
            reason = f"another epoch would pass max_minutes={self._max_minutes:g}"
        logger.info("Training ends after %d of %d steps: %s.", step, self.total_steps, reason)
