"""Adapters that are served for a race alone, in folders of their own, and those of them that stay.

The name of an adapter is that of its content: what one race tries may be served already, or be tried by another race
of this process, or be what that one chose.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import dspy

from ..engines.protocol import MODEL_PREFIX, LocalEngine
from ..files import disk_errors, new_folder


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
