"""What a training tells while it runs. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """One line of a training run, sent to the `on_progress` callback and kept in `FinetuneResult.history`."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    epoch: float
    """Passes over the rows done; 0.5 is half of the first."""
    loss: float | None
    """Mean loss of this step's completion tokens, those that the answer's grammar leaves free; of pairs, the mean loss
    of a pair. None on a line that only reports `validation_loss`."""
    validation_loss: float | None
    """The same of the validation rows: at step 0 and at the end of each epoch, else None."""
    tokens: int
    """Tokens trained on so far (forward tokens, as packed)."""
    learning_rate: float
    validation_error: float | None = None
    """Where there is a `validation_loss` of rows: the mean probability of another token than the row's, of the same
    tokens. It chooses the epoch."""
    new_tokens: int = 0
    """Of `tokens`, those of this line's step; 0 on a line that only reports `validation_loss`. A training that goes on
    sends the lines of its new steps alone: their sum is what it trained since."""


ProgressFunction = Callable[[TrainingProgress], None]


@dataclass(frozen=True)
class PolicyUpdate:
    """What the updates of a step came to."""

    loss: float
    """Before the weights changed."""
    kl: float | None
    """Nats per free token by which the policy was away from the reference; None where `kl_weight` is 0."""
    learning_rate: float
    tokens: int
    """Run through the model, shared prompts once."""
