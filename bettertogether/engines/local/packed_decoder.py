"""The fast decoder: continuous batching over packed passes with shared prefixes."""

from __future__ import annotations

import math
from collections import Counter, deque
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
from .shared_prefix import LEAST_GAIN, SLACK, Cluster, Prefix, PrefixCache, Tokens, common_length, shared_clusters
from .slots import SlotPass, Slots, SlotTokens

LONG_ROW = 512
"""A row with more tokens of its own gets a prefix of its own, so that slots stay short."""
LONGEST_SLOT = LONG_ROW + 64
"""A row that has filled a slot of so many tokens gets them as a prefix, and goes on in the empty slot."""


@dataclass(eq=False)
class _Seat:
    """Where a row's keys and values are."""

    slot: int
    prefix: Prefix | None
    prefix_length: int
    keep_prompt: bool = False
    """The prompt has no prefix in the cache: keep it, for the prompts that will share a part of it."""


class PackedDecoder:
    """Decodes rows of the base and of any adapter together.

    Args:
        model: A causal language model of transformers, on its device and in eval mode.
        adapters: The adapters served on it.
        cache_bytes: Bound on the keys and values of all rows and prefixes. A row that needs more has it while it is
            alone.
        tokens_per_pass: Bound on the tokens of one forward pass.
    """

    def __init__(self, model: Any, adapters: AdapterBank, *, cache_bytes: int, tokens_per_pass: int = 2048) -> None:
        self._model = model
        self._adapters = adapters
        self._tokens_per_pass = tokens_per_pass
        self._slots = Slots()
        self._seats: dict[BatchRow, _Seat] = {}
        self._by_slot: list[BatchRow] = []
        self._prefixes = PrefixCache(cache_bytes)
        self._computing: deque[Prefix] = deque()
        """Prefixes to be computed; those that another one begins with come before it."""
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

    def counters(self) -> dict[str, int]:
        """Forward passes, and prompt tokens that were found computed."""
        return {"forward_passes": self._forward_passes, "prefix_tokens_reused": self._reused_tokens}

    @torch.inference_mode()
    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Find the prefixes that the rows share, and give each row the memory that it needs. While there is none for
        the first row, the others wait too."""
        taken: list[BatchRow] = []
        for adapter in sorted({row.adapter for row in rows}, key=lambda name: (name != rows[0].adapter, name)):
            members = [row for row in rows if row.adapter == adapter]
            prompts = [np.array(row.tokens(0, row.length), dtype=np.int64) for row in members]
            for cluster in sorted(shared_clusters(prompts), key=lambda cluster: 0 not in cluster.members):
                must = not taken and not self._seats
                taken += self._admit_cluster(adapter, members, prompts, cluster, must)
                if rows[0] not in taken:
                    return []
        return taken

    def _admit_cluster(
        self, adapter: str, rows: Sequence[BatchRow], prompts: Sequence[Tokens], cluster: Cluster, must: bool
    ) -> list[BatchRow]:
        """Seat the rows of a cluster, as many as there is memory for; the first one in any case if it `must` be."""
        shared = prompts[cluster.members[0]][: cluster.length]
        if len(cluster.members) > 1 and not self._provide(adapter, shared) and not must:
            return []
        taken: list[BatchRow] = []
        for position in cluster.members:
            own = prompts[position][:-1]
            alone = must and not taken
            long = own.size - self._nearest(adapter, own)[1] > LONG_ROW
            if long and not self._provide(adapter, own, alone):
                break
            if not self._seat(rows[position], own, *self._choose(adapter, own, shared), alone):
                break
            taken.append(rows[position])
        return taken

    def _nearest(self, adapter: str, tokens: Tokens) -> tuple[Prefix | None, int]:
        """The prefix that has most tokens in common with the head of `tokens`, and how many."""
        prefix, length = self._prefixes.best(adapter, tokens)
        if prefix is not None and prefix.parent is not None and length <= prefix.data.start:
            prefix = prefix.parent
        return prefix, length

    def _choose(self, adapter: str, own: Tokens, shared: Tokens) -> tuple[Prefix | None, int]:
        """The prefix for a row, and how much of it.

        That of its cluster, or the one with most in common where that is much more. Among prefixes that serve about
        as well, the one that most rows attend to now: rows of one group cost little more than one row.
        """
        best, length = self._nearest(adapter, own)
        cluster, cluster_length = self._nearest(adapter, shared)
        if cluster is not None and cluster_length >= length - SLACK:
            best, length = cluster, cluster_length
        groups = Counter((seat.prefix, seat.prefix_length) for seat in self._seats.values())
        for (prefix, used), _ in groups.most_common():
            if prefix is None or prefix.adapter != adapter or not length - SLACK <= used <= own.size:
                continue
            if common_length(prefix.tokens[:used], own) == used:
                return prefix, used
        return best, length

    def _provide(self, adapter: str, tokens: Tokens, must: bool = False) -> bool:
        """See to it that these tokens are in the prefix cache, or come into it as steps are made; False where there is
        no room for them, unless they `must` be."""
        near, common = self._nearest(adapter, tokens)
        if common == tokens.size:
            return True
        prefix = self._beginning(adapter, tokens, near, common)
        if near is not None:
            self._prefixes.use(near)
        if self._prefixes.make_room(prefix.size_bytes) or must:
            self._prefixes.use(prefix)
            self._prefixes.add(prefix)
            self._computing.append(prefix)
            return True
        if near is not None:
            self._prefixes.unuse(near)
        return False

    def _beginning(self, adapter: str, tokens: Tokens, near: Prefix | None, common: int) -> Prefix:
        """A prefix of which no more is there than the tokens that it has in common with another one. It takes them from
        there, or copies what lies between its parent and its own."""
        parent, start = near, common
        if near is None or common < LEAST_GAIN:
            parent, start = None, 0
        elif near.parent is not None:
            parent, start = near.parent, near.data.start
        source = near.data if near is not None and near is not parent else None
        parent_data = None if parent is None else parent.data
        data = PrefixTensors(tokens.size, parent=parent_data, start=start, source=source, copied=common)
        size_bytes = (tokens.size - start) * self._token_bytes
        return Prefix(adapter, tokens, size_bytes, data, parent, computed=common, near=near)

    def _compute(self) -> None:
        """One pass over the prefix that is first in line."""
        while self._computing and self._computing[0].users == 1:
            # Whoever wanted it is gone.
            given_up = self._computing[0]
            self._is_there(given_up)
            self._prefixes.drop(given_up)
        if not self._computing:
            return
        prefix = self._computing[0]
        piece = prefix.tokens[prefix.computed : prefix.computed + self._tokens_per_pass]
        self._forward(
            PrefixPass(prefix.data, prefix.computed),
            piece.tolist(),
            list(range(prefix.computed, prefix.computed + piece.size)),
            [AdaptedSpan(prefix.adapter, 0, None)],
            [piece.size - 1],
        )
        prefix.data.source = None
        prefix.computed += piece.size
        if prefix.computed == prefix.tokens.size:
            self._is_there(prefix)

    def _is_there(self, prefix: Prefix) -> None:
        """The first in line needs no more passes."""
        self._computing.popleft()
        self._prefixes.unuse(prefix)
        if prefix.near is not None:
            self._prefixes.unuse(prefix.near)
        prefix.near = None

    def _seat(self, row: BatchRow, own: Tokens, prefix: Prefix | None, length: int, must: bool) -> bool:
        """Give a row a slot; False where there is no room for it, unless it `must` have one."""
        slot, capacity = len(self._by_slot), min(len(row.prompt_ids) + row.max_new_tokens - length, LONGEST_SLOT)
        size_bytes = math.prod(self._slots.grown(slot + 1, capacity)) * self._token_bytes
        if prefix is not None:
            self._prefixes.use(prefix)
        if not self._prefixes.make_room(size_bytes - self._prefixes.reserved_bytes) and not must:
            if prefix is not None:
                self._prefixes.unuse(prefix)
            return False
        self._prefixes.reserved_bytes = size_bytes
        self._slots.reserve(slot + 1, capacity)
        # The first row that waits for a prefix is the one that it is computed for.
        waited_for = any(seat.prefix is prefix for seat in self._seats.values())
        there = length if prefix is None or waited_for else min(length, prefix.computed)
        row.computed, row.reused_tokens = length, min(there, len(row.prompt_ids))
        self._reused_tokens += row.reused_tokens
        keep_prompt = 2 * length < own.size and length < len(row.prompt_ids)
        self._seats[row] = _Seat(slot, prefix, length, keep_prompt)
        self._by_slot.append(row)
        return True

    @torch.inference_mode()
    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        """One pass over a prefix that is missing, and one over what the rows have pending whose prefixes are there, up
        to the bound of tokens; short rows first."""
        self._compute()
        able = [row for row in rows if self._has_prefix(row)]
        full = [row for row in able if self._free(row) == 0 and not self._empty_slot(row)]
        ready, logits_B_V = self._pass([row for row in able if row not in full])
        decisions = dict(zip(ready, decide(logits_B_V, ready), strict=True)) if ready else {}
        decisions |= {row: Decision(postponed=True) for row in full}
        return [decisions.get(row, Decision()) for row in rows]

    def _has_prefix(self, row: BatchRow) -> bool:
        prefix, length = self._seats[row].prefix, self._seats[row].prefix_length
        # What a prefix has in common with its source is copied in its first pass.
        return prefix is None or (prefix.data.source is None and prefix.computed >= length)

    def _free(self, row: BatchRow) -> int:
        """Tokens for which there is room in a row's slot."""
        return LONGEST_SLOT - (row.computed - self._seats[row].prefix_length)

    def _empty_slot(self, row: BatchRow) -> bool:
        """Make what a row's slot holds its prefix; False where there is no room for that."""
        seat, before = self._seats[row], self._seats[row].prefix
        prefix = self._keep(row, row.computed, must=len(self._seats) == 1)
        if prefix is None:
            return False
        self._prefixes.use(prefix)
        seat.prefix, seat.prefix_length = prefix, row.computed
        if before is not None:
            self._prefixes.unuse(before)
            if not before.users:
                self._prefixes.drop(before)
        return True

    @torch.inference_mode()
    def probe(self, prompt_ids: list[int], prefix_length: int) -> Tensor:
        """Logits [V] after a prompt whose first tokens are computed as a shared prefix."""
        self._provide("", np.array(prompt_ids[:prefix_length], dtype=np.int64))
        row = BatchRow(prompt_ids, 1)
        self.admit([row])
        while self._computing:
            self._compute()
        return self._pass([row])[1][0]

    def _pass(self, rows: Sequence[BatchRow]) -> tuple[list[BatchRow], Tensor]:
        """One pass; the rows of which nothing is pending any more, and their logits [B, V]."""
        counts: dict[BatchRow, int] = {}
        room = self._tokens_per_pass
        for row in sorted(rows, key=lambda row: row.pending):
            counts[row] = min(row.pending, room, self._free(row))
            room -= counts[row]
        order = sorted((row for row in rows if counts[row]), key=self._order)
        if not order:
            return [], torch.empty(0)
        packed = SlotPass(self._slots, [self._slot_tokens(row, counts[row]) for row in order], self._model.device)
        token_ids = [token for row in order for token in row.tokens(row.computed, row.computed + counts[row])]
        ends_of = zip(order, accumulate(counts[row] for row in order), strict=True)
        ready = {row: end - 1 for row, end in ends_of if counts[row] == row.pending}
        spans = _spans(order, counts)
        logits_B_V = self._forward(packed, token_ids, packed.positions(), spans, list(ready.values()))
        for row in order:
            row.computed += counts[row]
            seat = self._seats[row]
            if seat.keep_prompt and row.computed >= len(row.prompt_ids):
                seat.keep_prompt = False
                self._keep(row, len(row.prompt_ids))
        return list(ready), logits_B_V

    def _order(self, row: BatchRow) -> tuple[str, int, int, int, int]:
        seat = self._seats[row]
        first = seat.prefix and (seat.prefix.parent or seat.prefix)
        return row.adapter, id(first), id(seat.prefix), seat.prefix_length, seat.slot

    def _slot_tokens(self, row: BatchRow, count: int) -> SlotTokens:
        seat = self._seats[row]
        return SlotTokens(
            slot=seat.slot,
            stored=row.computed - seat.prefix_length,
            count=count,
            prefix=seat.prefix.data if seat.prefix else None,
            prefix_length=seat.prefix_length,
        )

    def _keep(self, row: BatchRow, size: int, must: bool = False) -> Prefix | None:
        """Copy the first `size` tokens of a row into the prefix cache; None where there is no room for them, unless
        they `must` be kept."""
        seat = self._seats[row]
        tokens = np.array(row.tokens(0, size), dtype=np.int64)
        prefix = self._beginning(row.adapter, tokens, seat.prefix, seat.prefix_length)
        if not self._prefixes.make_room(prefix.size_bytes) and not must:
            return None
        own = slice(0, size - seat.prefix_length)
        for layer, (keys, values) in enumerate(zip(self._slots.keys, self._slots.values, strict=True)):
            prefix.data.write(layer, seat.prefix_length, keys[seat.slot][:, own], values[seat.slot][:, own])
        prefix.computed, prefix.near, prefix.data.source = size, None, None
        self._prefixes.add(prefix)
        return prefix

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
        self._slots.shrink(len(self._seats))
        self._prefixes.reserved_bytes = self._slots.slots * self._slots.capacity * self._token_bytes
        self._prefixes.make_room(0)

    def reset(self) -> None:
        """Forget all rows and prefixes, and free their memory."""
        for row in list(self._seats):
            row.computed = 0
        self._seats.clear()
        self._by_slot.clear()
        self._computing.clear()
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
