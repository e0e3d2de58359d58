"""From a GGUF file to a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

# GGUF names the rule that splits text before BPE; transformers reads every "gpt2" vocabulary with GPT-2's rule. For
# these vocabularies that differs before digits ("  7" is "Ġ", "Ġ", "7" instead of "ĠĠ", "7").
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` to `folder` as config, float32 safetensors and tokenizer.

    Quantized weights are expanded. The tokenizer keeps the file's chat template, end-of-turn and padding tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = type(loaded.config).from_dict(_plain_config(loaded.config.to_dict()))
    # transformers refuses to save a model that was loaded from GGUF, so the weights move to a fresh one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    if _pre_tokenizer_name(gguf_file) in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(folder)


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    return {key: value for key, value in config.items() if key not in dropped}


def _pre_tokenizer_name(gguf_file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(str(gguf_file)).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
