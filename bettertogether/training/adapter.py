"""A LoRA adapter that is added to a model for the time of a training run, and taken off without a trace."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, ModelError, NotTrainableError
from ..files import atomic_write
from ..printable import get_logger
from ._upstream import plain_name
from .adapter_folder import WEIGHTS_FILE, read_adapter_config, read_tensors
from .adapter_settings import CONFIG_FILE
from .building import building
from .config import LoRAConfig
from .lending import ModelState, random_state_kept
from .sharing import all_whole, like
from .targets import chosen_layers

logger = get_logger(__name__)

ADAPTER_NAME = "bettertogether_training"
KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TrainableAdapter:
    """The adapter under training. Its weights are the only ones of the model that require gradients."""

    base: PreTrainedModel
    config: LoraConfig

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights by their key in a PEFT file."""
        marker = f".{ADAPTER_NAME}"
        return {
            KEY_PREFIX + plain_name(name).replace(marker, ""): parameter
            for name, parameter in self.base.named_parameters()
            if marker in name
        }

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU."""
        return all_whole(self.parameters)

    def digest(self) -> str:
        """SHA-256 (hex) of the options and the weights."""
        return adapter_digest(self.config, self.state())

    def load(self, state: Mapping[str, Tensor], source: object) -> None:
        """Set the weights. Raises ModelError, naming `source`, when they are another adapter's."""
        own = self.parameters
        wrong = sorted(
            key
            for key in own.keys() | state.keys()
            if key not in own or key not in state or own[key].shape != state[key].shape
        )
        if wrong:
            raise ModelError(
                f"The adapter in {source} does not fit {self.base.name_or_path or 'the model'}: {len(wrong)} weights "
                f"are missing, unknown or of another shape, the first {wrong[0]!r}. Give an adapter of this model."
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(like(state[key], parameter))


def adapter_digest(config: LoraConfig, state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of an adapter's options and weights, wherever its base model lies."""
    options = config_json(replace(config, base_model_name_or_path=None))
    return hashlib.sha256(options.encode() + save(dict(state))).hexdigest()


def save_adapter(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Write a PEFT folder; the same weights and options give the same bytes. The config, written last, completes it."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / WEIGHTS_FILE, save(dict(state), metadata={"format": "pt"}))
    atomic_write(folder / CONFIG_FILE, config_json(config) + "\n")


def config_json(config: LoraConfig) -> str:
    """An adapter_config.json; sets come sorted, so that the same options give the same text."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(values | {"inference_mode": True}, indent=2, sort_keys=True)


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and weights of a PEFT folder with a plain LoRA adapter. Raises ModelError."""
    read_adapter_config(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"The adapter in {folder} can't be read ({error}): give a PEFT LoRA folder.") from error
    config.inference_mode = False
    return config, read_tensors(folder / WEIGHTS_FILE)


@contextlib.contextmanager
def training_adapter(
    model: PreTrainedModel | PeftModel, lora: LoRAConfig, seed: int, start_from: Path | None = None
) -> Iterator[TrainableAdapter]:
    """Add a LoRA adapter for the block; afterwards, also after an exception, the model is exactly as before.

    `start_from` continues an adapter: its weights and its own rank, scale and layers, whatever `lora` says; another
    rank that was asked for is told in the log. The initial weights depend on `seed` alone. The global random state is
    left as it was.
    """
    base = _base_of(model)
    loaded = None if start_from is None else read_adapter(start_from)
    if loaded is not None and lora.rank not in (loaded[0].r, LoRAConfig().rank):
        logger.warning(
            "%s is trained further, and keeps its rank %d: LoRAConfig(rank=%d) is for a new adapter, which "
            "start_from='base' makes.",
            start_from,
            loaded[0].r,
            lora.rank,
        )
    config = _peft_config(lora, base, chosen_layers(base, lora.target_modules)) if loaded is None else loaded[0]
    snapshot = _Snapshot.take(model)
    try:
        _add(model, base, config, seed)
        adapter = TrainableAdapter(base, config)
        if loaded is not None:
            adapter.load(loaded[1], start_from)
        yield adapter
    finally:
        snapshot.restore()


def _base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise NotTrainableError(
            "The model was loaded under torch.inference_mode(): load it outside, it can't be trained."
        )
    if not isinstance(model, PeftModel):
        return model
    if not all(config.peft_type == "LORA" for config in model.peft_config.values()):
        kinds = sorted({str(config.peft_type) for config in model.peft_config.values()})
        raise NotTrainableError(f"The model holds adapters of type {kinds}; only LoRA adapters may be beside this one.")
    base = cast(PreTrainedModel, model.get_base_model())
    if any(layer.merged for layer in base.modules() if isinstance(layer, BaseTunerLayer)):
        raise NotTrainableError("An adapter is merged into the base weights: call model.unmerge_adapter() first.")
    return base


def _peft_config(lora: LoRAConfig, base: PreTrainedModel, layers: list[str]) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=layers,
        fan_in_fan_out=any(_is_transposed(base.get_submodule(name)) for name in layers),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name_or_path or None,
    )


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, Conv1D)


def _add(model: PreTrainedModel | PeftModel, base: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    with building(), random_state_kept(base):
        torch.manual_seed(seed)
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(ADAPTER_NAME, config)
            else:
                inject_adapter_in_model(config, base, ADAPTER_NAME)
        except ValueError as error:
            raise ConfigError(f"An adapter of this kind can't be added to {type(base).__name__}: {error}") from error
    cast_adapter_dtype(base, ADAPTER_NAME)
    config.target_modules = _short_names(base, config.target_modules)
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = [ADAPTER_NAME]
            layer._disable_adapters = False
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(f".{ADAPTER_NAME}" in name)


def _short_names(base: PreTrainedModel, targets: Any) -> Any:
    """Targets such as "q_proj" instead of every layer's full name, where that means the same layers."""
    adapted = {name for name, m in base.named_modules() if isinstance(m, LoraLayer) and ADAPTER_NAME in m.lora_A}
    short = {name.rpartition(".")[2] for name in adapted}
    alike = {name for name, m in base.named_modules() if name.rpartition(".")[2] in short}
    return short if alike == adapted else targets


@dataclass(frozen=True)
class _Snapshot:
    """Everything about a model that training changes, but for the weights, which it does not change."""

    model: PreTrainedModel | PeftModel
    state: ModelState
    requires_grad: tuple[tuple[nn.Parameter, bool], ...]
    active: tuple[tuple[Any, Any], ...]

    @classmethod
    def take(cls, model: PreTrainedModel | PeftModel) -> _Snapshot:
        """Note the state of the model."""
        holders = [model, model.base_model] if isinstance(model, PeftModel) else []
        return cls(
            model,
            ModelState.of(model),
            tuple((parameter, parameter.requires_grad) for parameter in model.parameters()),
            tuple((holder, holder.active_adapter) for holder in holders),
        )

    def restore(self) -> None:
        """Bring the model back to it."""
        if isinstance(self.model, PeftModel):
            self.model.peft_config.pop(ADAPTER_NAME, None)
        self.state.restore()
        for layer in self.model.modules():
            # Not active any more, so that deleting it picks no other adapter and warns of nothing.
            if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.r and ADAPTER_NAME not in layer.active_adapters:
                layer.delete_adapter(ADAPTER_NAME)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)
        for holder, active in self.active:
            holder.active_adapter = active
