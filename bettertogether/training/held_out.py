"""The loss of rows that are held out: of the tokens where the model has a choice, by output field, and of all tokens.

With JSON around a one-word label nearly all tokens of an answer are forced by its grammar, so that their mean tells
how well the model knows the form and nothing of what it answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .packing import MicroBatch, TokenizedRow
from .stepper import Stepper
from .weighting import free_weights, knows_fields

ROWS_AT_ONCE = 256
"""Rows that are in memory and are planned together."""
HELD_OUT = "The rows held out"


@dataclass(frozen=True)
class HeldOutLosses:
    """Mean losses per completion token, in nats."""

    free: float
    """Of the tokens that the grammar leaves free, each output field of a row with the same weight where that is asked
    for; of all, where it leaves none. Of pairs, the mean loss of a pair."""
    all_tokens: float
    """Of pairs, the mean loss of a token of the chosen answers."""
    fields: Mapping[str, float] = field(default_factory=dict)
    """By output field, of the free tokens of its values."""
    error: float | None = None
    """Mean probability of another token than the row's, 1 - p, of the tokens of `free`, with the same weights. A few
    rows that the model is wrong about with confidence can't hide that it gets the others right, as they do in a mean
    loss. None for pairs, and where no token is free."""

    @property
    def measure(self) -> float:
        """What chooses the epoch, the lower the better."""
        return self.free if self.error is None else self.error

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        return all(map(math.isfinite, (self.free, self.all_tokens, *self.fields.values())))


@torch.no_grad()
def forward_passes(stepper: Stepper, rows: Iterable[TokenizedRow], name: str) -> Iterator[tuple[MicroBatch, Tensor]]:
    """The passes over this process's share of many rows, each with the losses [N] of its completion tokens, in float64
    on the CPU. All processes have to go through all of their passes. `name` says in errors what it is. Raises
    TrainingError."""
    loss, sharing, rows = stepper.loss, stepper.sharing, iter(rows)
    # Never all of them, which may be more than memory holds (`arrow_rows`).
    while part := list(itertools.islice(rows, ROWS_AT_ONCE)):

        def run(plan: Sequence[MicroBatch], part: Sequence[TokenizedRow] = part) -> list[tuple[MicroBatch, Tensor]]:
            passes = sharing.passes(plan, part)
            losses = [loss.token_losses(batch).cpu().double() for batch, _ in passes]
            return [(batch, losses_N) for (batch, counts), losses_N in zip(passes, losses, strict=True) if counts]

        yield from stepper.in_memory(sharing.rows(part), run, name)
    sharing.let_go(loss.model)


def held_out_losses(stepper: Stepper, rows: Sequence[TokenizedRow], by_field: bool) -> HeldOutLosses:
    """The losses of rows, a row with forms under its own prompt and under its first form, with half the weight each.

    Each process runs its share of the rows; all get the result.
    """
    by_field = by_field and knows_fields(rows)
    names = sorted({name for row in rows for name in row.fields if name})
    shown = (each for row in rows for each in ((row, row.shown(0)) if row.forms else (row,)))
    sums_3_K = torch.zeros(3, 2 + len(names), dtype=torch.float64)
    for batch, losses_N in forward_passes(stepper, shown, HELD_OUT):
        weights_K_N = _weights(batch.rows, names, by_field)
        errors_N = -torch.expm1(-losses_N)
        sums_3_K += torch.stack([weights_K_N @ losses_N, weights_K_N @ errors_N, weights_K_N.sum(1)])
    losses_K, errors_K, counts_K = stepper.sharing.sum(sums_3_K)
    free, all_tokens, *means = (losses_K / counts_K).tolist()
    measured = {name: mean for name, mean, count in zip(names, means, counts_K[2:], strict=True) if count > 0}
    if counts_K[0] == 0:
        return HeldOutLosses(all_tokens, all_tokens, measured)
    return HeldOutLosses(free, all_tokens, measured, float(errors_K[0] / counts_K[0]))


def _weights(rows: Iterable[TokenizedRow], names: Sequence[str], by_field: bool) -> Tensor:
    """How much each completion token of the rows counts [K, N], to the K means: free, all, and each field."""
    columns: list[list[float]] = []
    for row in rows:
        weight = 0.5 if row.forms else 1.0
        fields = row.fields or [""] * len(row.completion_ids)
        for counted, free, name in zip(free_weights(row, by_field), row.free, fields, strict=True):
            of_fields = [weight * (free and name == each) for each in names]
            columns.append([weight * counted, weight, *of_fields])
    return torch.tensor(columns, dtype=torch.float64).T
