"""What "auto" stands for in a `TrainingConfig`, by the model's width and the number of rows. No torch here."""

from __future__ import annotations

from dataclasses import replace

from .config import TrainingConfig

LEARNING_RATE = 2e-4
EPOCHS = 3


def resolved(training: TrainingConfig, hidden_size: int, rows: int) -> TrainingConfig:
    """The configuration with numbers in place of "auto"; of the epochs, the most that there may be."""
    rate = LEARNING_RATE if training.learning_rate == "auto" else training.learning_rate
    epochs = EPOCHS if training.epochs == "auto" else training.epochs
    return replace(training, learning_rate=rate, epochs=epochs)
