"""What "auto" stands for in a `TrainingConfig`: learning rate by the model's width, length by the number of rows.
No torch here."""

from __future__ import annotations

import math
from dataclasses import replace

from .config import TrainingConfig

RATE_AT_WIDTH = (5e-4, 2000)
RATE_EXPONENT = 0.781
TARGET_STEPS = 100
"""Optimizer steps that a training may take on few rows. Where a text has to be judged, the held-out loss is lowest
after 6 to 24 of them, and `patience` ends the training; where numbers have to be compared, it still falls after 40."""
UNWATCHED_STEPS = 30
"""And so many without a held-out loss, which nothing would end."""
LEAST_EPOCHS, MOST_EPOCHS = 2, 15
ENOUGH_STEPS = 1000
"""Rows that give so many steps are gone through once."""


def auto_learning_rate(hidden_size: int) -> float:
    """The peak learning rate for LoRA on a model of this width: 1.3e-3 at 576, 2.9e-4 at 4096.

    The rule of thinking machines' tinker-cookbook (`hyperparam_utils.py`) for alpha 32: ten times that of full
    fine-tuning, which falls with a power of the width.
    """
    rate, width = RATE_AT_WIDTH
    return rate * float(width / hidden_size) ** RATE_EXPONENT


def auto_epochs(rows: int, batch_size: int, watched: bool) -> int:
    """Passes over the rows, at most: as many as make `TARGET_STEPS` optimizer steps, or `UNWATCHED_STEPS` where no
    held-out loss is `watched`, within bounds."""
    steps = math.ceil(rows / batch_size)
    if steps >= ENOUGH_STEPS:
        return 1
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil((TARGET_STEPS if watched else UNWATCHED_STEPS) / steps)))


def resolved(training: TrainingConfig, hidden_size: int, rows: int, watched: bool) -> TrainingConfig:
    """The configuration with numbers in place of "auto"; of the epochs, the most that there may be. `watched`: whether
    there are rows held out."""
    rate, epochs = training.learning_rate, training.epochs
    return replace(
        training,
        learning_rate=auto_learning_rate(hidden_size) if rate == "auto" else rate,
        epochs=auto_epochs(rows, training.batch_size, watched) if epochs == "auto" else epochs,
    )
