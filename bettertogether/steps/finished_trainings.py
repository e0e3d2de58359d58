"""The trainings of a step that are done, kept until all of them are: after a kill only the others are done again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pydantic

from ..engines.protocol import FinetuneResult, LocalEngine
from ..errors import ModelError
from ..files import atomic_write
from ..printable import get_logger
from ..training.config import LoRAConfig, TrainingConfig
from ..working_folders import working_folder
from .rows import Row

logger = get_logger(__name__)

_RESULT = pydantic.TypeAdapter(FinetuneResult)


class FinishedTrainings:
    """Results of trainings in `folder`, by what was asked; without it none is kept. `adapters` holds the adapters."""

    def __init__(self, folder: Path | None, adapters: Path) -> None:
        self._folder, self._adapters = folder, adapters

    def find(self, asked: str | None, engine: LocalEngine) -> FinetuneResult | None:
        """The result of a training that was done before the process was killed, its adapter served by the engine; None
        where there is none, or its adapter is no longer what it was."""
        if self._folder is None or not (path := self._folder / f"{asked}.json").exists():
            return None
        try:
            result = _RESULT.validate_json(path.read_bytes())
            moved = self._adapters / result.folder.name
            folder = moved if moved.exists() else result.folder
            if engine.add_adapter(folder) != result.model:
                raise ModelError(f"{folder} does not hold {result.model}")
        except (ValueError, ModelError, OSError) as error:
            logger.warning("An adapter that was trained before is trained again: %s", error)
            return None
        logger.info("%s was trained before.", result.model)
        return replace(result, folder=folder)

    def add(self, asked: str | None, result: FinetuneResult) -> None:
        """Keep a result."""
        if self._folder is not None:
            atomic_write(self._folder / f"{asked}.json", _RESULT.dump_json(result))


@contextlib.contextmanager
def finished_trainings(adapters: Path, asked: Sequence[str]) -> Iterator[FinishedTrainings]:
    """Those of a step that asks for these trainings; forgotten when it ends. Nothing is kept where none is named."""
    if not asked:
        yield FinishedTrainings(None, adapters)
        return
    name = hashlib.sha256("".join(asked).encode()).hexdigest()[:12]
    with working_folder(adapters, f"trainings-{name}") as folder:
        yield FinishedTrainings(folder, adapters)


def asked_for(
    engine: LocalEngine,
    start: str,
    lora: LoRAConfig,
    training: TrainingConfig,
    rows: Sequence[Row],
    held_out: Sequence[Row],
) -> str:
    """SHA-256 (hex) of what decides the adapter of a training."""
    asked = [engine.base_name, start, lora.to_dict(), training.recipe().to_dict(), len(rows)]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for row in (*rows, *held_out):
        digest.update(json.dumps(row.to_json()).encode())
    return digest.hexdigest()
