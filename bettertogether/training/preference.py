"""Learning from pairs of answers: DPO (arXiv 2305.18290) with the chosen answer's loss beside it, as in Iterative RPO
(arXiv 2404.19733), where the chosen answer's probability would otherwise fall with the other's.

The reference is the model as the training finds it: the adapter that it starts from, or the base. What an answer's
grammar forces is no choice, so that an answer is as probable as its free tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .config import TrainingConfig
from .held_out import HELD_OUT, HeldOutLosses, forward_passes
from .packing import AnswerRow, TokenizedRow
from .stepper import Stepper
from .weighting import token_weights


@dataclass(frozen=True, kw_only=True)
class ReferencedPair(TokenizedRow):
    """A pair whose answers the reference has judged."""

    reference: tuple[float, float]
    """Log-probabilities of the chosen answer and of the other under the reference, in nats."""


class ReferencedPairs(Sequence[TokenizedRow]):
    """Pairs, made anew when they are asked for where they are kept on disk."""

    def __init__(self, pairs: Sequence[TokenizedRow], reference_P_2: Tensor) -> None:
        self._pairs = pairs
        self._reference_P_2 = reference_P_2

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...

    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        chosen, rejected = self._reference_P_2[index].tolist()
        return ReferencedPair(**vars(self._pairs[index]), reference=(chosen, rejected))


@dataclass(frozen=True)
class PairLoss:
    """The loss of a step over so many pairs, their mean: of each pair the loss of the preference, and the mean loss of
    the chosen answer's tokens."""

    training: TrainingConfig
    pairs: int

    def losses(self, rows: Sequence[TokenizedRow], losses_N: Tensor) -> tuple[Tensor, Tensor]:
        """The part of some pairs, whose answers are the rows: a scalar, and the same without gradients [1]."""
        preference_P, chosen_P = self.terms(rows, losses_N)
        loss = (preference_P + self.training.nll_weight * chosen_P).sum() / self.pairs
        return loss, loss.detach()[None]

    def terms(self, rows: Sequence[TokenizedRow], losses_N: Tensor) -> tuple[Tensor, Tensor]:
        """By pair, -log sigmoid of beta times how much more than the reference the model prefers the chosen answer [P],
        and the mean loss of that answer's tokens, weighted as those of a row are [P]."""
        answers = [row for row in rows if isinstance(row, AnswerRow)]
        gains_R = log_probabilities(answers, losses_N) - losses_N.new_tensor([_reference(row) for row in answers])
        places = {(id(row.pair), row.is_rejected): place for place, row in enumerate(answers)}
        chosen = [place for place, row in enumerate(answers) if not row.is_rejected]
        rejected = [places[id(answers[place].pair), True] for place in chosen]
        preference_P = softplus(-self.training.beta * (gains_R[chosen] - gains_R[rejected]))
        return preference_P, _by_row(answers, losses_N, [self._weights(row) for row in answers])[chosen]

    def _weights(self, row: AnswerRow) -> list[float]:
        by_field = self.training.balance_fields and bool(row.fields)
        weights = token_weights(row, self.training.skeleton_weight, by_field)
        total = sum(weights)
        return [weight / total for weight in weights]


def log_probabilities(answers: Sequence[AnswerRow], losses_N: Tensor) -> Tensor:
    """Of each answer, in nats [R]: of its free tokens; of all where the grammar is not known of both of the pair."""
    counted = [row.free if row.pair.forced and row.pair.rejected_forced else [True] * len(row.free) for row in answers]
    return -_by_row(answers, losses_N, counted)


def _by_row(rows: Sequence[TokenizedRow], losses_N: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Weighted sums of the losses of each row's tokens [R]."""
    weights_N = losses_N.new_tensor([float(weight) for own in weights for weight in own])
    parts = (losses_N * weights_N).split([len(row.completion_ids) for row in rows])
    return torch.stack([part.sum() for part in parts])


def _reference(row: AnswerRow) -> float:
    assert isinstance(row.pair, ReferencedPair)
    return row.pair.reference[row.is_rejected]


@dataclass(frozen=True)
class PairObjective:
    """The loss of pairs."""

    stepper: Stepper
    training: TrainingConfig

    def prepared(self, rows: Sequence[TokenizedRow]) -> Sequence[TokenizedRow]:
        """The pairs with their log-probabilities under the model as it is, which is the reference."""
        if not rows:
            return rows
        self.stepper.adapter.base.eval()
        places: dict[int, int] = {}

        def numbered() -> Iterator[TokenizedRow]:
            for place, row in enumerate(rows):
                places[id(row)] = place
                yield row

        reference_P_2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        for batch, losses_N in forward_passes(self.stepper, numbered(), "The reference of the pairs"):
            answers = [row for row in batch.rows if isinstance(row, AnswerRow)]
            for row, log_probability in zip(answers, log_probabilities(answers, losses_N), strict=True):
                reference_P_2[places[id(row.pair)], int(row.is_rejected)] = log_probability
        return ReferencedPairs(rows, self.stepper.sharing.sum(reference_P_2))

    def of_step(self, rows: Sequence[TokenizedRow]) -> PairLoss:
        """The mean over the pairs of a step."""
        return PairLoss(self.training, len(rows))

    def held_out(self, rows: Sequence[TokenizedRow]) -> HeldOutLosses:
        """The mean loss of pairs, and that of their chosen answers."""
        loss = PairLoss(self.training, len(rows))
        sums_2 = torch.zeros(2, dtype=torch.float64)
        for batch, losses_N in forward_passes(self.stepper, rows, HELD_OUT):
            sums_2 += torch.stack([term_P.sum() for term_P in loss.terms(batch.rows, losses_N)])
        preference, chosen = (self.stepper.sharing.sum(sums_2) / len(rows)).tolist()
        return HeldOutLosses(preference + self.training.nll_weight * chosen, chosen)
