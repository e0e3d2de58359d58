"""Files that survive a kill: whole-or-nothing writes, durable appends, a lock that ends with its process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from .errors import RunDirectoryError


def now() -> str:
    """UTC time, as text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cache_folder() -> Path:
    """Where everything that can be made again is kept: $BETTERTOGETHER_CACHE, or ~/.cache/bettertogether."""
    return Path(os.environ.get("BETTERTOGETHER_CACHE") or "~/.cache/bettertogether").expanduser()


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file whole or not at all, and durably. Raises RunDirectoryError; an earlier file is then unchanged."""
    path = Path(path)
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    with disk_errors(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a no-op where folders can't be opened (Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a RunDirectoryError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path} can't be written: {error.strerror or error}. What was written before is unchanged; free some "
            "space or give another run_dir, then run the same call again to go on after the last finished step."
        ) from error


def append_line(path: Path, line: bytes) -> None:
    """Add a line, durably. Raises RunDirectoryError; the file is then as it was."""
    with disk_errors(path):
        is_new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(handle, line[written:])
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        if is_new:
            _sync_folder(path.parent)


class FileLock:
    """An advisory lock of the operating system on a file, which also names its owner for messages."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = None
        with disk_errors(path):
            file = open(path, "a+b")  # noqa: SIM115
        try:
            _system_lock(file)
        except OSError as error:
            file.seek(0)
            owner = file.read(200).decode("utf-8", "replace").strip() or "unknown"
            file.close()
            raise RunDirectoryError(
                f"{path.parent} is in use by another run ({owner}; {error.strerror or error}): wait until it ends, or "
                "give another run_dir."
            ) from error
        self._file = file
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} since {now()}\n".encode())
            file.flush()

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would race with a process that just opened it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _system_lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        # Beyond the text, which others must be able to read.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
