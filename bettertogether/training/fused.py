"""Two operations with a backward pass of their own, for the parts of LoRA training that plain autograd does slowly.

`fused_lora` computes a LoRA layer as `y = W x + b`, then `y += s B (A x)` in the same buffer: no scaled copy, no sum,
and under bfloat16 no casts to and fro. `completion_losses` is cross-entropy whose gradient is made in the forward
pass, a few rows at a time while they are in the processor's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoRALinear
from torch import Tensor, nn

from .layers import LinearUnderAutograd, is_plain_linear
from .token_masks import forbid

CHUNK_ELEMENTS = 1 << 20
"""Logits handled at once in the loss: 4 MiB in float32."""


class _FusedLoRA(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None, a [r, in], b [out, r]. Computes in `compute`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        compute: torch.dtype,
    ) -> Tensor:
        dtype, x = x.dtype, x.to(compute).contiguous()
        x_T_I = x.view(-1, x.shape[-1])
        a, b = a.to(compute), b.to(compute)
        low_T_R = x_T_I @ a.t()
        # Of the shape that is returned: a view would forbid the model to change it in place, as Gemma 3n does.
        y = nn.functional.linear(x, weight.to(compute), None if bias is None else bias.to(compute))
        y.view(-1, y.shape[-1]).addmm_(low_T_R, b.t(), alpha=scale)
        ctx.save_for_backward(x_T_I, low_T_R, weight, a, b)
        ctx.scale, ctx.shape, ctx.dtype, ctx.compute = scale, x.shape, dtype, compute
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_T_I, low_T_R, weight, a, b = ctx.saved_tensors
        grad_T_O = grads[0].reshape(-1, weight.shape[0]).to(ctx.compute)
        grad_low_T_R = (grad_T_O @ b).mul_(ctx.scale)
        grad_a, grad_b = (grad_low_T_R.t() @ x_T_I).float(), (grad_T_O.t() @ low_T_R).float().mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_T_O @ weight.to(ctx.compute)).addmm_(grad_low_T_R, a).view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_a, grad_b, None, None


@contextlib.contextmanager
def fused_lora(model: nn.Module, adapter: str, dtype: torch.dtype, *, gathered: bool = False) -> Iterator[None]:
    """Compute the LoRA layers of `adapter` with the fused operation inside the block.

    Layers that it can't serve (dropout, DoRA and other variants, quantized or transposed weights) keep peft's
    forward. Where the weights are of another dtype than `dtype`, one copy in `dtype` is held inside the block; not of
    weights that are gathered for each pass, and gone after it.
    """
    patched = [m for m in model.modules() if isinstance(m, LoRALinear) and _can_fuse(m, adapter)]
    try:
        for module in patched:
            weight = None if gathered else cast(Tensor, module.get_base_layer().weight).detach().to(dtype)
            module.forward = partial(fused_forward, module, adapter, weight, dtype)  # type: ignore[method-assign]
        yield
    finally:
        for module in patched:
            # The instance attribute hides the class's method; without it the layer is as before.
            module.__dict__.pop("forward", None)


def _can_fuse(module: LoRALinear, adapter: str) -> bool:
    base = module.get_base_layer()
    return (
        type(module) is LoRALinear
        and (is_plain_linear(base) or isinstance(base, LinearUnderAutograd))
        and adapter in module.lora_A
        and isinstance(module.lora_dropout[adapter], nn.Identity)
        and adapter not in module.lora_variant
        and not module.lora_bias[adapter]
        and not module.fan_in_fan_out
        and not module.merged
    )


def fused_forward(
    module: Any, adapter: str, weight: Tensor | None, compute: torch.dtype, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What a layer of peft computes with one adapter, in one step: `x` [..., in] to [..., out]. Without `weight`, with
    that which the base layer has at the time."""
    weight = module.get_base_layer().weight if weight is None else weight
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    bias, scale = module.get_base_layer().bias, module.scaling[adapter]
    result: Tensor = _FusedLoRA.apply(x, weight, bias, a, b, scale, compute)
    return result


class _CompletionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_N_V: Tensor, labels_N: Tensor, temperature_N: Tensor | None, bits_N_W: Tensor | None
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        grad_N_V = torch.empty_like(logits_N_V) if needs_grad else None
        exact = torch.promote_types(logits_N_V.dtype, torch.float32)
        losses_N = logits_N_V.new_empty(len(labels_N), dtype=exact)
        step = max(1, CHUNK_ELEMENTS // logits_N_V.shape[1])
        for start in range(0, len(labels_N), step):
            part = slice(start, start + step)
            chunk = logits_N_V[part].to(exact)
            if temperature_N is not None:
                chunk = chunk / temperature_N[part, None]
            if bits_N_W is not None:
                chunk = forbid(chunk.clone() if temperature_N is None else chunk, bits_N_W[part])
            labels = labels_N[part, None]
            log_sum = torch.logsumexp(chunk, 1, keepdim=True)
            losses_N[part] = (log_sum - chunk.gather(1, labels)).squeeze(1)
            if grad_N_V is not None:
                probabilities = torch.sub(chunk, log_sum).exp_()
                probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, -1.0))
                grad_N_V[part] = probabilities if temperature_N is None else probabilities / temperature_N[part, None]
        ctx.save_for_backward(grad_N_V)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N_V,) = ctx.saved_tensors
        # In place, for want of room for another N x V; autograd refuses a second backward pass over it.
        return grad_N_V.mul_(grads[0][:, None].to(grad_N_V.dtype)), None, None, None


def completion_losses(
    logits_N_V: Tensor, labels_N: Tensor, temperature_N: Tensor | None = None, bits_N_W: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats of each of N predictions, in float32 at least. Backward runs once.

    With a temperature above 0, and the bits of the tokens that are allowed (`token_masks.on_device`), it is that of
    the distribution that such tokens are sampled from.
    """
    result: Tensor = _CompletionLoss.apply(logits_N_V, labels_N, temperature_N, bits_N_W)
    return result
