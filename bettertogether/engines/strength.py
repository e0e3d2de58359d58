"""An adapter at another strength: the same matrices, with their scale multiplied, as a PEFT folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_folder, atomic_write, disk_errors
from ..training.adapter_folder import (
    ROUND_FILE,
    WEIGHTS_FILE,
    content_hash_with,
    holds_content,
    read_adapter_config,
    round_of,
)
from ..training.adapter_settings import CONFIG_FILE
from .finetuning import move_by_content
from .protocol import adapter_model_name


def scaled_folder(source: Path, strength: float, parent: Path, base_name: str) -> Path:
    """The adapter in a PEFT folder with its scale times `strength`, in a folder under `parent` that is named by its
    content. Raises ModelError, and RunDirectoryError where it can't be written."""
    config = _scaled(read_adapter_config(source), strength)
    content = content_hash_with(source, config)
    target = parent / adapter_model_name(base_name, round_of(source), content).partition("/")[2]
    with disk_errors(target):
        if not holds_content(target, content):
            with atomic_folder(target, lambda work, place: move_by_content(work, place, content)) as work:
                _write(source, config, work)
    return target


def _scaled(config: Mapping[str, Any], strength: float) -> dict[str, Any]:
    by_layer = {layer: _times(alpha, strength) for layer, alpha in (config.get("alpha_pattern") or {}).items()}
    return {**config, "lora_alpha": _times(config["lora_alpha"], strength), "alpha_pattern": by_layer}


def _times(alpha: float, strength: float) -> float:
    """A whole number where it is one, as PEFT writes it: the same scale is then the same content."""
    scaled = float(alpha * strength)
    return int(scaled) if scaled.is_integer() else scaled


def _write(source: Path, config: Mapping[str, Any], folder: Path) -> None:
    atomic_write(folder / WEIGHTS_FILE, (source / WEIGHTS_FILE).read_bytes())
    atomic_write(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (source / ROUND_FILE).is_file():
        shutil.copyfile(source / ROUND_FILE, folder / ROUND_FILE)
