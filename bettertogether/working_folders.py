"""Where trainings keep their checkpoints: a kill finds them there again."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from .errors import RunDirectoryError
from .files import FileLock, new_folder

_kept_in: ContextVar[Path | None] = ContextVar("_kept_in", default=None)


@contextlib.contextmanager
def working_folder(parent: Path, name: str) -> Iterator[Path]:
    """Where a training works: a folder named by what is asked, so that the same call after a kill finds the checkpoint
    that was left there; one of its own while the same training goes on elsewhere. Deleted when the block is done: by a
    rename first, so that no kill leaves a part of a checkpoint. What can't be deleted keeps its lock file, by which
    `working_folders` finds it."""
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f".{name}.lock"
    try:
        lock = FileLock(path)
    except RunDirectoryError:
        folder = new_folder(parent, prefix=f"{name}-")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        folder, gone = parent / name, parent / f".{name}.tmp"
        shutil.rmtree(gone, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder
        if _kept_in.get() == parent:
            return
        with contextlib.suppress(OSError):
            os.replace(folder, gone)
        for each in (gone, folder):
            shutil.rmtree(each, ignore_errors=True)
        if folder.exists():
            return
        # Before the lock ends: whoever opened the file meanwhile finds it locked. Windows lets no open file go.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
    finally:
        lock.release()


@contextlib.contextmanager
def kept_working_folders(parent: Path) -> Iterator[None]:
    """Leave the working folders under `parent` that are done in this block to `remove_working_folder`: what a training
    gave is nowhere else yet."""
    token = _kept_in.set(parent)
    try:
        yield
    finally:
        _kept_in.reset(token)


def latest_checkpoint(parent: Path, prefix: str) -> Path | None:
    """The folder `prefix`N under `parent` with the highest N. One without its state was deleted in part, when the
    training was done."""
    whole = (path.parent for path in parent.glob(f"{prefix}*/state.json"))
    return max(whole, key=lambda path: int(path.name.removeprefix(prefix)), default=None)


def working_folders(parent: Path) -> list[str]:
    """Names of the working folders that are in use, or were left behind."""
    return sorted(path.name.removeprefix(".").removesuffix(".lock") for path in parent.glob(".*.lock"))


def remove_working_folder(parent: Path, name: str) -> None:
    """Delete a working folder that was left behind; one that is in use, or can't be deleted, stays."""
    with contextlib.suppress(OSError), working_folder(parent, name):
        pass
