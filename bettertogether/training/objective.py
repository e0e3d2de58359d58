"""What a training lowers: an objective gives the loss of each step, and of the rows held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .config import TrainingConfig
from .held_out import HeldOutLosses, held_out_losses
from .packing import TokenizedRow
from .stepper import Stepper
from .weighting import TokenWeights


class StepLoss(Protocol):
    """The loss of an optimizer step, of which a forward pass has a part."""

    def losses(self, rows: Sequence[TokenizedRow], losses_N: Tensor) -> tuple[Tensor, Tensor]:
        """The part of rows whose completion tokens have the losses [N]: a scalar to go backward from, and what is told
        of it [1], without gradients. The parts of all passes add up."""


class Objective(Protocol):
    """What a training lowers."""

    def prepared(self, rows: Sequence[TokenizedRow]) -> Sequence[TokenizedRow]:
        """The rows with what has to be known of them before the first step."""

    def of_step(self, rows: Sequence[TokenizedRow]) -> StepLoss:
        """The loss of a step over these rows."""

    def held_out(self, rows: Sequence[TokenizedRow]) -> HeldOutLosses:
        """The losses of rows that are held out."""


@dataclass(frozen=True)
class RowObjective:
    """The cross-entropy of the rows' answers."""

    stepper: Stepper
    training: TrainingConfig

    def prepared(self, rows: Sequence[TokenizedRow]) -> Sequence[TokenizedRow]:
        """The rows themselves."""
        return rows

    def of_step(self, rows: Sequence[TokenizedRow]) -> TokenWeights:
        """The mean over the tokens of a step."""
        return TokenWeights.of(rows, self.training.skeleton_weight, self.training.balance_fields)

    def held_out(self, rows: Sequence[TokenizedRow]) -> HeldOutLosses:
        """The mean losses of rows."""
        return held_out_losses(self.stepper, rows, by_field=self.training.balance_fields)
