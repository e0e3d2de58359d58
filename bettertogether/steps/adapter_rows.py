"""Which rows an adapter is trained on, and which are held out from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..engines.protocol import MODEL_PREFIX, LocalEngine
from ..rollouts.labels import stratified_order
from .rows import Row
from .rows_from_traces import Trainable

FEWEST_HELD_OUT = 4
"""Examples below which a held-out loss says too little."""
ENOUGH_HELD_OUT = 16
"""Examples from which a held-out loss tells one epoch from another. It takes a third of the time of training on as
many, so that more are not taken from a valset."""
MOST_SHARE = 0.2
"""Of few examples more than the share asked for are held out, to have `FEWEST_HELD_OUT`; at most this share."""


class AdapterKey(NamedTuple):
    """What shares one adapter."""

    engine: int
    """Its `id`: two engines may hold base models of one name."""
    model: str
    predictor: str
    """"": the adapter is fed by all that use the model."""


class Start(NamedTuple):
    """What an adapter is trained from, and by."""

    engine: LocalEngine
    model: str

    @property
    def adapter(self) -> str | None:
        """The adapter to go on with; None: a new one on the base weights."""
        return None if self.model == MODEL_PREFIX + self.engine.base_name else self.model


def adapter_key(predictor: str, lm: Any, multitask: bool) -> AdapterKey:
    """The adapter that a predictor with this LM is trained with."""
    return AdapterKey(id(lm.engine), lm.model, "" if multitask else predictor)


def rows_by_adapter(rows: Sequence[Row], trainable: Trainable, multitask: bool) -> dict[AdapterKey, list[Row]]:
    """The rows of each adapter; those without a predictor's name are of all."""
    groups: dict[AdapterKey, list[Row]] = defaultdict(list)
    for row in rows:
        names = [row.predictor] if row.predictor else list(trainable)
        for key in dict.fromkeys(adapter_key(name, trainable[name].lm, multitask) for name in names):
            groups[key].append(row)
    return groups


def enough_held_out(rows: Sequence[Row]) -> bool:
    """Whether the loss of these rows says anything."""
    return len({row.example for row in rows}) >= FEWEST_HELD_OUT


def held_out_count(examples: int, share: float) -> int:
    """How many of so many examples are held out; 0 where they would be too few."""
    count = max(round(share * examples), FEWEST_HELD_OUT)
    return count if share and count <= max(share, MOST_SHARE) * examples else 0


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, by example; none held out where they would be too few."""
    examples = sorted({row.example for row in rows})
    count = held_out_count(len(examples), share)
    if not count:
        return list(rows), []
    labels = {row.example: row.label for row in rows}
    held_out = set(stratified_order(examples, [labels[example] for example in examples], seed)[:count])
    apart = [row for row in rows if row.example in held_out]
    unique = {(row.example, row.predictor, row.prompt, row.completion, row.rejected): row for row in apart}
    return [row for row in rows if row.example not in held_out], list(unique.values())
