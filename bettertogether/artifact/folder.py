"""The folder of an artifact: paths that stay inside it, JSON read with care, hashes, replacing it as a whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..errors import ArtifactError
from ..files import sha256_of
from ..printable import get_logger

logger = get_logger(__name__)

MANIFEST = "artifact.json"
CARD = "README.md"
"""The model card, which people may edit: its content is not checked."""
MAX_DEPTH = 100
"""Lists and mappings in each other that a JSON file of an artifact may have."""
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)
T = TypeVar("T")


def folder_argument(value: object, name: str) -> Path:
    """An argument that names a folder, as an absolute path with "~" expanded. Raises ArtifactError."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(os.fspath(value)):
        raise ArtifactError(f"{name}={value!r:.100} is no folder: give a path as text or pathlib.Path.")
    try:
        path = Path(os.fsdecode(value)).expanduser().absolute()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{name}={str(value)!r:.200} can't be used ({error}): give another path.") from error


def inside(root: Path, name: str) -> Path:
    """A path of the artifact, from a name in its files. Raises ArtifactError for one that leaves it."""
    parts = PurePosixPath(name).parts
    outside = PurePosixPath(name).is_absolute() or ".." in parts or not parts
    outside = outside or any(c in "\\:\0" or "\ud800" <= c <= "\udfff" for c in name)
    path = root if outside else root.joinpath(*parts)
    try:
        if outside or _has_links(root, path) or not path.resolve().is_relative_to(root.resolve()):
            raise ArtifactError(
                f"{root}: {name!r:.200} reaches outside the folder (absolute, '..' or a link). Nothing was read from "
                "there; load only artifacts whose files are their own."
            )
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{root}: {name!r:.200} can't be read: {error}.") from error
    return path


def _has_links(root: Path, path: Path) -> bool:
    own = [part for part in (path, *path.parents) if part.is_relative_to(root) and part != root]
    return any(part.is_symlink() for part in own) or (path.is_dir() and any(p.is_symlink() for p in path.rglob("*")))


def read_json(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a JSON file. Raises ArtifactError, which names the file, for whatever is wrong with it."""
    try:
        data = json.loads(path.read_bytes())
        _check_depth(data)
        return parse(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}): save the program again.") from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error.strerror or error}.") from error


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        nested = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in nested for item in values if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def file_hashes(folder: Path) -> dict[str, str]:
    """Path to SHA-256 (hex) of each file in an artifact but its manifest and its card."""
    others = (folder / MANIFEST, folder / CARD)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in others)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def check_files(root: Path, hashes: Mapping[str, str]) -> None:
    """Raise ArtifactError, naming the file, unless each file is there with the content that was saved."""
    for name, expected in hashes.items():
        path = inside(root, name)
        if not path.is_file():
            raise ArtifactError(f"{path} was saved with the program and is not there: copy the whole folder again.")
        try:
            found = sha256_of(path)
        except OSError as error:
            raise ArtifactError(f"{path} can't be read: {error.strerror or error}.") from error
        if found != expected:
            raise ArtifactError(
                f"{path} is not the file that was saved (SHA-256 {found[:12]}..., saved {expected[:12]}...): it was "
                "damaged or changed. Copy the folder again, or save the program again."
            )


def refuse_foreign(target: Path) -> None:
    """Raise ArtifactError for a place that holds something else than an earlier artifact."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise ArtifactError(f"{target} is not a folder: give a folder that is new, empty, or an earlier artifact.")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} is not empty and holds no {MANIFEST}: it is left alone. Give a folder that is new, empty, or "
            "an earlier artifact."
        )


def put_in_place(work: Path, target: Path) -> None:
    """Give a finished folder its name; what was there before is then under the old name of `work`, or gone.

    Where the system can exchange two folders (Linux, macOS) there is no moment without one under the name. Elsewhere
    there is one between two renames: after a kill just then, `recover` brings the earlier folder back.
    """
    if not target.exists():
        os.rename(work, target)
        return
    if exchange(work, target):
        return
    old = target.with_name(f"{_aside(target)}{uuid.uuid4().hex}.tmp")
    try:
        os.replace(target, old)
        os.replace(work, target)
    except BaseException:
        if not target.exists():
            os.rename(old, target)
        raise
    os.rename(old, work)


def recover(target: Path) -> None:
    """Bring back the artifact that a kill during `put_in_place` left aside, where there is none under its name."""
    if target.exists() or not target.parent.is_dir():
        return
    beside = (path for path in target.parent.iterdir() if path.name.startswith(_aside(target)))
    aside = [path for path in beside if (path / MANIFEST).is_file()]
    if aside:
        newest = max(aside, key=lambda path: (path / MANIFEST).stat().st_mtime)
        logger.warning("%s is brought back: saving over it was interrupted.", target)
        os.rename(newest, target)


def _aside(target: Path) -> str:
    return f".{target.name}.old."


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system can't."""
    if sys.platform == "win32":
        return False
    name, arguments = ("renamex_np", ()) if sys.platform == "darwin" else ("renameat2", (-100,))
    with contextlib.suppress(OSError, AttributeError):
        rename = getattr(ctypes.CDLL(None, use_errno=True), name)
        paths = [argument for path in (one, other) for argument in (*arguments, os.fsencode(path))]
        return bool(rename(*paths, 2) == 0)
    return False
