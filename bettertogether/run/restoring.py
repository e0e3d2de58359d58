"""Programs of rounds that an earlier sitting finished, made again from their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dspy

from ..engines.protocol import MODEL_PREFIX, LocalEngine
from ..errors import ModelError, RunDirectoryError
from ..lm import local_engine
from ..programs.behaviour import BehaviourWalk
from ..programs.program import change_lms, load_prompts, model_names, modules_of, predictors_of
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


def is_restorable(program: dspy.Module, student: dspy.Module, prompts: Mapping[str, Any]) -> bool:
    """Whether prompts and models say all there is to a program: made again from them it does the same, on the same
    engines. What was hung on its modules that the student's lack is taken for notes, which `forward` does not read."""
    same = type(program) is type(student) and predictors_of(program).keys() == predictors_of(student).keys()
    if not same or "forward" in program.__dict__:
        return False
    found, made = load_prompts(program, prompts), _made(student, prompts, model_names(program))
    if any(local_engine(one.lm) is not local_engine(two.lm) for one, two in _pairs(found, made)):
        return False
    of_student = dict(modules_of(made))
    for name, module in modules_of(found):
        for attribute in vars(module).keys() - set(dir(of_student.get(name))):
            del module.__dict__[attribute]
    return BehaviourWalk(lasting=True).of(found) == BehaviourWalk(lasting=True).of(made)


def _made(student: dspy.Module, prompts: Mapping[str, Any], models: Mapping[str, str]) -> dspy.Module:
    """The student's structure with these prompts, its LMs under these names."""
    program = load_prompts(student, prompts)
    before = model_names(program)
    change_lms(program, {name: {"model": models[name]} for name in before if models[name] != before[name]})
    return program


def _pairs(one: dspy.Module, other: dspy.Module) -> Iterator[tuple[dspy.Predict, dspy.Predict]]:
    """The predictors of two programs that have the same ones."""
    others = predictors_of(other)
    return ((predictor, others[name]) for name, predictor in predictors_of(one).items())


class Restoring:
    """Makes the programs of a run's records, and reads each adapter once, however many rounds and predictors use it.

    `adapters` is where the run's adapters lie, whatever the records say.
    """

    def __init__(self, student: dspy.Module, adapters: Path) -> None:
        self._student, self._adapters = student, adapters
        self._added: set[tuple[int, str]] = set()
        """Engine, by id, and model."""

    def program(self, record: StepRecord) -> dspy.Module:
        """The program of a record, its adapters served."""
        program = _made(self._student, record.program or {}, record.models)
        for predictor, of_student in _pairs(program, self._student):
            engine, model = local_engine(predictor.lm), predictor.lm.model
            if model != of_student.lm.model and engine is not None and model in record.adapter_folders:
                self._add(engine, model, Path(record.adapter_folders[model]))
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
