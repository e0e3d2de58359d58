"""Tiny models and tokenizers of the kinds that are written as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import CHATML, random_model
from small_models import SIZES as SIZES_OF_BYTES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bettertogether.engines.gguf_model import write_gguf
from bettertogether.engines.rendering import PromptRenderer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("a", "b"), ("1", "2"), ("\u0120", "a"), ("\u0120", "ab"), ("\u0120", "\u0120"), ("12", "3"), ("'", "s")]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
SIZES = SIZES_OF_BYTES | {"vocab_size": 272, "pad_token_id": 263, "bos_token_id": 264, "eos_token_id": 265}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
SCALED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
WINDOW: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=SCALED),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "smollm3": SmolLM3Config(**{**SIZES, "num_hidden_layers": 5}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 scaled": Qwen2Config(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**{**SIZES, "num_hidden_layers": 4}, **WINDOW, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, **WINDOW),
}


def splitting(pattern: str) -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern + SPACES), "isolated"), bytes_only])


SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False)
RULES = {
    "gpt-2": WHOLE,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WHOLE]),
    "llama-bpe": splitting(WORDS),
    "qwen2": splitting(WORDS.replace("{1,3}", "")),
}


def byte_level(rule: Any = WHOLE, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a few merges, special tokens, and one that is not special."""
    pieces = [*ALPHABET, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, MERGES))
    tokenizer.pre_tokenizer, tokenizer.decoder = rule, decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<tool>"])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "extra_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Gemma's: spaces as "\u2581", bytes for what has no token, runs as tokens of their own."""
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    bytes_of_text = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581\u2581", *bytes_of_text, *("".join(pair) for pair in merges)]
    pieces += ["\u2581", "\n", *"abc12"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=True)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **names)


def model_of(name: str) -> Any:
    model = random_model(CONFIGS[name])
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # Multiples of 1/64, to which Gemma's one is added and taken away again without rounding.
            parameter.data += torch.randint(-16, 16, parameter.shape) / 64
    return model


def write(path: Path, model: Any, tokenizer: Any, template_kwargs: Any = None) -> PromptRenderer:
    renderer = PromptRenderer(tokenizer, [tokenizer.eos_token_id], template_kwargs)
    write_gguf(path, model, tokenizer, renderer, "tiny")
    return renderer
