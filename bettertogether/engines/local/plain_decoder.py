"""The decoder for models whose attention can't be packed: padded batches, through the model's own cache and attention.

A batch is admitted when the one before it is done, and holds rows of one adapter. Each step feeds one token to every
row; so it is slow next to `PackedDecoder`, and serves what that one can't.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..adapters import AdaptedSpan, AdapterBank
from .decoder import BatchRow, Decision
from .sampling import decide


class PlainDecoder:
    """Decodes one left-padded batch at a time.

    Args:
        model: A causal language model of transformers, on its device and in eval mode.
        adapters: The adapters served on it.
        pads: Rows of several lengths go into one batch; else only rows of the same length do.
    """

    def __init__(self, model: Any, adapters: AdapterBank, *, pads: bool = True) -> None:
        self._model = model
        self._pads = pads
        self._adapters = adapters
        self._batch: list[BatchRow | None] = []
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._forward_passes = 0

    def counters(self) -> dict[str, int]:
        """Forward passes; prefixes are not reused."""
        return {"forward_passes": self._forward_passes, "prefix_tokens_reused": 0}

    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Take the rows of the first one's adapter, once the last batch is done."""
        if any(self._batch):
            return []
        first = rows[0]
        taken = [row for row in rows if row.adapter == first.adapter and (self._pads or row.length == first.length)]
        self._batch = list(taken)
        self._cache = self._mask = None
        return taken

    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        """The whole prompts at first, then one token of each row."""
        logits_B_V = self._first_pass() if self._cache is None else self._next_pass()
        places = [place for place, row in enumerate(self._batch) if row is not None and row.pending == 0]
        ready = [row for row in self._batch if row is not None and row.pending == 0]
        decisions = dict(zip(ready, decide(logits_B_V[places], ready), strict=True))
        return [decisions.get(row, Decision()) for row in rows]

    def probe(self, prompts: Sequence[list[int]]) -> Tensor:
        """Logits [B, V] after some prompts in one batch."""
        self.admit([BatchRow(prompt, 1) for prompt in prompts])
        logits_B_V = self._first_pass()
        self.reset()
        return logits_B_V

    def _first_pass(self) -> Tensor:
        rows = [row for row in self._batch if row is not None]
        self._batch = list(rows)
        longest = max(row.length for row in rows)
        ids_B_T = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_B_T = torch.zeros_like(ids_B_T)
        for place, row in enumerate(rows):
            ids_B_T[place, longest - row.length :] = torch.tensor(row.tokens(0, row.length))
            mask_B_T[place, longest - row.length :] = 1
        cache = DynamicCache(config=self._model.config)
        mask_B_T = mask_B_T.to(self._model.device)
        logits_B_V = self._forward(ids_B_T, mask_B_T, (mask_B_T.cumsum(-1) - 1).clamp(min=0), cache)
        self._cache, self._mask = cache, mask_B_T
        for row in rows:
            row.computed = row.length
        return logits_B_V

    def _next_pass(self) -> Tensor:
        assert self._mask is not None
        tokens = [row.tokens(row.computed, row.computed + 1)[0] if row else 0 for row in self._batch]
        mask_B_T = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        positions_B_1 = mask_B_T.sum(-1, keepdim=True) - 1
        logits_B_V = self._forward(torch.tensor(tokens)[:, None], mask_B_T, positions_B_1, self._cache)
        self._mask = mask_B_T
        for row in self._batch:
            if row is not None:
                row.computed += 1
        return logits_B_V

    @torch.inference_mode()
    def _forward(self, ids_B_T: Tensor, mask_B_T: Tensor, positions_B_T: Tensor, cache: Any) -> Tensor:
        adapter = next(row.adapter for row in self._batch if row is not None)
        with self._adapters.active([AdaptedSpan(adapter, 0, None)]):
            logits = self._model(
                input_ids=ids_B_T.to(self._model.device),
                attention_mask=mask_B_T,
                position_ids=positions_B_T,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._forward_passes += 1
        result: Tensor = logits[:, -1]
        return result

    def release(self, row: BatchRow) -> None:
        """Forget a row; its place in the batch stays until the batch is done."""
        if row in self._batch:
            self._batch[self._batch.index(row)] = None
        row.computed = 0
        if not any(self._batch):
            self.reset()

    def reset(self) -> None:
        """Forget the batch."""
        self._batch = []
        self._cache = self._mask = None
