"""What a training on rows lowers: the loss of each step, and of the rows held out. `preference` has that of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import TrainingConfig
from .held_out import HeldOutLosses, held_out_losses
from .packing import TokenizedRow
from .stepper import Stepper
from .weighting import TokenWeights


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
