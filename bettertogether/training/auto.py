"""What "auto" stands for in a `TrainingConfig`: learning rate by the model's width, length by the number of rows.
No torch here."""

from __future__ import annotations

import math
from dataclasses import replace

from .config import TrainingConfig

RATE_AT_WIDTH = (5e-4, 2000)
PAIR_RATE_AT_WIDTH = (1e-4, 4096)
RATE_EXPONENT = 0.781
MEASURED_STEPS = 200
"""Optimizer steps on few rows, at most, where rows held out say when to stop: a label of three that four numbers tell
apart took 30 to 100."""
BLIND_STEPS = 30
"""Where nothing is held out that could say so."""
LEAST_EPOCHS, MOST_EPOCHS = 2, 40
ENOUGH_STEPS = 1000
"""Rows that give so many steps are gone through once."""


def auto_learning_rate(hidden_size: int, pairs: bool = False) -> float:
    """The peak learning rate for LoRA on a model of this width: 1.3e-3 at 576, 2.9e-4 at 4096; of pairs 4.6e-4 and
    1e-4.

    The rule of thinking machines' tinker-cookbook (`hyperparam_utils.py`) for alpha 32: ten times that of full
    fine-tuning, which falls with a power of the width. A preference takes 1e-5 in full fine-tuning of 7B parameters.
    """
    rate, width = PAIR_RATE_AT_WIDTH if pairs else RATE_AT_WIDTH
    return rate * float(width / hidden_size) ** RATE_EXPONENT


def auto_policy_rate(hidden_size: int) -> float:
    """The same for learning from rewards: a tenth. A reward says little of which token earned it, so that each step
    goes in a direction that is mostly noise."""
    return auto_learning_rate(hidden_size) / 10


def auto_epochs(rows: int, batch_size: int, held_out: bool = True) -> int:
    """Passes over the rows, at most: as many as make the steps above, within bounds. `held_out`: whether there are rows
    whose loss can end the training earlier."""
    steps = math.ceil(rows / batch_size)
    if steps >= ENOUGH_STEPS:
        return 1
    most = MEASURED_STEPS if held_out else BLIND_STEPS
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(most / steps)))


def resolved(
    training: TrainingConfig, hidden_size: int, rows: int, held_out: bool = True, pairs: bool = False
) -> TrainingConfig:
    """The configuration with numbers in place of "auto"; of the epochs, the most that there may be. `pairs`: the rows
    are pairs."""
    rate, epochs = training.learning_rate, training.epochs
    return replace(
        training,
        learning_rate=auto_learning_rate(hidden_size, pairs) if rate == "auto" else rate,
        epochs=auto_epochs(rows, training.batch_size, held_out) if epochs == "auto" else epochs,
    )
