"""Load a model: what can be known without its weights first, the weights when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import ConfigError, ModelError
from ..printable import get_logger
from ..training.adapter_settings import CONFIG_FILE
from ..training.bars import no_bars
from ..training.building import building
from ..training.precision import four_bit_model, give_back_memory
from .fingerprint import TEMPLATES
from .gguf import converted, gguf_in

logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
NO_TEXT = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForNextSentencePrediction", "BertModel", "ElectraModel", "BertForPreTraining",
)  # fmt: skip
"""Ends of the names of architectures that don't predict the next token, though their family may have one that does."""
_SNAPSHOT = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
VARIABLE_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without its weights."""

    source: str
    """Folder or hub id."""
    config: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    """Tokens that end an answer, by the model's generation config."""
    max_length: int
    """Context length in tokens."""
    unknown_tokens: Mapping[int, str] = field(default_factory=dict)
    """Tokens of the tokenizer that the model has no embedding for."""

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.config.get_text_config().vocab_size)

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises ModelError where the model has no embedding for a token."""
        unknown = next((token_id for token_id in token_ids if token_id in self.unknown_tokens), None)
        if unknown is not None:
            raise ModelError(
                f"The text holds {self.unknown_tokens[unknown]!r}, which is token {unknown} of the tokenizer of "
                f"{self.source!r}; the model has embeddings for tokens 0 to {self.vocabulary - 1}. Leave it out, "
                "or give the model more with model.resize_token_embeddings(len(tokenizer)) and train them."
            )


def located(model: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> str | Path:
    """Where transformers finds a model: its folder as an absolute path, or its hub id; of a GGUF file, or a folder that
    holds one, the folder that it is converted to; of a revision of a hub id, or one that needs a token, the folder that
    it is downloaded to. Raises ModelError."""
    place = type(model)(Path(model).expanduser()) if str(model).startswith("~") else model
    with readable(model):
        gguf_file = gguf_in(Path(place))
        is_folder = Path(place).is_dir()
    if gguf_file is not None:
        return converted(gguf_file)
    if is_folder:
        # It is read again, from wherever the process is then.
        return type(model)(Path(place).absolute())
    if revision is None and token is None:
        return place
    try:
        return _snapshot(str(place), revision, token)
    except (OSError, ValueError) as error:
        raise _not_loaded(place, error, revision) from error


def _snapshot(repo: str, revision: str | None, token: str | bool | None) -> Path:
    """What transformers reads of a repository, downloaded."""
    found = snapshot_download(
        repo, revision=revision, token=token, allow_patterns=list(_SNAPSHOT), ignore_patterns=["*/*"]
    )
    snapshot = Path(found)
    rest = [TEMPLATES] if any(snapshot.glob("model*.safetensors")) else [TEMPLATES, "pytorch_model*.bin"]
    # The folder is named after its commit.
    snapshot_download(repo, revision=snapshot.name, token=token, allow_patterns=rest)
    return snapshot


@contextmanager
def readable(model: str | Path) -> Iterator[None]:
    """Raise ModelError where the block finds that the model's files may not be read."""
    try:
        yield
    except PermissionError as error:
        raise ModelError(f"{model} can't be read ({error}). Give a folder that this user may read.") from error


def _not_loaded(source: str | Path, error: BaseException, revision: str | None = None) -> ModelError:
    """What to do about an error of transformers or the hub."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    name = repr(str(source))
    if any("trust_remote_code" in str(each) for each in causes):
        return ModelError(f"{name} needs code of its own, which is not run. Give a model that transformers knows.")
    log_in = "log in with `hf auth login`, set HF_TOKEN, or give token=."
    for kind, said in (
        (GatedRepoError, f"is gated: accept its terms on https://huggingface.co/{source}, and {log_in}"),
        (RevisionNotFoundError, f"has no revision {revision or 'main'!r}: give a branch, tag or commit of it."),
        (RepositoryNotFoundError, f"is not on the hub, or is private: correct the name, or {log_in}"),
        (
            LocalEntryNotFoundError,
            "is not in the hub's cache, and the hub can't be reached: go online, or give a folder.",
        ),
    ):
        if any(isinstance(each, kind) for each in causes):
            return ModelError(f"{name} {said}")
    return ModelError(
        f"{name} can't be loaded as a transformers model: {error} Give the folder of a model (config.json, "
        "model.safetensors, tokenizer.json), a GGUF file, or a hub id that this machine can reach."
    )


def read_card(source: str | Path) -> ModelCard:
    """Read the config and the tokenizer of a model. Raises ModelError."""
    _check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        holds_adapter = find_adapter_config_file(str(source)) is not None
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(source, error) from error
    if holds_adapter:
        raise ModelError(
            f"{str(source)!r} holds an adapter beside the model, which transformers would put into it unasked. Give "
            "the model without adapter_config.json, and adapter= the folder of a PEFT adapter."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{str(source)!r} is of type {config.model_type!r}, which is no causal language model.")
    architectures = config.architectures or ()
    if architectures and all(name.endswith(NO_TEXT) for name in architectures):
        raise ModelError(f"{str(source)!r} is a {architectures[0]}, which writes no text. Give a causal LM.")
    unknown = _unknown_tokens(source, tokenizer, int(config.get_text_config().vocab_size))
    return ModelCard(
        source=str(source),
        config=config,
        tokenizer=tokenizer,
        eos_ids=eos_ids(source, config),
        max_length=_max_length(config),
        unknown_tokens=unknown,
    )


def _unknown_tokens(source: str | Path, tokenizer: Any, vocabulary: int) -> dict[int, str]:
    unknown = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    if unknown:
        logger.warning(
            "The tokenizer of %s has tokens up to %d, the model embeddings for %d: texts with %s can't be answered.",
            source,
            max(unknown),
            vocabulary,
            ", ".join(repr(unknown[number]) for number in sorted(unknown)[:5]),
        )
    return unknown


def _check_source(source: str | Path) -> None:
    """Raises ModelError for what is neither a model's folder nor may be a hub id."""
    folder = Path(source)
    with readable(source):
        is_folder = folder.is_dir()
        if is_folder:
            _check_folder(folder)
    if not is_folder and (isinstance(source, Path) or folder.is_absolute() or str(source).startswith(".")):
        raise ModelError(f"{source} is not a folder. Give the folder of a transformers model, or a hub id.")


def _check_folder(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    has_weights = any(name.endswith(WEIGHTS) for name in names)
    there = {"config.json": "config.json" in names, "model.safetensors": has_weights}
    missing = [name for name, found in there.items() if not found]
    if missing:
        holds_adapter = CONFIG_FILE in names
        hint = " It holds an adapter: load the base model, then add_adapter(folder)." if holds_adapter else ""
        raise ModelError(
            f"{folder} is not the folder of a transformers model: {' and '.join(missing)} missing.{hint} Give the "
            "folder that save_pretrained wrote, or a hub id."
        )


def eos_ids(source: str | Path, config: Any) -> tuple[int, ...]:
    """Tokens that end an answer, by the generation config of a model, or else its config."""
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        eos = config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def _max_length(config: Any) -> int:
    """The context length; where rotary factors change with the length of the text, the part in which they don't."""
    text = config.get_text_config()
    length = int(getattr(text, "max_position_embeddings", 0) or 0)
    if not length:
        raise ModelError(f"The config of this {config.model_type!r} model names no max_position_embeddings.")
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in VARIABLE_ROPE:
        return length
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if original and original < length:
        logger.warning("Context cut from %d to %d tokens: longer texts change the rotary factors.", length, original)
        return int(original)
    return length


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise ConfigError(f'device={device!r} is not allowed: give "auto", "cpu", "cuda", "cuda:0" or "mps".')
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices on this machine."
        )
    if found.type in ("cpu", "cuda"):
        return found
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if there is None or there.type != found.type:
        sees = "only the processor" if there is None else f"the processor and {there.type!r}"
        raise ConfigError(f"device={device!r} is not there: torch sees {sees} on this machine.")
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on the CPU and bfloat16 elsewhere. Raises ConfigError."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f'dtype={dtype!r} is not allowed: give "auto" or one of {sorted(DTYPES)}.')
    return DTYPES[name]


def load_model(card: ModelCard, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with its weights, frozen and in eval mode. Raises ModelError."""
    quantized = getattr(card.config, "quantization_config", None) is not None
    # Quantized weights are put on their device as they are read: many kinds can't be moved afterwards.
    place = {"device_map": {"": device}} if quantized else {}
    try:
        with no_bars():
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
                card.source, dtype=dtype, trust_remote_code=False, **place
            )
            if quantized:
                _first_pass(model)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        raise ModelError(f"The weights of {card.source!r} can't be loaded: {error}") from error
    return (model if quantized else model.to(device)).eval().requires_grad_(False)


@torch.no_grad()
def _first_pass(model: Any) -> None:
    """Now, and not in inference mode: compressed-tensors writes the weights out in a model's first pass."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))


@contextmanager
def model_to_train(card: ModelCard, device: torch.device, *, four_bit: bool = False) -> Iterator[Any]:
    """A model for a training alone, freed after the block. Raises ModelError, and what `four_bit_model` raises."""
    model = four_bit_model(card.source, device) if four_bit else load_model(card, device, pick_dtype("auto", device))
    try:
        yield model
    finally:
        del model
        give_back_memory()


def meta_model(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that a transformers config describes, without its weights."""
    # A copy, since the model writes its precision into it.
    config = copy.deepcopy(config)
    with building(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model
