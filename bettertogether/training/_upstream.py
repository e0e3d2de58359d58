"""What training and engines take of torch, transformers and accelerate that these do not call public: the place to
look when they are upgraded."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

AttentionNames = tuple[tuple[Any, Any], ...]
"""Configs of a model and its parts, each with the name of its attention implementation."""


def attention_name(model: PreTrainedModel) -> str:
    """Name of the attention implementation that a model uses."""
    return str(model.config._attn_implementation)


def name_attention(model: PreTrainedModel, name: str) -> None:
    """Have a model use an attention implementation, without the checks of `set_attn_implementation`."""
    model.config._attn_implementation = name


def attention_names(model: nn.Module) -> AttentionNames:
    """The attention of a model and all its parts, for `restore_attention`."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs += [part for config in configs for key in config.sub_configs if (part := getattr(config, key, None))]
    return tuple((config, config._attn_implementation_internal) for config in configs)


def restore_attention(names: AttentionNames) -> None:
    """Set the attention of all parts of a model as it was."""
    for config, name in names:
        config._attn_implementation_internal = name


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether a model can use torch's attention."""
    return bool(model._supports_sdpa)


def is_stateful(model: Any) -> bool:
    """Whether a model's layers keep a state, by what its class says."""
    return bool(getattr(model, "_is_stateful", False))


def turn_checkpointing_on(model: PreTrainedModel) -> None:
    """Gradient checkpointing, without what `gradient_checkpointing_enable` does beside it: making the embeddings
    require gradients, for nothing."""
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))


def multiplies_bfloat16_fast() -> bool:
    """Whether this processor has instructions for it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def flash_attends(q_B_H_N_D: Tensor, k_B_H_S_D: Tensor, v_B_H_S_D: Tensor) -> bool:
    """Whether `flash_attention` takes these: on the CPU any whose heads are alike, on CUDA those of half precision and
    of a width that its kernels are made for."""
    if k_B_H_S_D.shape != v_B_H_S_D.shape:
        return False
    if q_B_H_N_D.device.type != "cuda":
        return q_B_H_N_D.device.type == "cpu"
    if q_B_H_N_D.shape[-1] % 8:
        # `scaled_dot_product_attention`, for which torch answers below, would fill them up.
        return False
    asked = torch.backends.cuda.SDPAParams(q_B_H_N_D, k_B_H_S_D, v_B_H_S_D, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(asked)


def flash_attention(
    q_B_H_N_D: Tensor,
    k_B_H_S_D: Tensor,
    v_B_H_S_D: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log of the softmax's denominator [B, H, N] in float32. A mask on the CPU only; `causal` where
    there are as many queries as keys."""
    if q_B_H_N_D.device.type == "cpu":
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_B_H_N_D, k_B_H_S_D, v_B_H_S_D, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_B_H_N_D, k_B_H_S_D, v_B_H_S_D, 0.0, causal, False, scale=scale
        )
    return out, log_sum


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of `flash_attention`."""
    grads: tuple[Tensor, Tensor, Tensor]
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal, scale=scale
        )
        return grads
    # The state of the random numbers, which only dropout asks for.
    seed, offset = (q.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))
    tokens = q.shape[2], k.shape[2]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, log_sum, None, None, *tokens, 0.0, causal, seed, offset, scale=scale
    )
    return grads


def new_accelerator() -> Accelerator:
    """What accelerate made of this process. It shards models on GPUs alone; here also where processes share the CPU."""
    accelerator = Accelerator()
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def plain_name(parameter: str) -> str:
    """A parameter's name without the modules that checkpointing puts between."""
    return parameter.replace("_checkpoint_wrapped_module.", "")
