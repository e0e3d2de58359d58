"""What a model takes of a device's memory, computed from its config and said before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from ..errors import ModelError
from ..printable import get_logger
from ..training.config import ALL_LINEAR, LoRAConfig, TrainingConfig
from ..training.layers import ATTENTION_LAYERS, head_width
from ..training.machine_memory import left_bytes
from ..training.precision import activation_bytes, tokens_in_memory, wants_checkpointing
from ..training.targets import named_layers
from .adapters import linear_shapes
from .loading import ModelCard, meta_model

logger = get_logger(__name__)

GPU_SHARE = 0.8
"""Of what is free beside the weights, for keys and values; the rest is for what a pass computes."""
PROCESSOR_SHARE = 0.5
"""Other programs are on the same memory, and a processor has no error to react to: the process is killed."""
ADAPTER_BYTES = 5 * 4
"""Of a parameter that is trained: itself, its gradient, AdamW's two moments and the running mean, in float32."""


@dataclass(frozen=True)
class MemoryPlan:
    """Exact but for the training, which is an estimate, for models whose layers all attend in the plain way."""

    parameters: int
    """Of the model; what is tied counts once."""
    weights: int
    """Bytes. On a processor linear layers are held twice where there is room (`packed_linear`), and count once here."""
    token: int
    """Bytes of the keys and values of a token, in all layers."""
    adapter_parameters: int
    """Of a LoRA adapter."""
    training: int
    """Bytes that a training takes besides the weights: the adapter's state, and a forward and backward pass."""

    @classmethod
    def of(
        cls,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
    ) -> Self:
        """The plan for the model of a transformers config."""
        model = meta_model(config, dtype)
        parameters, token = model.num_parameters(), _token_bytes(config.get_text_config(), dtype)
        adapter = _adapter_parameters(model, lora)
        kept = activation_bytes(config, dtype, checkpointed=wants_checkpointing(training, device, parameters))
        tokens = min(training.max_tokens_per_batch, tokens_in_memory(config, device, dtype))
        return cls(
            parameters=parameters,
            weights=sum(parameter.nbytes for parameter in model.parameters()),
            token=token,
            adapter_parameters=adapter,
            training=adapter * ADAPTER_BYTES + tokens * kept,
        )


def announce_memory(
    card: ModelCard, device: torch.device, dtype: torch.dtype, *, cache_bytes: int | None = 0, **options: Any
) -> None:
    """Say in the log what a model will take, with the options of `MemoryPlan.of`, and warn where that is more than is
    free. `cache_bytes` is what keys and values may take, of requests and of the prefixes that they share; None: a share
    of the free memory. Raises ModelError where a GPU can't hold the weights alone."""
    if getattr(card.config, "quantization_config", None) is not None:
        # Its weights take less than the shapes say.
        return
    plan, free = MemoryPlan.of(card.config, device, dtype, **options), free_bytes(device)
    caches = cache_share(device, max(0, free - plan.weights)) if cache_bytes is None else cache_bytes
    weights = f"{_gib(plan.weights)} in {str(dtype).removeprefix('torch.')}"
    logger.info(
        "%s has %.1f million parameters: %s of %s free on %s. Caches take up to %s (%d bytes a token), a training "
        "about %s more than the weights.",
        card.source,
        plan.parameters / 1e6,
        weights,
        _gib(free),
        device,
        _gib(caches),
        plan.token,
        _gib(plan.training),
    )
    if plan.weights > free and device.type == "cuda":
        raise ModelError(
            f"The weights of {card.source!r} take {weights}, and {_gib(free)} of {device} are free. Free memory there, "
            "or give dtype='bfloat16' where it is more, device='cpu' or a smaller model; vllm_lm spreads a model over "
            "several GPUs."
        )
    if plan.weights + caches > free:
        logger.warning(
            "%s may take more memory than is free on %s: weights %s and caches %s, of %s. Give dtype='bfloat16' where "
            "it is more, a smaller cache_bytes, or a smaller model.",
            card.source,
            device,
            weights,
            _gib(caches),
            _gib(free),
        )


def cache_share(device: torch.device, free: int) -> int:
    """Bytes for keys and values, of those that are free beside the weights."""
    return int(free * (GPU_SHARE if device.type == "cuda" else PROCESSOR_SHARE))


def free_bytes(device: torch.device) -> int:
    """Memory that is free: of a GPU with what torch kept there for later use, else of this machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return left_bytes()


def _token_bytes(text: Any, dtype: torch.dtype) -> int:
    kinds = getattr(text, "layer_types", None)
    layers = text.num_hidden_layers if kinds is None else sum(kind in ATTENTION_LAYERS for kind in kinds)
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * layers * key_heads * head_width(text) * dtype.itemsize


def _adapter_parameters(model: PreTrainedModel, lora: LoRAConfig) -> int:
    """Of an adapter on the linear layers that are asked for; "all-linear" is all but the output layer."""
    shapes, targets = linear_shapes(model), lora.target_modules
    if targets == ALL_LINEAR:
        output = model.get_output_embeddings()
        chosen = [name for name in shapes if model.get_submodule(name) is not output]
    else:
        chosen = named_layers(shapes, targets)
    return lora.rank * sum(sum(shapes[name]) for name in chosen)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
