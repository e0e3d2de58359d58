"""How much each completion token of some rows counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import TokenizedRow


def knows_fields(rows: Iterable[TokenizedRow]) -> bool:
    """Whether all rows tell which tokens belong to which output field."""
    return all(row.fields for row in rows)


def free_weights(row: TokenizedRow, by_field: bool) -> list[float]:
    """The weight of each token of a row that is free, 0 for the others: 1 a token, or 1 an output field."""
    if not by_field:
        return [float(free) for free in row.free]
    counts = Counter(name for free, name in zip(row.free, row.fields, strict=True) if free)
    return [1 / counts[name] if free else 0.0 for free, name in zip(row.free, row.fields, strict=True)]


def token_weights(row: TokenizedRow, skeleton: float, by_field: bool) -> list[float]:
    """The weight of each token of a row: a forced one counts `skeleton` of what a free one of its row does."""
    free = free_weights(row, by_field)
    usual = sum(free) / sum(row.free) if any(row.free) else 1 / len(free) if by_field else 1.0
    return [weight or skeleton * usual for weight in free]


@dataclass(frozen=True)
class TokenWeights:
    """The weights of a step: what the answer's grammar forces counts `skeleton` of what a free token of its row does.

    Means are over all tokens of the step, of which a forward pass has a part: the parts add up to them. In a step
    without any free token all tokens count alike.
    """

    skeleton: float
    by_field: bool
    """Each output field of a row counts alike, however many free tokens it has; else each free token."""
    total: float
    """Weight of all tokens of the step."""
    free: float
    """Weight of its free tokens; 0: there are none, and all are taken for free."""

    @classmethod
    def of(cls, rows: Sequence[TokenizedRow], skeleton: float, by_field: bool) -> TokenWeights:
        """The weights of a step over these rows."""
        by_field = by_field and knows_fields(rows)
        free = sum(sum(free_weights(row, by_field)) for row in rows)
        if not free:
            return cls(1.0, False, sum(len(row.completion_ids) for row in rows), 0.0)
        return cls(skeleton, by_field, sum(sum(token_weights(row, skeleton, by_field)) for row in rows), free)

    def of_tokens(self, rows: Iterable[TokenizedRow]) -> tuple[Tensor, Tensor]:
        """The weights of the completion tokens of some rows of the step [N], and the places of those that are free [F]:
        to choose by a mask, a GPU would first have to be asked how many it leaves."""
        rows = list(rows)
        weights = [weight for row in rows for weight in token_weights(row, self.skeleton, self.by_field)]
        free = [free or not self.free for row in rows for free in row.free]
        return torch.tensor(weights, dtype=torch.float32), torch.tensor(free).nonzero()[:, 0]

    def losses(self, rows: Iterable[TokenizedRow], losses_N: Tensor) -> tuple[Tensor, Tensor]:
        """The parts that some rows of the step have in its means: the weighted one of all tokens, a scalar, and that of
        the free ones [1], without gradients."""
        weights_N, free_F = (each.to(losses_N.device) for each in self.of_tokens(rows))
        weighted_N = losses_N * weights_N
        return weighted_N.sum() / self.total, weighted_N.detach()[free_F].sum()[None] / (self.free or self.total)
