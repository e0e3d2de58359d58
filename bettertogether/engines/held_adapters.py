"""Which adapters an engine serves, and from which folders. No torch here."""

from __future__ import annotations

import threading
from pathlib import Path

from ..errors import UnknownAdapterError
from .protocol import MODEL_PREFIX


class HeldAdapters:
    """The adapters over one base, by model name. Methods may be called from many threads."""

    def __init__(self, base_name: str) -> None:
        self._base_name, self._base_model = base_name, MODEL_PREFIX + base_name
        self._folders: dict[str, tuple[Path, ...]] = {}
        """Those of an adapter's content; (): it is in memory alone."""
        self._lock = threading.RLock()

    def hold(self, model: str, folder: Path) -> None:
        """Serve an adapter from a folder, or, where it is served already, from this one once the others are gone."""
        with self._lock:
            there = [each for each in self._folders.get(model, ()) if each.exists()]
            self._folders[model] = tuple(dict.fromkeys([*there, folder]))

    def remove(self, model: str) -> None:
        """Serve an adapter no more."""
        with self._lock:
            self._folders.pop(model, None)

    def check(self, model: str) -> None:
        """Raise UnknownAdapterError for what is neither the base nor an adapter that is served; looks at no folder."""
        if model == self._base_model:
            return
        with self._lock:
            if model not in self._folders:
                held = ", ".join([self._base_model, *self._folders])
                raise UnknownAdapterError(
                    f"{model!r} is not served by this engine. Held: {held}. Add the adapter's folder with "
                    "engine.add_adapter(folder)."
                )

    def folder(self, model: str) -> Path | None:
        """Folder of the adapter a model name stands for, where none is still there the last; None for the base, and for
        one in memory. Raises UnknownAdapterError."""
        if model == self._base_model:
            return None
        with self._lock:
            self.check(model)
            folders = self._folders.get(model, ())
        return next((each for each in folders if each.exists()), folders[-1] if folders else None)

    def folders(self) -> list[Path]:
        """Folders of all adapters that have one, in the order they were added."""
        with self._lock:
            found = list(map(self.folder, self._folders))
        return [folder for folder in found if folder is not None]
