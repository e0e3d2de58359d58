"""What "auto" stands for in a `TrainingConfig`: learning rate by the model's width, length by the number of rows.
No torch here."""

from __future__ import annotations

import math
from dataclasses import replace

from .config import TrainingConfig

RATE_AT_WIDTH = (5e-4, 2000)
RATE_EXPONENT = 0.781
TARGET_STEPS = 30
"""Optimizer steps on few rows, at a learning rate that falls to 0 over them. Where a training ended before the rate had
fallen, the weights answered well under one prompt and worse under others."""
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


def auto_epochs(rows: int, batch_size: int) -> int:
    """Passes over the rows, at most: as many as make `TARGET_STEPS` optimizer steps, within bounds."""
    steps = math.ceil(rows / batch_size)
    if steps >= ENOUGH_STEPS:
        return 1
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(TARGET_STEPS / steps)))


def resolved(training: TrainingConfig, hidden_size: int, rows: int) -> TrainingConfig:
    """The configuration with numbers in place of "auto"; of the epochs, the most that there may be."""
    rate, epochs = training.learning_rate, training.epochs
    return replace(
        training,
        learning_rate=auto_learning_rate(hidden_size) if rate == "auto" else rate,
        epochs=auto_epochs(rows, training.batch_size) if epochs == "auto" else epochs,
    )
