"""Attention for packed passes: every token of every row in one sequence, without padding.

A row's tokens attend to its shared prefix, which is stored once for all rows, and to the row's own tokens, which are
stored in the row's slot. The two parts are computed apart, each with the log of its softmax's denominator, and merged
exactly. Registered through transformers' AttentionInterface, so the models' own code stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...training._upstream import flash_attends, flash_attention
from ...training.layers import register_attention

PACKED_ATTENTION = "bettertogether_packed"


@dataclass(frozen=True)
class AttentionKind:
    """What a layer asks of its attention."""

    scale: float
    window: int | None = None
    """A token sees so many tokens back, itself included; None: all."""
    softcap: float | None = None
    """Scores are squashed to softcap * tanh(score / softcap)."""


class PackedPass(Protocol):
    """One forward pass, as attention sees it."""

    def attend(self, layer: int, q_H_T_D: Tensor, k_K_T_D: Tensor, v_K_T_D: Tensor, kind: AttentionKind) -> Tensor:
        """Store the keys and values, and give each token's attention as [T, H, D]."""
        ...


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: PackedPass | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; `packed` comes from the arguments of the model's call."""
    if packed is None or options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise NotImplementedError("this model's attention can't be packed")
    kind = AttentionKind(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return packed.attend(layer, query[0], key[0], value[0], kind)[None], None


register_attention(PACKED_ATTENTION, packed_attention)


def partial_attention(
    q_B_K_N_D: Tensor, k_B_K_S_D: Tensor, v_B_K_S_D: Tensor, kind: AttentionKind, mask_B_1_N_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: the output [B, K, N, D], and the log of its denominator [B, K, N] in float32.

    `mask_B_1_N_S` is added to the scores; every query must see one key at least. The scores are never held, but for
    layers with a softcap, and on other devices than the CPU under a mask or in float32.
    """
    on_cpu = q_B_K_N_D.device.type == "cpu"
    if kind.softcap is None and (on_cpu or mask_B_1_N_S is None) and flash_attends(q_B_K_N_D, k_B_K_S_D, v_B_K_S_D):
        mask = None if mask_B_1_N_S is None else mask_B_1_N_S.to(q_B_K_N_D.dtype)
        return flash_attention(q_B_K_N_D, k_B_K_S_D, v_B_K_S_D, scale=kind.scale, mask=mask)
    scores_B_K_N_S = torch.matmul(q_B_K_N_D, k_B_K_S_D.transpose(-1, -2)).float().mul_(kind.scale)
    if kind.softcap is not None:
        scores_B_K_N_S.div_(kind.softcap).tanh_().mul_(kind.softcap)
    if mask_B_1_N_S is not None:
        scores_B_K_N_S.add_(mask_B_1_N_S)
    largest_B_K_N_1 = scores_B_K_N_S.amax(-1, keepdim=True)
    weights_B_K_N_S = scores_B_K_N_S.sub_(largest_B_K_N_1).exp_()
    total_B_K_N_1 = weights_B_K_N_S.sum(-1, keepdim=True)
    out_B_K_N_D = torch.matmul(weights_B_K_N_S.to(v_B_K_S_D.dtype), v_B_K_S_D) / total_B_K_N_1
    return out_B_K_N_D.to(v_B_K_S_D.dtype), (largest_B_K_N_1 + total_B_K_N_1.log())[..., 0]


def merge(out_a: Tensor, log_sum_a: Tensor, out_b: Tensor, log_sum_b: Tensor) -> Tensor:
    """Attention over the keys of two parts, from the attention over each. Shapes [..., D] and [...]."""
    share_b = torch.sigmoid(log_sum_b - log_sum_a)[..., None].to(out_a.dtype)
    return torch.lerp(out_a, out_b, share_b)


def hidden(visible: Tensor) -> Tensor:
    """A mask to add to scores, from a mask of what is seen."""
    return torch.zeros(visible.shape, dtype=torch.float32, device=visible.device).masked_fill_(~visible, float("-inf"))


def by_key_head(x_H_N_D: Tensor, key_heads: int) -> Tensor:
    """Queries that share a key head, one after the other: [1, K, G * N, D]."""
    heads, tokens, dim = x_H_N_D.shape
    return x_H_N_D.reshape(1, key_heads, heads // key_heads * tokens, dim)


@dataclass(eq=False)
class PrefixTensors:
    """Keys and values of a prefix, one tensor per layer, [K, P, D], from token `start` on."""

    length: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    parent: PrefixTensors | None = None
    """Holds the first `start` tokens."""
    start: int = 0
    source: PrefixTensors | None = None
    """Prefix with the same parent whose first `copied` tokens are this one's too."""
    copied: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held here."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def parts(self, length: int) -> list[tuple[PrefixTensors, int]]:
        """Where the first `length` tokens are: each tensor's owner, and the token that it ends before."""
        return [*([(self.parent, self.start)] if self.parent else []), (self, length)]

    def write(self, layer: int, start: int, k_K_T_D: Tensor, v_K_T_D: Tensor) -> None:
        """Store the keys and values of the tokens from `start` on. Layers come in order."""
        new = slice(start - self.start, start - self.start + k_K_T_D.shape[1])
        for name, x_K_T_D in (("keys", k_K_T_D), ("values", v_K_T_D)):
            stores: list[Tensor] = getattr(self, name)
            if layer == len(stores):
                stores.append(x_K_T_D.new_empty(x_K_T_D.shape[0], self.length - self.start, x_K_T_D.shape[2]))
                if self.source is not None:
                    old = slice(0, self.copied - self.start)
                    stores[layer][:, old] = getattr(self.source, name)[layer][:, old]
            stores[layer][:, new] = x_K_T_D

    def read(self, layer: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens [first, stop), as [K, S, D]; of more than one part they are a copy."""
        own = slice(max(first - self.start, 0), stop - self.start)
        k_K_S_D, v_K_S_D = self.keys[layer][:, own], self.values[layer][:, own]
        if self.parent is None or first >= self.start:
            return k_K_S_D, v_K_S_D
        k_K_P_D, v_K_P_D = self.parent.read(layer, first, self.start)
        return torch.cat([k_K_P_D, k_K_S_D], 1), torch.cat([v_K_P_D, v_K_S_D], 1)


@dataclass(eq=False)
class PrefixPass:
    """Computes tokens [start, start + T) of a prefix."""

    prefix: PrefixTensors
    start: int

    def attend(self, layer: int, q_H_T_D: Tensor, k_K_T_D: Tensor, v_K_T_D: Tensor, kind: AttentionKind) -> Tensor:
        """Causal attention to the prefix so far."""
        self.prefix.write(layer, self.start, k_K_T_D, v_K_T_D)
        heads, tokens, _ = q_H_T_D.shape
        stop = self.start + tokens
        first = 0 if kind.window is None else max(0, self.start - kind.window + 1)
        k_1_K_S_D, v_1_K_S_D = (x[None] for x in self.prefix.read(layer, first, stop))
        plain = kind.softcap is None and (kind.window is None or kind.window >= stop)
        if self.start == 0 and plain:
            out_H_T_D = nn.functional.scaled_dot_product_attention(
                q_H_T_D[None], k_1_K_S_D, v_1_K_S_D, is_causal=True, scale=kind.scale, enable_gqa=True
            )[0]
            return out_H_T_D.transpose(0, 1)
        key_heads = k_1_K_S_D.shape[1]
        q_1_K_GT_D = by_key_head(q_H_T_D, key_heads)
        if plain and flash_attends(q_1_K_GT_D, k_1_K_S_D, v_1_K_S_D):
            return self._in_two_parts(q_H_T_D, k_1_K_S_D, v_1_K_S_D, kind)
        mask_T_S = self._mask(tokens, kind.window, first, q_H_T_D.device)
        mask_1_1_N_S = mask_T_S.repeat(heads // key_heads, 1)[None, None]
        out, _ = partial_attention(q_1_K_GT_D, k_1_K_S_D, v_1_K_S_D, kind, mask_1_1_N_S)
        return out.reshape(heads, tokens, -1).transpose(0, 1)

    def _in_two_parts(self, q_H_T_D: Tensor, k_1_K_S_D: Tensor, v_1_K_S_D: Tensor, kind: AttentionKind) -> Tensor:
        """To the tokens before the pass, which all of its own see, and causally among its own: without a mask."""
        heads, key_heads = q_H_T_D.shape[0], k_1_K_S_D.shape[1]
        before, own = slice(0, self.start), slice(self.start, None)
        k_1_H_T_D, v_1_H_T_D = (x[:, :, own].repeat_interleave(heads // key_heads, 1) for x in (k_1_K_S_D, v_1_K_S_D))
        q_1_K_GT_D = by_key_head(q_H_T_D, key_heads)
        out, log_sum = flash_attention(q_1_K_GT_D, k_1_K_S_D[:, :, before], v_1_K_S_D[:, :, before], scale=kind.scale)
        out_own, log_sum_own = flash_attention(q_H_T_D[None], k_1_H_T_D, v_1_H_T_D, scale=kind.scale, causal=True)
        whole = merge(out.reshape(out_own.shape), log_sum.reshape(log_sum_own.shape), out_own, log_sum_own)
        return whole[0].transpose(0, 1)

    def _mask(self, tokens: int, window: int | None, first: int, device: torch.device) -> Tensor:
        """For keys from `first` on."""
        query_T_1 = torch.arange(self.start, self.start + tokens, device=device)[:, None]
        key_1_S = torch.arange(first, self.start + tokens, device=device)[None]
        visible_T_S = key_1_S <= query_T_1
        return hidden(visible_T_S if window is None else visible_T_S & (key_1_S > query_T_1 - window))
