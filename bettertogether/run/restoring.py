"""Programs of rounds that an earlier sitting finished, made again from their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy

from ..engines.protocol import MODEL_PREFIX, LocalEngine
from ..errors import ModelError, RunDirectoryError
from ..lm import local_engine
from ..programs.program import load_prompts, predictors_of
from ..records import StepRecord


def adapter_folders(program: dspy.Module) -> dict[str, str]:
    """Model name to adapter folder, for the program's tuned local LMs."""
    folders = {}
    for predictor in program.predictors():
        engine = local_engine(predictor.lm)
        folder = engine.adapter_folder(predictor.lm.model) if engine else None
        if folder is not None:
            folders[predictor.lm.model] = str(folder)
    return folders


def is_restorable(program: dspy.Module, student: dspy.Module) -> bool:
    """Whether prompts and models say all there is: the same class and predictors, no patched forward."""
    same = type(program) is type(student) and predictors_of(program).keys() == predictors_of(student).keys()
    return same and "forward" not in program.__dict__


class Restoring:
    """Makes the programs of a run's records, and reads each adapter once, however many rounds and predictors use it.

    `adapters` is where the run's adapters lie, whatever the records say.
    """

    def __init__(self, student: dspy.Module, adapters: Path) -> None:
        self._student, self._adapters = student, adapters
        self._added: set[tuple[int, str]] = set()
        """Engine, by id, and model."""

    def program(self, record: StepRecord) -> dspy.Module:
        """The student's structure, the recorded prompts, its LMs under the recorded names."""
        program = load_prompts(self._student, record.program or {})
        lms: dict[tuple[int, str], Any] = {}
        for name, predictor in predictors_of(program).items():
            model = record.models[name]
            if model == predictor.lm.model:
                continue
            engine = local_engine(predictor.lm)
            if engine is not None and model in record.adapter_folders:
                self._add(engine, model, Path(record.adapter_folders[model]))
            predictor.lm = lms.setdefault((id(predictor.lm), model), predictor.lm.copy(model=model))
        return program

    def _add(self, engine: LocalEngine, model: str, folder: Path) -> None:
        if (id(engine), model) in self._added:
            return
        moved = self._adapters / model.removeprefix(MODEL_PREFIX)
        _add_recorded(engine, moved if moved.exists() else folder, model)
        self._added.add((id(engine), model))


def _add_recorded(engine: LocalEngine, folder: Path, model: str) -> None:
    """Serve an adapter of a record. Raises RunDirectoryError for a folder that does not hold it."""
    try:
        found = engine.add_adapter(folder)
    except (ModelError, OSError) as error:
        found = str(error)
    if found.rpartition("@")[2] != model.rpartition("@")[2]:
        raise RunDirectoryError(
            f"{folder} does not hold the adapter {model} that the run recorded, it was damaged or changed ({found}). "
            "Bring the folder back, or start again with another run_dir."
        )
