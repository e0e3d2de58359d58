"""The decoder for models whose attention can't be packed: padded batches, through the model's own cache and attention.

Each step feeds one token to every row of the batch, which are rows of one adapter, and their whole prompts to rows that
come. It is slow next to `PackedDecoder`, and serves what that one can't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from ..adapters import AdaptedSpan, AdapterBank
from .decoder import BatchRow, Decision
from .padded_cache import cache_name, join, keep
from .sampling import decide


@dataclass(eq=False)
class _Batch:
    """Rows of one adapter, padded on the left."""

    rows: list[BatchRow | None]
    """None: a row that has left."""
    cache: Any
    mask: Tensor
    """1 where a row has a token, [B, T]."""

    @property
    def adapter(self) -> str:
        return next(row.adapter for row in self.rows if row)

    def add(self, other: _Batch) -> None:
        """Take in the rows of another batch."""
        join(self.cache, other.cache)
        columns = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(mask, (columns - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.rows, self.mask = self.rows + other.rows, torch.cat(masks)

    def close_up(self) -> None:
        """Free the places of rows that have left, and the columns that no other row has tokens in."""
        if None in self.rows:
            places = [place for place, row in enumerate(self.rows) if row]
            columns = max(row.computed for row in self.rows if row)
            kept_A = torch.tensor(places, device=self.mask.device)
            keep(self.cache, kept_A, columns)
            self.rows, self.mask = [self.rows[place] for place in places], self.mask[kept_A, -columns:]


class PlainDecoder:
    """Decodes one left-padded batch, which rows join and leave between steps.

    Args:
        model: A causal language model of transformers, on its device and in eval mode.
        adapters: The adapters served on it.
        pads: Prompts of several lengths go into one pass; else only those of the same length do.
        joins: Rows join those under way; else the next batch begins when the last is done.
    """

    def __init__(self, model: Any, adapters: AdapterBank, *, pads: bool = True, joins: bool = True) -> None:
        self._model = model
        self._adapters = adapters
        self._pads = pads
        self._joins = joins
        self._coming: list[BatchRow] = []
        self._batch: _Batch | None = None
        self._forward_passes = 0
        self._cache_name = cache_name(model)

    def counters(self) -> dict[str, int]:
        """Forward passes; prefixes are not reused."""
        return {"forward_passes": self._forward_passes, "prefix_tokens_reused": 0}

    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Take rows of the adapter that is being served. Where another's wait as well, the batch ends first, so that
        they have their turn."""
        adapter = rows[0].adapter
        if self._batch and not (self._joins and all(row.adapter == self._batch.adapter for row in rows)):
            return []
        self._coming = [row for row in rows if row.adapter == adapter and (self._pads or row.length == rows[0].length)]
        return list(self._coming)

    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        """One token of each row that is under way, and the whole prompts of those that come."""
        decided: dict[BatchRow, Decision] = {}
        if self._batch:
            if self._joins:
                self._batch.close_up()
            decided |= self._decisions(self._next_pass(self._batch), self._batch.rows)
        if self._coming:
            decided |= self._decisions(self._enter(self._coming), self._coming)
            self._coming = []
        return [decided.get(row, Decision()) for row in rows]

    def probe(self, prompts: Sequence[list[int]], *, joined: bool = False) -> Tensor:
        """Logits [B, V] after some prompts in one batch, which begin it together, or join it one by one."""
        rows = [BatchRow(prompt[:-1], 1, output_ids=prompt[-1:]) for prompt in prompts]
        if not joined:
            logits_B_V = self._enter(rows)
        else:
            for row in rows:
                last = row.output_ids.pop()
                self._enter([row])
                row.output_ids.append(last)
            assert self._batch is not None
            logits_B_V = self._next_pass(self._batch)
        self.reset()
        return logits_B_V

    def _decisions(self, logits_B_V: Tensor, rows: Sequence[BatchRow | None]) -> dict[BatchRow, Decision]:
        """Those of the rows all of whose tokens went through the model."""
        ready = {row: place for place, row in enumerate(rows) if row and row.pending == 0}
        return dict(zip(ready, decide(logits_B_V[list(ready.values())], list(ready)), strict=True))

    @torch.inference_mode()
    def _enter(self, rows: Sequence[BatchRow]) -> Tensor:
        """Put all tokens of rows through the model, and the rows into the batch; their logits [B, V]."""
        longest = max(row.length for row in rows)
        ids_B_T = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_B_T = torch.zeros_like(ids_B_T)
        for place, row in enumerate(rows):
            ids_B_T[place, longest - row.length :] = torch.tensor(row.tokens(0, row.length))
            mask_B_T[place, longest - row.length :] = 1
        batch = _Batch(list(rows), DynamicCache(config=self._model.config), mask_B_T.to(self._model.device))
        logits_B_V = self._forward(ids_B_T, batch, (batch.mask.cumsum(-1) - 1).clamp(min=0))
        for row in rows:
            row.computed = row.length
        if self._batch:
            self._batch.add(batch)
        else:
            self._batch = batch
        return logits_B_V

    @torch.inference_mode()
    def _next_pass(self, batch: _Batch) -> Tensor:
        """Put the next token of each row through the model; the logits [B, V]."""
        ids_B_1 = torch.tensor([row.tokens(row.computed, row.computed + 1) if row else [0] for row in batch.rows])
        batch.mask = pad(batch.mask, (0, 1), value=1)
        logits_B_V = self._forward(ids_B_1, batch, batch.mask.sum(-1, keepdim=True) - 1)
        for row in batch.rows:
            if row:
                row.computed += 1
        return logits_B_V

    def _forward(self, ids_B_T: Tensor, batch: _Batch, positions_B_T: Tensor) -> Tensor:
        with self._adapters.active([AdaptedSpan(batch.adapter, 0, None)]):
            logits = self._model(
                input_ids=ids_B_T.to(self._model.device),
                attention_mask=batch.mask,
                position_ids=positions_B_T,
                **{self._cache_name: batch.cache},
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._forward_passes += 1
        result: Tensor = logits[:, -1]
        return result

    def release(self, row: BatchRow) -> None:
        """Forget a row."""
        row.computed = 0
        if self._batch and row in self._batch.rows:
            self._batch.rows[self._batch.rows.index(row)] = None
            if not any(self._batch.rows):
                self._batch = None

    def reset(self) -> None:
        """Forget all rows."""
        self._coming, self._batch = [], None
