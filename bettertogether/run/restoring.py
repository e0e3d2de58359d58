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


def restore_program(student: dspy.Module, record: StepRecord, adapters: Path) -> dspy.Module:
    """The program of a record: the student's structure, the recorded prompts, its LMs under the recorded names."""
    program = load_prompts(student, record.program or {})
    folders = record.adapter_folders
    lms: dict[tuple[int, str], Any] = {}
    for name, predictor in predictors_of(program).items():
        model = record.models[name]
        if model == predictor.lm.model:
            continue
        engine = local_engine(predictor.lm)
        if engine is not None and model in folders:
            moved = adapters / model.removeprefix(MODEL_PREFIX)
            _add_recorded(engine, moved if moved.exists() else Path(folders[model]), model)
        predictor.lm = lms.setdefault((id(predictor.lm), model), predictor.lm.copy(model=model))
    return program


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
