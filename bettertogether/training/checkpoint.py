"""The state of a training run at the end of an epoch, on disk: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import TrainingError
from ..files import atomic_folder, atomic_write, put_anew
from ..working_folders import latest_checkpoint
from .held_out import HeldOutLosses
from .packing import TokenizedRow
from .progress import TrainingProgress
from .sharing import all_whole, like

SCHEMA = 4
FOLDER = "checkpoint"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. No random state: every epoch seeds its own from the seed and its number."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    base: HeldOutLosses | None = None
    """Held-out losses before training."""
    best: HeldOutLosses | None = None
    """Those of the best epoch."""
    history: tuple[TrainingProgress, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Adapter weights by PEFT key."""
    mean_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Their running mean; empty when there is none."""
    best_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """What was measured after the best epoch; empty when that is the last one."""
    first_moments: Mapping[str, Tensor] = field(default_factory=dict)
    """AdamW's running means of the gradients, by PEFT key."""
    second_moments: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """The weights to keep: those measured after the best epoch."""
        return self.best_weights or self.mean_weights or self.weights


_TENSORS = ("weights", "mean_weights", "best_weights", "first_moments", "second_moments")


def fingerprint(
    rows: Sequence[TokenizedRow], validation_rows: Sequence[TokenizedRow], options: Mapping[str, Any]
) -> str:
    """SHA-256 (hex) of everything that decides how a run goes; a checkpoint continues only the same run."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for part in (rows, validation_rows):
        digest.update(f"{len(part)} rows".encode())
        for row in part:
            digest.update(json.dumps(vars(row)).encode())
    return digest.hexdigest()


def save_state(folder: Path, state: TrainingState, run: str) -> None:
    """Write the state of run `run` (a fingerprint) under `folder`/checkpoint; earlier ones go once it is complete."""
    parent = folder / FOLDER
    target = parent / f"epoch-{state.epoch}"
    with atomic_folder(target, put_anew) as work:
        write_state(work, state, run)
    for other in parent.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def write_state(folder: Path, state: TrainingState, run: str) -> None:
    """Write the state of run `run` into a folder."""
    tensors = {f"{name}/{key}": tensor for name in _TENSORS for key, tensor in getattr(state, name).items()}
    atomic_write(folder / "tensors.safetensors", save(tensors))
    without: dict[str, Any] = {name: {} for name in _TENSORS}
    values = asdict(replace(state, **without))
    values = {key: value for key, value in values.items() if key not in _TENSORS}
    atomic_write(folder / "state.json", json.dumps({"schema": SCHEMA, "run": run, **values}))


def load_state(folder: Path, run: str) -> TrainingState | None:
    """The latest state of run `run` under `folder`; None when there is none, or when it is another run's."""
    latest = latest_checkpoint(folder / FOLDER, "epoch-")
    return None if latest is None else read_state(latest, run)


def read_state(folder: Path, run: str) -> TrainingState | None:
    """The state of run `run` in a folder; None when it is another run's. Raises TrainingError."""
    try:
        values = json.loads((folder / "state.json").read_text())
        if values.pop("schema") != SCHEMA or values.pop("run") != run:
            return None
        tensors = load_file(folder / "tensors.safetensors")
        history = tuple(TrainingProgress(**line) for line in values.pop("history"))
        for name in ("base", "best"):
            values[name] = values[name] and HeldOutLosses(**values[name])
        parts: dict[str, Any] = {name: {} for name in _TENSORS}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        return TrainingState(history=history, **values, **parts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint in {folder} is damaged ({error!r}): delete {folder.parent} and train again."
        ) from error


def optimizer_moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of AdamW's running means of the gradients and of their squares, by PEFT key."""
    first, second = (
        # An adapter that was never moved has none.
        all_whole({key: optimizer.state[p].get(name, torch.zeros_like(p)) for key, p in parameters.items()})
        for name in ("exp_avg", "exp_avg_sq")
    )
    return first, second


def restore_optimizer(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], state: TrainingState) -> None:
    """Put AdamW where it was after `state.step` steps."""
    moments = {
        index: {
            "step": torch.tensor(state.step, dtype=torch.float32),
            "exp_avg": like(state.first_moments[key], parameter),
            "exp_avg_sq": like(state.second_moments[key], parameter),
        }
        for index, (key, parameter) in enumerate(parameters.items())
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
