"""Exact attention over a packed row, where each row sees what it shares with others and its own tokens.

No T x T matrix is built. A row's attention is split by the blocks of its keys; each part gives an output and the log of
its softmax's denominator, and the parts are merged exactly. The backward pass needs nothing more: flash attention's
backward over a part, given the merged output and denominator, is that part's share of the gradient. Registered through
transformers' AttentionInterface, so the models' own code stays as it is; the layout of the row travels as the keyword
argument `packed_layout` of the model's call.

Measured with 9 heads of 64 (SmolLM2-135M), 8 rows of 146 own tokens, 2 cores, forward and backward of one layer:
261 shared tokens 44 ms against 126 ms with SDPA under a dense mask, 890 shared tokens 111 ms against 262 ms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._upstream import (
    attention_names,
    flash_attends,
    flash_attention,
    flash_attention_backward,
    restore_attention,
)
from .layers import register_attention
from .packing import Block, PackedRow

TRAINING_ATTENTION = "bettertogether_training"
_WINDOWS = "bettertogether_windows"


@dataclass(eq=False)
class PackedLayout:
    """Who sees whom in a packed row of T tokens."""

    packed: PackedRow
    device: torch.device
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, what it shares included."""
        return max(self.packed.position_ids) + 1

    def mask(self, window: int | None) -> Tensor:
        """[T, T], True where a query (first axis) sees a key: for layers with a sliding window shorter than a row."""
        if window not in self._masks:
            position_T = torch.tensor(self.packed.position_ids, device=self.device)
            mask_T_T = torch.zeros(len(position_T), len(position_T), dtype=torch.bool, device=self.device)
            for block in self.packed.blocks:
                mask_T_T[block.start : block.end, block.tokens] = True
            distance_T_T = position_T[:, None] - position_T[None]
            mask_T_T &= distance_T_T >= 0
            if window is not None:
                mask_T_T &= distance_T_T < window
            self._masks[window] = mask_T_T
        return self._masks[window]


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. Query [1, H, T, D], key and value [1, K, T, D] with H a multiple of K.

    Raises NotImplementedError for attention that it can't compute exactly; `loss.why_not_packed` asks before
    training.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "cache") if options.get(name) is not None]
    if packed_layout is None or unknown or dropout:
        raise NotImplementedError(f"packed attention without a layout or with {unknown or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None and sliding_window < packed_layout.longest:
        mask_1_1_T_T = packed_layout.mask(sliding_window)[None, None]
        out = _sdpa(query.to(value.dtype), key.to(value.dtype), value, scale, mask=mask_1_1_T_T)
    else:
        # float32 also under bfloat16: the CPU's flash backward is slower in bfloat16 (1.0 s against 0.7 s a step).
        dtype = torch.float32 if query.device.type == "cpu" else value.dtype
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if flash_attends(q, k, v):
            out = _BlockAttention.apply(q, k, v, scale, packed_layout.packed.blocks)
        else:
            out = attention_by_block(q, k, v, scale, packed_layout.packed.blocks)
    return out.to(value.dtype).transpose(1, 2), None


register_attention(TRAINING_ATTENTION, training_attention)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks, each by flash attention: float32 on the CPU, half precision on CUDA. q [1, H, T, D], k and v
    [1, K, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: tuple[Block, ...]) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k_all, v_all = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        _, heads, tokens, dim = q.shape
        out = q.new_empty(1, tokens, heads, dim).transpose(1, 2)
        log_sum = q.new_empty(1, tokens, heads, dtype=torch.float32).transpose(1, 2)

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            q_part, k_part, v_part = q[:, :, queries], k_all[:, :, keys], v_all[:, :, keys]
            return flash_attention(q_part, k_part, v_part, scale=scale, causal=causal)

        for block in blocks:
            out[:, :, block.tokens], log_sum[:, :, block.tokens] = attend(block.tokens, block.tokens, True)
        for block in _shared(blocks):
            rest = block.rest
            out_block, log_sum_block = attend(rest, block.tokens, False)
            share = torch.sigmoid(log_sum_block - log_sum[:, :, rest])[..., None].to(out.dtype)
            out[:, :, rest] = torch.lerp(out[:, :, rest], out_block, share)
            log_sum[:, :, rest] = torch.logaddexp(log_sum[:, :, rest], log_sum_block)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, log_sum = ctx.saved_tensors
        key_heads = k.shape[1]
        repeats = q.shape[1] // key_heads
        k_all, v_all = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k_all), torch.empty_like(v_all)

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            return flash_attention_backward(
                grad[:, :, queries],
                q[:, :, queries],
                k_all[:, :, keys],
                v_all[:, :, keys],
                out[:, :, queries],
                log_sum[:, :, queries],
                scale=ctx.scale,
                causal=causal,
            )

        for block in ctx.blocks:
            for total, part in zip((grad_q, grad_k, grad_v), attend(block.tokens, block.tokens, True), strict=True):
                total[:, :, block.tokens] = part
        for block in _shared(ctx.blocks):
            part_q, part_k, part_v = attend(block.rest, block.tokens, False)
            grad_q[:, :, block.rest] += part_q
            grad_k[:, :, block.tokens] += part_k
            grad_v[:, :, block.tokens] += part_v
        by_head = (1, key_heads, repeats, *k.shape[2:])
        return grad_q, grad_k.view(by_head).sum(2), grad_v.view(by_head).sum(2), None, None


def _shared(blocks: Iterable[Block]) -> list[Block]:
    """Those that others see."""
    return [block for block in blocks if block.end > block.stop]


def attention_by_block(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Sequence[Block]) -> Tensor:
    """`training_attention` with plain SDPA calls, where flash attention is not to be had (float32 on CUDA, other
    devices): blocks that see the same others padded to the longest, the others' keys repeated."""
    shared = _shared(blocks)
    alike: dict[tuple[Block, ...], list[Block]] = {}
    for block in blocks:
        seen = tuple(other for other in shared if other.stop <= block.start < other.end)
        alike.setdefault(seen, []).append(block)
    parts: dict[int, Tensor] = {}
    for seen, own in alike.items():
        longest, seen_tokens = max(map(len, own)), sum(map(len, seen))

        def padded(x: Tensor, own: list[Block] = own, longest: int = longest) -> Tensor:
            cut = [x[0, :, block.tokens] for block in own]
            return torch.stack([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in cut])

        def with_seen(x: Tensor, seen: tuple[Block, ...] = seen, own: list[Block] = own) -> Tensor:
            return torch.cat([*(x[:, :, block.tokens].expand(len(own), -1, -1, -1) for block in seen), padded(x)], 2)

        # Padding comes after a block's own tokens, so that causality alone hides it from them.
        visible = torch.ones(longest, seen_tokens + longest, dtype=torch.bool, device=q.device).tril(seen_tokens)
        out_B_H_S_D = _sdpa(padded(q), with_seen(k), with_seen(v), scale, mask=visible)
        parts |= {block.start: out_B_H_S_D[i : i + 1, :, : len(block)] for i, block in enumerate(own)}
    return torch.cat([parts[block.start] for block in blocks], 2)


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with an attention implementation, and with its own again afterwards."""
    before = attention_names(model)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        restore_attention(before)


def window_of_mask_alone(model: PreTrainedModel, longest: int | float) -> str | None:
    """Why attention that is given no mask sees too much in texts of up to `longest` tokens: the model has a sliding
    window that its layers leave to the mask (PhiMoE, Doge). None: it has none so short, or they pass it on."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if not window or window >= longest or (types is not None and "sliding_attention" not in types):
        return None
    passed: list[int | None] = []
    try:
        with torch.no_grad(), attention_implementation(model, _WINDOWS):
            model(torch.zeros(1, 2, dtype=torch.long, device=model.device), passed_windows=passed)
    except Exception as error:  # whatever a model's code does with an attention function that it does not know
        return f"{type(error).__name__}: {error}"
    return None if any(passed) else f"its window of {window} tokens is in the mask alone"


def _noting_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    passed_windows: list[int | None],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in form alone: what is looked at is the window that a layer passes on."""
    passed_windows.append(sliding_window)
    batch, heads, tokens = query.shape[:3]
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


register_attention(_WINDOWS, _noting_windows)
