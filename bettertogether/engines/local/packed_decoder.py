"""The fast decoder: continuous batching over packed passes with shared prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...training._upstream import attention_name, name_attention
from ..adapters import AdaptedSpan, AdapterBank
from .decoder import BatchRow, Decision
from .packed_attention import PACKED_ATTENTION, PackedPass, PrefixPass, PrefixTensors
from .sampling import decide
from .shared_prefix import SLACK, Cluster, Prefix, PrefixCache, Tokens, common_length, shared_clusters
from .slots import SlotPass, Slots, SlotTokens

LONG_ROW = 512
"""A row with more tokens of its own gets a prefix of its own, so that slots stay short."""


@dataclass(eq=False)
class _ComputedPrefix(Prefix):
    data: PrefixTensors


@dataclass(eq=False)
class _Seat:
    """Where a row's keys and values are."""

    slot: int
    prefix: _ComputedPrefix | None
    prefix_length: int
    keep_prompt: bool = False
    """The prompt has no prefix in the cache: keep it, for the prompts that will share a part of it."""


class PackedDecoder:
    """Decodes rows of the base and of any adapter together.

    Args:
        model: A causal language model of transformers, on its device and in eval mode.
        adapters: The adapters served on it.
        cache_bytes: Bound on the keys and values kept for shared prefixes.
        tokens_per_pass: Bound on the tokens of one forward pass.
    """

    def __init__(self, model: Any, adapters: AdapterBank, *, cache_bytes: int, tokens_per_pass: int = 2048) -> None:
        self._model = model
        self._adapters = adapters
        self._tokens_per_pass = tokens_per_pass
        self._slots = Slots()
        self._seats: dict[BatchRow, _Seat] = {}
        self._by_slot: list[BatchRow] = []
        self._prefixes: PrefixCache[_ComputedPrefix] = PrefixCache(cache_bytes)
        self._forward_passes = 0
        self._token_bytes = self._measured_token_bytes()
        self._reused_tokens = 0

    @torch.inference_mode()
    def _measured_token_bytes(self) -> int:
        """Bytes of the keys and values of one token: layers may differ in heads and sizes, or share them."""
        data = PrefixTensors(1)
        self._forward(PrefixPass(data, 0), [0], [0], [], [0])
        self._forward_passes = 0
        return data.nbytes

    @property
    def cache_bytes(self) -> int:
        """Bytes held for shared prefixes."""
        return self._prefixes.size_bytes

    def counters(self) -> dict[str, int]:
        """Forward passes, and prompt tokens that were found computed."""
        return {"forward_passes": self._forward_passes, "prefix_tokens_reused": self._reused_tokens}

    @torch.inference_mode()
    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Find or compute the prefixes that the rows share, and give each a slot."""
        taken: list[BatchRow] = []
        for adapter in sorted({row.adapter for row in rows}):
            members = [row for row in rows if row.adapter == adapter]
            prompts = [np.array(row.tokens(0, row.length), dtype=np.int64) for row in members]
            for cluster in shared_clusters(prompts):
                must = not taken and not self._seats
                taken += self._admit_cluster(adapter, members, prompts, cluster, must)
        return taken

    def _admit_cluster(
        self, adapter: str, rows: Sequence[BatchRow], prompts: Sequence[Tokens], cluster: Cluster, must: bool
    ) -> list[BatchRow]:
        """Seat the rows of a cluster; none where their prefix does not fit now, unless they `must`."""
        shared = prompts[cluster.members[0]][: cluster.length]
        if len(cluster.members) > 1 and not self._provide(adapter, shared) and not must:
            return []
        taken: list[BatchRow] = []
        for position in cluster.members:
            own = prompts[position][:-1]
            long = own.size - self._prefixes.best(adapter, own)[1] > LONG_ROW
            if long and not self._provide(adapter, own) and (taken or not must):
                continue
            self._seat(rows[position], own, *self._choose(adapter, own, shared))
            taken.append(rows[position])
        return taken

    def _choose(self, adapter: str, own: Tokens, shared: Tokens) -> tuple[_ComputedPrefix | None, int]:
        """The prefix for a row, and how much of it.

        That of its cluster, or the one with most in common where that is much more. Among prefixes that serve about
        as well, the one that most rows attend to now: rows of one group cost little more than one row.
        """
        best, length = self._prefixes.best(adapter, own)
        cluster, cluster_length = self._prefixes.best(adapter, shared)
        if cluster is not None and cluster_length >= length - SLACK:
            best, length = cluster, cluster_length
        groups = Counter((seat.prefix, seat.prefix_length) for seat in self._seats.values())
        for (prefix, used), _ in groups.most_common():
            if prefix is None or prefix.adapter != adapter or not length - SLACK <= used <= own.size:
                continue
            if common_length(prefix.tokens[:used], own) == used:
                return prefix, used
        return best, length

    def _provide(self, adapter: str, tokens: Tokens) -> bool:
        """See to it that these tokens are in the prefix cache; False where there is no room for them."""
        source, common = self._prefixes.best(adapter, tokens)
        if common == tokens.size:
            return True
        size_bytes = tokens.size * self._token_bytes
        if source is not None:
            self._prefixes.use(source)
        try:
            if not self._prefixes.make_room(size_bytes):
                return False
            data = PrefixTensors(tokens.size, source=source.data if source else None, copied=common)
            for start in range(common, tokens.size, self._tokens_per_pass):
                piece = tokens[start : start + self._tokens_per_pass]
                self._forward(
                    PrefixPass(data, start),
                    piece.tolist(),
                    list(range(start, start + piece.size)),
                    [AdaptedSpan(adapter, 0, None)],
                    [piece.size - 1],
                )
            data.source = None
            self._prefixes.add(_ComputedPrefix(adapter, tokens, size_bytes, data))
        finally:
            if source is not None:
                self._prefixes.unuse(source)
        return True

    def _seat(self, row: BatchRow, own: Tokens, prefix: _ComputedPrefix | None, length: int) -> None:
        slot = len(self._by_slot)
        self._slots.reserve(slot + 1, row.length - length + 1)
        if prefix is not None:
            self._prefixes.use(prefix)
            row.reused_tokens = length
            self._reused_tokens += length
        self._seats[row] = _Seat(slot, prefix, length, keep_prompt=2 * length < own.size)
        self._by_slot.append(row)
        row.computed = length

    @torch.inference_mode()
    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        """One pass over what the rows have pending, up to the bound of tokens; short rows first."""
        ready, logits_B_V = self._pass(rows)
        decisions = dict(zip(ready, decide(logits_B_V, ready), strict=True))
        return [decisions.get(row, Decision()) for row in rows]

    @torch.inference_mode()
    def probe(self, prompt_ids: list[int], prefix_length: int) -> Tensor:
        """Logits [V] after a prompt whose first tokens are computed as a shared prefix."""
        self._provide("", np.array(prompt_ids[:prefix_length], dtype=np.int64))
        row = BatchRow(prompt_ids, 1)
        self.admit([row])
        return self._pass([row])[1][0]

    def _pass(self, rows: Sequence[BatchRow]) -> tuple[list[BatchRow], Tensor]:
        """One pass; the rows of which nothing is pending any more, and their logits [B, V]."""
        counts: dict[BatchRow, int] = {}
        room = self._tokens_per_pass
        for row in sorted(rows, key=lambda row: row.pending):
            counts[row] = min(row.pending, room)
            room -= counts[row]
        order = sorted((row for row in rows if counts[row]), key=self._order)
        own_tokens = [row.computed + counts[row] - self._seats[row].prefix_length for row in order]
        self._slots.reserve(len(self._by_slot), max(own_tokens))
        packed = SlotPass(self._slots, [self._slot_tokens(row, counts[row]) for row in order], self._model.device)
        token_ids = [token for row in order for token in row.tokens(row.computed, row.computed + counts[row])]
        ends_of = zip(order, accumulate(counts[row] for row in order), strict=True)
        ready = {row: end - 1 for row, end in ends_of if counts[row] == row.pending}
        spans = _spans(order, counts)
        logits_B_V = self._forward(packed, token_ids, packed.positions(), spans, list(ready.values()))
        for row in order:
            row.computed += counts[row]
            self._keep_prompt(row)
        return list(ready), logits_B_V

    def _order(self, row: BatchRow) -> tuple[str, int, int, int]:
        seat = self._seats[row]
        return row.adapter, id(seat.prefix), seat.prefix_length, seat.slot

    def _slot_tokens(self, row: BatchRow, count: int) -> SlotTokens:
        seat = self._seats[row]
        return SlotTokens(
            slot=seat.slot,
            stored=row.computed - seat.prefix_length,
            count=count,
            prefix=seat.prefix.data if seat.prefix else None,
            prefix_length=seat.prefix_length,
        )

    def _keep_prompt(self, row: BatchRow) -> None:
        """Copy a computed prompt that shares little with the cache into it."""
        seat = self._seats[row]
        size = len(row.prompt_ids)
        if not seat.keep_prompt or row.computed < size:
            return
        seat.keep_prompt = False
        if not self._prefixes.make_room(size * self._token_bytes):
            return
        source = seat.prefix.data if seat.prefix else None
        data = PrefixTensors(size, source=source, copied=seat.prefix_length)
        for layer, (keys, values) in enumerate(zip(self._slots.keys, self._slots.values, strict=True)):
            own = slice(0, size - seat.prefix_length)
            data.write(layer, seat.prefix_length, keys[seat.slot][:, own], values[seat.slot][:, own])
        data.source = None
        tokens = np.array(row.prompt_ids, dtype=np.int64)
        self._prefixes.add(_ComputedPrefix(row.adapter, tokens, size * self._token_bytes, data))

    def _forward(
        self, packed: PackedPass, token_ids: list[int], positions: list[int], spans: list[AdaptedSpan], ends: list[int]
    ) -> Tensor:
        """Logits [B, V] after the tokens at the places `ends` of the pass."""
        device = self._model.device
        with packed_attention_on(self._model), self._adapters.active(spans, ends):
            logits = self._model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(ends, device=device, dtype=torch.long),
                packed=packed,
            ).logits
        self._forward_passes += 1
        return logits[0]

    @torch.inference_mode()
    def release(self, row: BatchRow) -> None:
        """Free a row's slot, which the last row takes over."""
        seat = self._seats.pop(row, None)
        if seat is None:
            return
        row.computed = 0
        if seat.prefix is not None:
            self._prefixes.unuse(seat.prefix)
        last = self._by_slot.pop()
        if last is not row:
            moved = self._seats[last]
            self._slots.move(moved.slot, seat.slot, last.computed - moved.prefix_length)
            moved.slot = seat.slot
            self._by_slot[seat.slot] = last

    def reset(self) -> None:
        """Forget all rows and prefixes, and free their memory."""
        for row in list(self._seats):
            row.computed = 0
        self._seats.clear()
        self._by_slot.clear()
        self._prefixes.clear()
        self._slots.clear()


@contextmanager
def packed_attention_on(model: Any) -> Iterator[None]:
    """Run the model with packed attention inside the block, and with its own attention after it."""
    before = attention_name(model)
    name_attention(model, PACKED_ATTENTION)
    try:
        yield
    finally:
        name_attention(model, before)


def _spans(order: Sequence[BatchRow], counts: dict[BatchRow, int]) -> list[AdaptedSpan]:
    """Tokens by adapter; the rows of one adapter come one after the other."""
    spans: list[AdaptedSpan] = []
    end = 0
    for row in order:
        start, end = end, end + counts[row]
        if spans and spans[-1].adapter == row.adapter:
            spans[-1] = AdaptedSpan(row.adapter, spans[-1].start, end)
        else:
            spans.append(AdaptedSpan(row.adapter, start, end))
    return spans
