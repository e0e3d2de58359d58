"""PEFT folders: which files make one, which adapters are plain LoRA, what they hold and what they are by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ModelError
from .adapter_settings import CONFIG_FILE, check_settings

WEIGHTS_FILE = "adapter_model.safetensors"
CONTENT_FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern",
    "bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip
"""Fields of adapter_config.json that change what an adapter computes."""
REFUSED_OPTIONS = (
    "use_dora", "modules_to_save", "layer_replication", "lora_bias", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
"""Options of adapter_config.json with which an adapter is more than `B A x` beside its layers."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""
ROUND_FILE = "bettertogether.json"
"""Notes how many rounds of training are behind the adapter."""


def content_hash(folder: Path) -> str:
    """SHA-256 (hex) of an adapter's weights and of the settings that change what they do."""
    return content_hash_with(folder, read_adapter_config(folder))


def content_hash_with(folder: Path, config: Mapping[str, Any]) -> str:
    """`content_hash` of the weights in a folder with other settings than those that lie there."""
    relevant = {field: config[field] for field in CONTENT_FIELDS if config.get(field)}
    if isinstance(relevant.get("target_modules"), list):
        relevant["target_modules"] = sorted(relevant["target_modules"])
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def holds_content(folder: Path, content: str) -> bool:
    """Whether a folder holds the adapter with this `content_hash`."""
    try:
        return content_hash(folder) == content
    except (ModelError, OSError):
        return False


def write_round(folder: Path, round_number: int, base_name: str) -> None:
    """Note in an adapter's folder how many rounds of training are behind it."""
    (folder / ROUND_FILE).write_text(json.dumps({"round": round_number, "base": base_name}) + "\n")


def round_of(folder: Path) -> int:
    """How many rounds of training an adapter's folder notes; 1 where it notes none. Raises ModelError."""
    path = folder / ROUND_FILE
    if not path.is_file():
        return 1
    try:
        return int(json.loads(path.read_text())["round"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error!r}); it holds {{'round': a whole number}}. Delete it.") from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter. Raises ModelError for any other."""
    missing = [n for n in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"{folder} holds no {' and no '.join(missing)}: a PEFT LoRA folder is needed, as written by "
            "PeftModel.save_pretrained or by a w step."
        )
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}") from error
    check_settings(path, config)
    _check_plain(folder, config)
    return config


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    refused = [name for name in REFUSED_OPTIONS if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
        raise ModelError(
            f"The adapter in {folder} is of type {config.get('peft_type')!r} with bias={config.get('bias')!r} and "
            f"{refused or 'no further options'}. Served are plain LoRA adapters: no bias, DoRA or modules_to_save."
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ModelError(
            f"The adapter in {folder} was started with init_lora_weights={start!r}, which changes the base model's "
            "weights too, so on the plain base it means something else. Convert it to a plain LoRA adapter when it "
            "is saved: PeftModel.save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file. Raises ModelError, also for those that hold no numbers to compute with."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"The weights in {path} can't be read: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{path} is damaged: {key!r} holds values that are no finite floating-point numbers.")
    if not tensors:
        raise ModelError(f"{path} is damaged: it holds no weights.")
    return tensors
