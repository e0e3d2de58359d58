"""Tiny random models and rows, made on the spot."""

from __future__ import annotations

import random
from typing import Any

from small_models import random_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bettertogether.training.packing import TokenizedRow

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWED: dict[str, Any] = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window shorter than the rows": MistralConfig(**SIZES, sliding_window=12),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window shorter than the rows": Qwen2Config(**SIZES, use_sliding_window=True, **WINDOWED),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, **WINDOWED, query_pre_attn_scalar=16),
    "gemma3, capped logits": Gemma3TextConfig(**SIZES, **WINDOWED, final_logit_softcapping=3.0),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
    "smollm3": SmolLM3Config(**SIZES),
}
GEMMA2 = Gemma2Config(**SIZES, sliding_window=512, attn_logit_softcapping=5.0)


def tiny_model(config: PretrainedConfig | None = None, seed: int = 0, std: float = 0.2) -> PreTrainedModel:
    """A random model, as a training is given it."""
    return random_model(config or FAMILIES["llama"], seed, std)


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that a training might leave behind in a model."""
    return [
        (
            name,
            id(module),
            module.training,
            sorted(module.__dict__),
            sorted(name for name, _ in module.named_children()),
        )
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p.dtype, p.detach().clone().tolist()) for name, p in model.named_parameters()]


def random_rows(number: int, shared: int, own: int = 9, answer: int = 6, seed: int = 0) -> list[TokenizedRow]:
    """Rows whose prompts begin with the same `shared` tokens; the rest differs in content and length."""
    random_ = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [random_.randrange(3, VOCABULARY) for _ in range(count)]

    prefix = tokens(shared)
    return [
        TokenizedRow(prefix + tokens(random_.randint(1, own)), [*tokens(random_.randint(1, answer)), 2])
        for _ in range(number)
    ]
