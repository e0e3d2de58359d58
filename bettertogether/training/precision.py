"""Precision and memory of a training run: bfloat16 where it pays, gradient checkpointing, a 4-bit base."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import ConfigError, MissingExtraError
from ..extras import is_installed
from ._upstream import multiplies_bfloat16_fast, turn_checkpointing_on
from .bars import no_bars
from .config import TrainingConfig
from .machine_memory import all_bytes

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
    return device.type == "cpu" and multiplies_bfloat16_fast()


def checkpoint_gradients(model: PreTrainedModel, training: TrainingConfig) -> None:
    """Turn gradient checkpointing on where the options say so. The caller restores."""
    if not wants_checkpointing(training, model.device, model.num_parameters()):
        return
    if model.supports_gradient_checkpointing:
        turn_checkpointing_on(model)
    elif training.gradient_checkpointing != "auto":
        raise ConfigError(
            f"gradient_checkpointing=True: {type(model).__name__} doesn't support it. Use False, and a smaller "
            "max_tokens_per_batch if memory is short."
        )


def wants_checkpointing(training: TrainingConfig, device: torch.device, parameters: int) -> bool:
    """Whether the options ask for gradient checkpointing of a base model with so many parameters."""
    if training.gradient_checkpointing == "auto":
        return device.type == "cuda" and parameters > CHECKPOINTED_PARAMETERS
    return training.gradient_checkpointing


def activation_bytes(config: PretrainedConfig, dtype: torch.dtype, *, checkpointed: bool = False) -> int:
    """Memory that a token takes in a forward and backward pass, estimated from the sizes of the layers: measured for
    SmolLM2-135M in float32 2.1 MB, estimated 2.1 MB. Checkpointed, each layer keeps its input, and one the rest."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    widest = max(inner) if isinstance(inner, (list, tuple)) else inner
    layer = 14 * text.hidden_size + 6 * widest
    layers = text.num_hidden_layers
    return (layers * text.hidden_size + layer if checkpointed else layers * layer) * dtype.itemsize


def tokens_in_memory(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of one forward and backward pass that this process's part of half of the machine's memory holds; no bound
    on other devices.

    A processor has no out-of-memory error to react to: the process is killed. The share is of all memory, not of what
    is free, so that a run is split the same way every time.
    """
    if device.type != "cpu":
        return sys.maxsize
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, all_bytes() // 2 // processes // activation_bytes(config, dtype))


def give_back_memory() -> None:
    """Let other models and processes have what torch keeps of those that are gone."""
    gc.collect()
    if (device := torch.accelerator.current_accelerator()) is not None:
        # Does nothing where it was never used.
        torch.get_device_module(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("allocate memory", "out of memory"))


def require_four_bit(device: torch.device) -> None:
    """Raise ConfigError where the device is not CUDA, and MissingExtraError without bitsandbytes."""
    if device.type != "cuda":
        raise ConfigError(
            f"quantize_base='4bit' needs a CUDA device; the model is on {device}. Use quantize_base=None."
        )
    if not is_installed("bitsandbytes"):
        raise MissingExtraError("quantize_base='4bit' needs bitsandbytes: pip install bitsandbytes")


def four_bit_model(source: str, device: torch.device) -> PreTrainedModel:
    """The model of a folder or hub id in 4-bit NF4. Raises as `require_four_bit` does."""
    require_four_bit(device)
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    with no_bars():
        quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=BitsAndBytesConfig(**options),
            device_map={"": device},
            trust_remote_code=False,
        )
    return quantized
