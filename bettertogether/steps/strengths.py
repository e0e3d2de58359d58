"""The strength of a program's adapters, as one more dimension of the prompt step's race.

An adapter at another strength is one of its own, which is served for the race alone, in a folder of its own, unless it
stays. Its name is that of its content: what one race tries may be served already, or be tried by another race of this
process, or be what that one chose.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dspy

from ..checks import require, require_strength
from ..engines.protocol import MODEL_PREFIX, LocalEngine
from ..files import disk_errors, new_folder
from ..lm import local_engine
from ..programs.program import copy_for_step
from .demo_sets import Candidate


def checked_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths to try, as a tuple. Raises ConfigError."""
    are_several = isinstance(strengths, Sequence) and not isinstance(strengths, str)
    require(are_several, "strengths", strengths, "numbers such as (0.5, 0.75), or ()")
    for strength in strengths:
        require_strength("strengths", strength)
    return tuple(strengths)


def at_strengths(candidate: Candidate, strengths: Sequence[float], tried: TriedAdapters) -> list[Candidate]:
    """The same prompts with each of the program's adapters at each of the strengths; none where it has no adapter, or
    where `no_strengths` says why."""
    has_adapter = any(_has_adapter(predictor.lm) for predictor in candidate.program.predictors())
    if not has_adapter or no_strengths(candidate.program, strengths):
        return []
    return [
        Candidate(
            f"{candidate.name}, strength {strength:g}",
            scaled_program(candidate.program, strength, tried),
            strength=strength,
        )
        for strength in dict.fromkeys(strengths)
        if strength != 1
    ]


def no_strengths(program: dspy.Module, strengths: Sequence[float]) -> str | None:
    """Why none of these strengths can be tried: an adapter still answers, but its folder was deleted."""
    if not set(strengths) - {1.0}:
        return None
    folders = {lm.model: folder for lm in (each.lm for each in program.predictors()) if (folder := _folder(lm))}
    gone = [f"{model} ({folder})" for model, folder in folders.items() if not folder.exists()]
    if not gone:
        return None
    return (
        f"No other strengths are tried: the folder of {', '.join(gone)} is gone. The adapter still answers, but can be "
        "neither saved nor trained further: bring the folder back."
    )


def scaled_program(program: dspy.Module, strength: float, tried: TriedAdapters) -> dspy.Module:
    """A copy whose local LMs run their adapters at another strength; LMs without one stay."""
    copied = copy_for_step(program)
    lms: dict[int, dspy.LM] = {}
    for predictor in copied.predictors():
        lm = predictor.lm
        if _has_adapter(lm):
            if id(lm) not in lms:
                lms[id(lm)] = lm.copy(model=tried.scaled(lm, strength))
            predictor.lm = lms[id(lm)]
    return copied


def _has_adapter(lm: dspy.LM) -> bool:
    return _folder(lm) is not None


def _folder(lm: dspy.LM) -> Path | None:
    engine = local_engine(lm)
    return None if engine is None else engine.adapter_folder(lm.model)


@dataclass
class _Adapter:
    engine: LocalEngine
    model: str
    home: Path | None
    """A folder made for a race, which its own is in; None: it stays, and its own is elsewhere."""
    races: int = 0
    """Those that try it now, one for each LM."""


_TRIED: dict[tuple[int, str], _Adapter] = {}
"""What races try now, by engine (its id) and model name."""
_LOCK = threading.Lock()


class TriedAdapters:
    """Adapters at other strengths, each served until the block ends. Those of `keep` stay, and those that were served
    before."""

    def __init__(self, folder: Path) -> None:
        """Folders go under `folder`."""
        self._folder = folder.expanduser().absolute()
        self._tried: list[tuple[_Adapter, str, float]] = []
        """With the model name and the strength that each is made of."""

    def __enter__(self) -> TriedAdapters:
        return self

    def __exit__(self, *error: object) -> None:
        with _LOCK:
            for adapter, _, _ in self._tried:
                adapter.races -= 1
                if not adapter.races:
                    del _TRIED[id(adapter.engine), adapter.model]
                    if adapter.home is not None:
                        adapter.engine.remove_adapter(adapter.model)
                        shutil.rmtree(adapter.home, ignore_errors=True)

    def scaled(self, lm: dspy.LM, strength: float) -> str:
        """Serve an LM's adapter at another strength; its model name. Raises what `LocalEngine.scaled` does, and
        RunDirectoryError."""
        with _LOCK:
            model, home = self._made(lm.engine, lm.model, strength)
            adapter = _TRIED.setdefault((id(lm.engine), model), _Adapter(lm.engine, model, home))
            adapter.races += 1
            self._tried.append((adapter, lm.model, strength))
            return model

    def _made(self, engine: LocalEngine, source: str, strength: float) -> tuple[str, Path | None]:
        """A model name, and the folder made for it; None where it is served from another one."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # By a name that a run's directory clears away after a kill.
            home = new_folder(self._folder, ".strength-", ".tmp")
        is_new = False
        try:
            model = engine.scaled(source, strength, home)
            is_new = engine.adapter_folder(model) == _place(home, model)
            return model, home if is_new else None
        finally:
            if not is_new:
                shutil.rmtree(home, ignore_errors=True)

    def keep(self, program: dspy.Module) -> None:
        """Have what the program asks stay, in `folder`/<adapter name>. Raises RunDirectoryError."""
        asked = {predictor.lm.model for predictor in program.predictors()}
        with _LOCK:
            for adapter, source, strength in self._tried:
                if adapter.model in asked:
                    adapter.engine.scaled(source, strength, self._folder)
                    if adapter.home is not None:
                        shutil.rmtree(adapter.home, ignore_errors=True)
                        adapter.home = None


def _place(parent: Path, model: str) -> Path:
    return parent / model.removeprefix(MODEL_PREFIX)
