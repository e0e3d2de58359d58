"""Merge a LoRA adapter into its base model and write a plain Hugging Face model, or GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError
from ..files import atomic_folder
from ..training.adapter_folder import read_adapter_config
from ..training.bars import no_bars
from .adapters import linear_shapes, read_weights
from .fingerprint import model_hash, short_name
from .gguf_model import write_gguf
from .loading import eos_ids, located
from .ollama import modelfile
from .rendering import PromptRenderer

GGUF_FILE = "model.gguf"


def merge_adapter(base: str | Path, adapter: Path, out: Path) -> None:
    """Write base plus adapter to `out`, in the base's own precision, with its tokenizer. Raises ModelError.

    `base` is a transformers folder or a hub id; see `Base.at`. `out` must be new or empty; it appears when it is
    complete. Needs memory for the base and one layer in float32.
    """
    model, tokenizer = _merged(base, adapter)
    with _written_whole(out) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def merge_to_gguf(
    base: str | Path,
    adapter: Path,
    out: Path,
    template_kwargs: Mapping[str, Any] | None,
    sampling: Mapping[str, Any],
) -> None:
    """As `merge_adapter`, but `out` has model.gguf and an Ollama Modelfile.

    `template_kwargs` are the variables of the chat template that the adapter was trained under, `sampling` the options
    of its LM. Raises ModelError also for a model that llama.cpp doesn't have.
    """
    model, tokenizer = _merged(base, adapter)
    renderer = PromptRenderer(tokenizer, eos_ids(base, model.config), template_kwargs)
    with _written_whole(out) as work:
        write_gguf(work / GGUF_FILE, model, tokenizer, renderer, short_name(base))
        text = modelfile(GGUF_FILE, renderer, tokenizer, model.config.max_position_embeddings, sampling)
        (work / "Modelfile").write_text(text, encoding="utf-8")


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    try:
        with atomic_folder(out) as work, no_bars():
            yield work
    except (OSError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{out} can't be written: {error}") from error


def _merged(base: str | Path, adapter: Path) -> tuple[Any, Any]:
    config = read_adapter_config(adapter)
    model, tokenizer = _load(str(base))
    _merge(model, read_weights(adapter, config, linear_shapes(model)), adapter)
    return model, tokenizer


@dataclass(frozen=True)
class Base:
    """A base model by place and content."""

    base_name: str
    base_hash: str

    @classmethod
    def at(cls, source: str | Path) -> Base:
        """The model in a folder or under a hub id. Raises ModelError."""
        name = str(located(source))
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise _not_loaded(name, error) from error
        return cls(name, model_hash(name, getattr(config, "_commit_hash", None)))

    @property
    def short_name(self) -> str:
        """As an engine calls it."""
        return short_name(self.base_name)


def _not_loaded(base: str, error: Exception) -> ModelError:
    return ModelError(f"The base model {base!r} can't be loaded ({error}): give its folder or hub id as base_model=.")


def _load(base: str) -> tuple[Any, Any]:
    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(base, error) from error
    if getattr(model, "is_quantized", False):
        raise ModelError(f"The base model {base!r} is quantized: give the unquantized one as base_model=.")
    return model, tokenizer


@torch.no_grad()
def _merge(model: Any, weights: dict[str, tuple[torch.Tensor, torch.Tensor]], adapter: Path) -> None:
    """Add `B A` to each adapted layer, in float32."""
    _untie(model, weights)
    for name, (a_I_R, b_R_O) in weights.items():
        layer = model.get_submodule(name)
        update_I_O = a_I_R.float() @ b_R_O.float()
        # Conv1D keeps its weight as [in, out].
        update = update_I_O.T if isinstance(layer, nn.Linear) else update_I_O
        merged = layer.weight.float() + update.to(layer.weight.device)
        layer.weight.copy_(merged)
        if not torch.isfinite(layer.weight).all():
            raise ModelError(
                f"{name} with the adapter in {adapter} has values beyond {layer.weight.dtype}: merge into the base in "
                "another precision, given as base_model=."
            )


def _untie(model: Any, layers: dict[str, Any]) -> None:
    """Give an adapted output layer weights of its own where it shares those of the embedding."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is not None and output.weight is embedding.weight
    if tied and any(model.get_submodule(name) is output for name in layers):
        output.weight = nn.Parameter(output.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
