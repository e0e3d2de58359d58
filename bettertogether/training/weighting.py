"""How much each completion token of an optimizer step counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import TokenizedRow


@dataclass(frozen=True)
class TokenWeights:
    """1 for a token that the answer's grammar leaves free, `skeleton` for one that it forces.

    Means are over all tokens of the step, of which a forward pass has a part: the parts add up to them. In a step
    without any free token all tokens count alike.
    """

    skeleton: float
    total: float
    """Weight of all tokens of the step."""
    free: int
    """Number of its free tokens; 0: there are none, and all are taken for free."""

    @classmethod
    def of(cls, rows: Sequence[TokenizedRow], skeleton: float) -> TokenWeights:
        """The weights of a step over these rows."""
        tokens = sum(len(row.completion_ids) for row in rows)
        free = sum(map(sum, (row.free for row in rows)))
        return cls(skeleton, free + skeleton * (tokens - free) if free else tokens, free)

    def free_tokens(self, rows: Iterable[TokenizedRow]) -> Tensor:
        """Which completion tokens of some rows of the step are free, N booleans."""
        return torch.tensor([free or not self.free for row in rows for free in row.free])

    def mean(self, losses_N: Tensor, free_N: Tensor) -> Tensor:
        """The part of the weighted mean, a scalar."""
        return losses_N.where(free_N, losses_N * self.skeleton).sum() / self.total

    def free_mean(self, losses_N: Tensor, free_N: Tensor) -> Tensor:
        """The part of the mean over the free tokens, a scalar."""
        return losses_N[free_N].sum() / (self.free or self.total)
