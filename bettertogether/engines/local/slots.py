"""Passes over the tokens of many rows: each attends to its shared prefix and to the row's own tokens in its slot."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .packed_attention import AttentionKind, PrefixTensors, by_key_head, hidden, merge, partial_attention

PRIVATE: dict[str, int] = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Memory that a forked process has a copy of."""


def zeros_on_demand(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a tensor's type and device. On a processor their memory is taken only where they are written, so that
    an answer that ends early never has that of its longest."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, like.itemsize * math.prod(shape), **PRIVATE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


class Slots:
    """Keys and values of the rows' own tokens: one slot a row, [slots, K, capacity, D] per layer.

    Slots 0 to n - 1 are in use, so that the attention of all rows is one product over a view.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.slots = 0
        self.capacity = 0

    def grown(self, slots: int, capacity: int) -> tuple[int, int]:
        """Slots and tokens in each where there is room for so many rows of so many tokens; rounded up, so that copies
        stay rare."""
        return max(self.slots, 1 << (slots - 1).bit_length()), max(self.capacity, (capacity + 63) // 64 * 64)

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for so many rows of so many tokens."""
        used, filled = self.slots, self.capacity
        self.slots, self.capacity = self.grown(slots, capacity)
        if (self.slots, self.capacity) == (used, filled):
            return
        for stores in (self.keys, self.values):
            for layer, old in enumerate(stores):
                stores[layer] = zeros_on_demand(old, self.slots, old.shape[1], self.capacity, old.shape[3])
                stores[layer][:used, :, :filled] = old

    def write(self, layer: int, slot_T: Tensor, place_T: Tensor, k_K_T_D: Tensor, v_K_T_D: Tensor) -> None:
        """Store keys and values of tokens, each at its place in its slot."""
        if layer == len(self.keys):
            for stores, x in ((self.keys, k_K_T_D), (self.values, v_K_T_D)):
                stores.append(zeros_on_demand(x, self.slots, x.shape[0], self.capacity, x.shape[2]))
        self.keys[layer][slot_T, :, place_T] = k_K_T_D.transpose(0, 1)
        self.values[layer][slot_T, :, place_T] = v_K_T_D.transpose(0, 1)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one slot to another."""
        for stores in (self.keys, self.values):
            for store in stores:
                store[target, :, :tokens] = store[source, :, :tokens]

    def shrink(self, slots: int) -> None:
        """Free the memory that so few rows leave unused; seldom, since what is in use is copied."""
        if 0 < slots <= self.slots // 4:
            self.slots = 1 << (slots - 1).bit_length()
            for stores in (self.keys, self.values):
                stores[:] = [store[: self.slots].clone() for store in stores]
        elif not slots:
            self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self.keys.clear()
        self.values.clear()
        self.slots = self.capacity = 0


@dataclass(frozen=True)
class SlotTokens:
    """The tokens that one row brings into a pass."""

    slot: int
    stored: int
    """Tokens in the slot before the pass."""
    count: int
    prefix: PrefixTensors | None
    prefix_length: int
    """Tokens of the prefix that this row attends to, and the position of its first own token."""


@dataclass(frozen=True)
class _Group:
    """Tokens [start, stop) of the pass, which attend to the same prefix, or part of one, up to its token `length`."""

    start: int
    stop: int
    prefix: PrefixTensors
    length: int


@dataclass(frozen=True)
class _Block:
    """Rows whose own attention is one batched product: so many slots, each with up to N tokens of the pass."""

    slots: slice | Tensor
    tokens: Tensor
    """Place in the pass of each slot's tokens, [M, N]; the last one repeats where a slot has fewer."""
    places: Tensor
    """Place in the slot of each of these tokens, [M, N]."""
    keys: int
    """Keys looked at in each slot."""
    answers: Tensor | None
    """Which of the M * N results count, [A]; None: all, and in the order of the pass."""
    targets: Tensor | None
    """Place in the pass of each of these, [A]; None: as they come."""


@dataclass(eq=False)
class SlotPass:
    """A pass over tokens of many rows. Rows that attend to the same prefix come one after the other."""

    slots: Slots
    rows: Sequence[SlotTokens]
    device: torch.device
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q_H_T_D: Tensor, k_K_T_D: Tensor, v_K_T_D: Tensor, kind: AttentionKind) -> Tensor:
        """Attention of each row's tokens to its prefix and to its own tokens, [T, H, D]."""
        slot_T, place_T = self._writes
        self.slots.write(layer, slot_T, place_T, k_K_T_D, v_K_T_D)
        if kind.window is not None and kind.window >= self._longest:
            kind = AttentionKind(kind.scale, None, kind.softcap)
        out_T_H_D, log_sum_T_H = self._attend_own(layer, q_H_T_D, kind)
        for groups in self._groups:
            part_T_H_D, part_log_sum_T_H = self._attend_prefixes(groups, layer, q_H_T_D, kind)
            out_T_H_D = merge(part_T_H_D, part_log_sum_T_H, out_T_H_D, log_sum_T_H)
            if groups is not self._groups[-1]:
                log_sum_T_H = torch.logaddexp(part_log_sum_T_H, log_sum_T_H)
        return out_T_H_D

    def _attend_prefixes(
        self, groups: Sequence[_Group], layer: int, q_H_T_D: Tensor, kind: AttentionKind
    ) -> tuple[Tensor, Tensor]:
        parts = [self._attend_prefix(group, layer, q_H_T_D, kind) for group in groups]
        tokens, heads, dim = q_H_T_D.shape[1], *parts[0][0].shape[1:]
        if len(parts[0][0]) == tokens:
            return parts[0]
        out_T_H_D = q_H_T_D.new_zeros(tokens, heads, dim)
        log_sum_T_H = torch.full((tokens, heads), float("-inf"), dtype=torch.float32, device=self.device)
        for group, (out_N_H_D, log_sum_N_H) in zip(groups, parts, strict=True):
            out_T_H_D[group.start : group.stop] = out_N_H_D
            log_sum_T_H[group.start : group.stop] = log_sum_N_H
        return out_T_H_D, log_sum_T_H

    def _attend_prefix(self, group: _Group, layer: int, q_H_T_D: Tensor, kind: AttentionKind) -> tuple[Tensor, Tensor]:
        q_H_N_D = q_H_T_D[:, group.start : group.stop]
        heads, tokens, _ = q_H_N_D.shape
        first = group.prefix.start
        k_K_P_D, v_K_P_D = group.prefix.read(layer, first, group.length)
        key_heads = k_K_P_D.shape[0]
        mask, seen_N = None, None
        if kind.window is not None:
            position_N = self._positions[group.start : group.stop]
            visible_N_P = torch.arange(first, group.length, device=self.device) > position_N[:, None] - kind.window
            seen_N = visible_N_P[:, -1].clone()
            visible_N_P[:, -1] = True
            mask = hidden(visible_N_P).repeat(heads // key_heads, 1)[None, None]
        out, log_sum = partial_attention(by_key_head(q_H_N_D, key_heads), k_K_P_D[None], v_K_P_D[None], kind, mask)
        log_sum_N_H = log_sum.reshape(heads, tokens).t()
        if seen_N is not None:
            log_sum_N_H = log_sum_N_H.masked_fill(~seen_N[:, None], float("-inf"))
        return out.reshape(heads, tokens, -1).transpose(0, 1), log_sum_N_H

    def _attend_own(self, layer: int, q_H_T_D: Tensor, kind: AttentionKind) -> tuple[Tensor, Tensor]:
        q_T_H_D = q_H_T_D.transpose(0, 1)
        parts = [self._attend_block(number, layer, q_T_H_D, kind) for number in range(len(self._blocks))]
        if self._blocks[0].answers is None:
            return parts[0]
        tokens, heads, dim = len(q_T_H_D), *parts[0][0].shape[1:]
        out_T_H_D = q_T_H_D.new_empty(tokens, heads, dim)
        log_sum_T_H = torch.empty(tokens, heads, dtype=torch.float32, device=self.device)
        for block, (out_A_H_D, log_sum_A_H) in zip(self._blocks, parts, strict=True):
            out_T_H_D[block.targets] = out_A_H_D[block.answers]
            log_sum_T_H[block.targets] = log_sum_A_H[block.answers]
        return out_T_H_D, log_sum_T_H

    def _attend_block(self, number: int, layer: int, q_T_H_D: Tensor, kind: AttentionKind) -> tuple[Tensor, Tensor]:
        block, heads = self._blocks[number], q_T_H_D.shape[1]
        slots, width = block.tokens.shape
        k_M_K_L_D = self.slots.keys[layer][block.slots, :, : block.keys]
        v_M_K_L_D = self.slots.values[layer][block.slots, :, : block.keys]
        key_heads, dim = k_M_K_L_D.shape[1], v_M_K_L_D.shape[3]
        q_A_H_D = q_T_H_D if block.answers is None else q_T_H_D[block.tokens.flatten()]
        q_M_N_K_G_D = q_A_H_D.view(slots, width, key_heads, heads // key_heads, -1)
        q_M_K_GN_D = q_M_N_K_G_D.permute(0, 2, 3, 1, 4).reshape(slots, key_heads, heads // key_heads * width, -1)
        mask = self._own_mask(number, kind.window, heads // key_heads)
        out, log_sum = partial_attention(q_M_K_GN_D, k_M_K_L_D, v_M_K_L_D, kind, mask)
        out_A_H_D = out.reshape(slots, heads, width, dim).transpose(1, 2).reshape(-1, heads, dim)
        return out_A_H_D, log_sum.reshape(slots, heads, width).transpose(1, 2).reshape(-1, heads)

    def _own_mask(self, number: int, window: int | None, repeats: int) -> Tensor:
        """Mask of a block, [M, 1, G * N, L]; the same in every layer with the same window."""
        if (number, window) not in self._masks:
            block = self._blocks[number]
            key_L = torch.arange(block.keys, device=self.device)
            visible_M_N_L = key_L <= block.places[..., None]
            if window is not None:
                visible_M_N_L &= key_L > block.places[..., None] - window
            self._masks[number, window] = hidden(visible_M_N_L).repeat(1, repeats, 1)[:, None]
        return self._masks[number, window]

    @cached_property
    def _starts(self) -> list[int]:
        """Place in the pass of each row's first token, and the number of tokens at the end."""
        starts = [0]
        for row in self.rows:
            starts.append(starts[-1] + row.count)
        return starts

    @cached_property
    def _writes(self) -> tuple[Tensor, Tensor]:
        slots = [row.slot for row in self.rows for _ in range(row.count)]
        places = [place for row in self.rows for place in range(row.stored, row.stored + row.count)]
        return torch.tensor(slots, device=self.device), torch.tensor(places, device=self.device)

    @cached_property
    def _positions(self) -> Tensor:
        return torch.tensor(self.positions(), device=self.device)

    def positions(self) -> list[int]:
        """Position in its text of each token of the pass."""
        first = [(row.prefix_length + row.stored, row.count) for row in self.rows]
        return [position for start, count in first for position in range(start, start + count)]

    @cached_property
    def _longest(self) -> int:
        return max(row.prefix_length + row.stored + row.count for row in self.rows)

    @cached_property
    def _groups(self) -> list[list[_Group]]:
        """Of the parts that prefixes have, all first ones, then all second ones."""
        groups: list[list[_Group]] = []
        for row, start in zip(self.rows, self._starts, strict=False):
            parts = row.prefix.parts(row.prefix_length) if row.prefix is not None and row.prefix_length else []
            groups += [[] for _ in parts[len(groups) :]]
            for alike, (prefix, length) in zip(groups, parts, strict=False):
                last = alike[-1] if alike else None
                if last and last.stop == start and last.prefix is prefix and last.length == length:
                    alike[-1] = _Group(last.start, start + row.count, prefix, length)
                else:
                    alike.append(_Group(start, start + row.count, prefix, length))
        return groups

    @cached_property
    def _blocks(self) -> list[_Block]:
        """Rows of one token, over a view of the slots; and rows of more, by size, so that little is padded."""
        by_size: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            # Sizes 1, 2-4, 5-16, 17-64, ...: a padded row is at most four times as long as it need be.
            by_size.setdefault(((row.count - 1).bit_length() + 1) // 2, []).append(number)
        return [self._block(numbers) for numbers in by_size.values()]

    def _block(self, numbers: list[int]) -> _Block:
        # In the order of their slots, the rows' keys are a view of the slots, most often.
        numbers = sorted(numbers, key=lambda number: self.rows[number].slot)
        rows = [self.rows[number] for number in numbers]
        width = max(row.count for row in rows)
        keys = max(row.stored + row.count for row in rows)
        in_order = width == 1 and numbers == list(range(len(self.rows)))
        slots = [row.slot for row in rows]
        token_M_N = [
            [self._starts[number] + min(place, row.count - 1) for place in range(width)]
            for number, row in zip(numbers, rows, strict=True)
        ]
        place_M_N = [[row.stored + min(place, row.count - 1) for place in range(width)] for row in rows]
        answers = [number * width + place for number, row in enumerate(rows) for place in range(row.count)]
        targets = [self._starts[number] + place for number in numbers for place in range(self.rows[number].count)]
        sequence = slots == list(range(slots[0], slots[0] + len(slots)))
        return _Block(
            slots=slice(slots[0], slots[0] + len(slots)) if sequence else torch.tensor(slots, device=self.device),
            tokens=torch.tensor(token_M_N, device=self.device),
            places=torch.tensor(place_M_N, device=self.device),
            keys=keys,
            answers=None if in_order else torch.tensor(answers, device=self.device),
            targets=None if in_order else torch.tensor(targets, device=self.device),
        )
