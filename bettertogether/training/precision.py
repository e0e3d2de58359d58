"""Precision and memory of a training run: bfloat16 where it pays, gradient checkpointing, a 4-bit base."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ConfigError, MissingExtraError
from .config import TrainingConfig

CHECKPOINTED_PARAMETERS = 1_000_000_000
"""Base models above this are checkpointed on CUDA unless told otherwise."""


def compute_dtype(model: PreTrainedModel, training: TrainingConfig) -> torch.dtype:
    """Precision of the forward and backward pass.

    "auto" is bfloat16 where the hardware multiplies it fast and else float32. SmolLM2-135M on 2 cores with
    avx512_bf16: 1.6 times as fast as float32. Raises ConfigError for float32 over a base that is held in less.
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    if training.dtype == "float32" and half:
        raise ConfigError(
            f"dtype='float32' can't be had from a base model held in {model.dtype}: load it in float32, or train with "
            "dtype='bfloat16' or 'auto'."
        )
    if training.dtype == "auto":
        return torch.bfloat16 if half or _fast_bfloat16(model.device) else torch.float32
    return torch.bfloat16 if training.dtype == "bfloat16" else torch.float32


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def checkpoint_gradients(model: PreTrainedModel, training: TrainingConfig) -> bool:
    """Turn gradient checkpointing on where the options say so; returns whether it is on. The caller restores."""
    wanted = training.gradient_checkpointing
    if wanted == "auto":
        wanted = model.device.type == "cuda" and model.num_parameters() > CHECKPOINTED_PARAMETERS
    if wanted:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing=True: {type(model).__name__} doesn't support it. Use False, and a smaller "
                "max_tokens_per_batch if memory is short."
            )
        # Not gradient_checkpointing_enable: that also makes the embeddings require gradients, for nothing.
        model._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
        )
    return bool(wanted)


def four_bit_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same base model loaded again in 4-bit NF4, from the folder or hub id that it came from.

    Raises ConfigError without CUDA and MissingExtraError without bitsandbytes.
    """
    if model.device.type != "cuda":
        raise ConfigError(
            f"quantize_base='4bit' needs a CUDA device; the model is on {model.device}. Use quantize_base=None."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("quantize_base='4bit' needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.name_or_path, quantization_config=BitsAndBytesConfig(**options), device_map={"": model.device}
    )
    return quantized
