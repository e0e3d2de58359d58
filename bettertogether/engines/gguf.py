"""From a GGUF file to a plain transformers folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ..errors import ModelError
from ..files import cache_folder, cached_model
from ..printable import get_logger
from ..training.bars import no_bars
from .fingerprint import file_hash
from .gguf_model import rotary_factors

logger = get_logger(__name__)

_PART = re.compile(r"-\d{5}-of-\d{5}$")
VERSION = 2
"""Of what a conversion writes: one that an earlier release left in the cache is not taken for one of this."""

# GGUF names the rule that splits text before BPE; transformers reads every "gpt2" vocabulary with GPT-2's rule. For
# these vocabularies that differs before digits ("  7" is "Ġ", "Ġ", "7" instead of "ĠĠ", "7").
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SCALING = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path names, or that a folder without a config.json holds. Raises ModelError for several, for
    a part of one, and for a file that is not there."""
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ModelError(f"{path} holds {', '.join(file.name for file in files)}: give the path of one of them.")
    else:
        files = [path] if path.suffix == ".gguf" and not path.is_dir() else []
    if not files:
        return None
    if not files[0].is_file():
        raise ModelError(f"{files[0]} is not there: give the path of a GGUF file, or a folder or hub id of a model.")
    if _PART.search(files[0].stem):
        raise ModelError(f"{files[0]} is a part of a model: join the parts with `llama-gguf-split --merge` first.")
    return files[0]


def converted(gguf_file: Path) -> Path:
    """The model of a GGUF file as a transformers folder, which is made in the cache at the first call, with 4 bytes a
    weight. Raises ModelError for a file that transformers can't read, and for a cache that can't be written."""

    def fill(folder: Path) -> None:
        logger.info("%s is converted once, to float32 in %s.", gguf_file, cache_folder())
        convert_gguf(gguf_file, folder)

    return cached_model(f"gguf/{VERSION}-{file_hash(gguf_file)[:16]}/{gguf_file.stem}", fill)


@no_bars()
def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` to `folder` as config, float32 safetensors and tokenizer.

    Quantized weights are expanded. The tokenizer keeps the file's chat template, end-of-turn and padding tokens. Raises
    ModelError for a file that transformers can't read, and OSError for a folder that can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model, tokenizer = _read(gguf_file)
    except ModelError:
        raise
    except Exception as error:  # gguf and transformers raise whatever a file makes them
        raise _unreadable(gguf_file, error) from error
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # safetensors and tokenizers have errors of their own for what the system says.
        raise (OSError(str(error)) if "(os error " in str(error) else _unreadable(gguf_file, error)) from error


def _unreadable(gguf_file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{gguf_file} can't be read as a model ({type(error).__name__}: {error}). Give a GGUF file of an "
        "architecture that transformers reads, or the transformers folder it was made from."
    )


def _read(gguf_file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a file."""
    source, name = str(gguf_file.parent), gguf_file.name
    reader = GGUFReader(str(gguf_file))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32, **_not_read(reader))
    settings = _plain_config(loaded.config.to_dict())
    _set_rope_scaling(reader, settings)
    config = type(loaded.config).from_dict(settings)
    # transformers refuses to save a model that was loaded from GGUF, so the weights move to a fresh one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    _set_ends(reader, tokenizer, model.generation_config)
    tokenizer.model_max_length = config.max_position_embeddings
    if _setting(reader, "tokenizer.ggml.pre") in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    return model, tokenizer


def _set_ends(reader: GGUFReader, tokenizer: Any, generation: Any) -> None:
    """Where a turn ends: at a control token that the chat template writes, or at the one that the file names for that.
    Of these transformers reads the end-of-text token alone."""
    tokens, kinds = (_setting(reader, f"tokenizer.ggml.{name}") or () for name in ("tokens", "token_type"))
    template, special = tokenizer.chat_template or "", tokenizer.all_special_tokens
    # Some are spelled otherwise there: such a one would become a further token.
    vocabulary, known = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    control = [
        known.get(number, token)
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == TokenType.CONTROL and token in template and token not in special and vocabulary.get(token) == number
    ]
    if control:
        tokenizer.add_special_tokens({"additional_special_tokens": control}, replace_extra_special_tokens=False)
    end, eos = _setting(reader, "tokenizer.ggml.eot_token_id"), generation.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if end is not None and end not in ends:
        generation.eos_token_id = [*ends, end]


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    return {key: value for key, value in config.items() if key not in dropped}


def _setting(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _set_rope_scaling(reader: GGUFReader, settings: dict[str, Any]) -> None:
    """The scaling of rotary positions, as llama.cpp reads it and transformers doesn't: of the layers that attend to
    everything, where there are others. Raises ModelError for one that is not known here."""
    prefix = f"{_setting(reader, 'general.architecture')}.rope."
    found = {name.removeprefix(prefix): _setting(reader, name) for name in reader.fields if name.startswith(prefix)}
    scaling = {name.removeprefix("scaling."): value for name, value in found.items() if name.startswith("scaling.")}
    kind, factor = scaling.get("type", "linear"), scaling.get("factor") or found.get("scale_linear") or 1.0
    if kind not in ("none", "linear", "yarn") or not scaling.keys() <= _SCALING:
        raise ModelError(
            f"The file's rotary scaling {scaling} is not known here. Allowed are {', '.join(sorted(_SCALING))}, of "
            "type none, linear or yarn: give the transformers folder that the file was made from."
        )
    if kind == "none" or factor == 1.0:
        return
    rope = settings["rope_parameters"]
    rope = rope.get("full_attention", rope)
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = scaling.get("original_context_length", settings["max_position_embeddings"])
        betas = {name: scaling[f"yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in scaling}
        rope |= {"original_max_position_embeddings": length, **betas}


def _not_read(reader: GGUFReader) -> dict[str, Any]:
    """The settings that transformers leaves at their defaults. Raises ModelError for rotary factors of a file that are
    not those of any Llama 3."""
    kind = _setting(reader, "general.architecture")
    if kind not in ("llama", "qwen3"):
        return {}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    settings: dict[str, Any] = {"head_dim": _setting(reader, f"{kind}.attention.key_length")}
    if kind == "llama":
        settings |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    if "rope_freqs.weight" in tensors:
        factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
        settings["rope_parameters"] = _llama_3(factors, _setting(reader, f"{kind}.rope.freq_base"))
    return {name: value for name, value in settings.items() if value is not None}


def _llama_3(factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """The rotary parameters that make these factors: those of Llama 3.1 to 3.3 differ in the largest one."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max())} | _LLAMA_3_ROPE
    made = rotary_factors(LlamaConfig(head_dim=2 * len(factors), rope_parameters=rope))
    if not torch.allclose(factors, made, rtol=1e-3):
        raise ModelError(f"The file's rotary factors {factors.tolist()} are not those of a Llama 3.")
    return rope
