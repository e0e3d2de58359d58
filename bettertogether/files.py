"""Files that survive a kill: files and folders written whole or not at all, durable appends, locks that end with a
process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from .errors import BetterTogetherError, ModelError, RunDirectoryError
from .printable import get_logger

logger = get_logger(__name__)

DAY_S = 24 * 3600
NOT_SUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
"""How a file system says that it lacks something."""

HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})
"""How an operating system says that somebody else has a lock."""


def now() -> str:
    """UTC time, as text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cache_folder() -> Path:
    """Where everything that can be made again is kept: $BETTERTOGETHER_CACHE, or ~/.cache/bettertogether. Raises
    RunDirectoryError for a user without a home."""
    folder = os.environ.get("BETTERTOGETHER_CACHE") or "~/.cache/bettertogether"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise RunDirectoryError(
            f"The cache folder {folder} can't be found ({error}): set BETTERTOGETHER_CACHE to a folder, or HOME."
        ) from error


def adapters_cache() -> Path:
    """Where adapters go unless a folder is given."""
    return cache_folder() / "adapters"


def json_text(value: Any) -> str:
    """A value as JSON on one line; numbers that JSON lacks (NaN, infinity) become null. Raises TypeError and
    ValueError for what is not JSON."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file whole or not at all, and durably. Raises RunDirectoryError; an earlier file is then unchanged."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """`atomic_write` in parts: the file that the block writes gets its name when that ends."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path):
        # Not by `mkstemp`, whose files are their owner's alone: to read the umask is to change it for all threads.
        opened = open(temporary, "xb")  # noqa: SIM115
        try:
            with opened as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(target: Path, put: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """Write a folder whole or not at all: inside the block one beside it is filled, which gets its name at the end.

    `put(filled, target)` gives it the name; what it leaves under the old name is deleted, as all is that a block which
    raises has written, and what killed processes left of theirs a day ago or earlier. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    left = re.compile(rf"\.{re.escape(target.name)}\.\w+\.tmp")
    for other in target.parent.iterdir():
        if left.fullmatch(other.name) and _age_s(other) > DAY_S:
            shutil.rmtree(other, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        put(work, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def new_folder(parent: Path, prefix: str = "", suffix: str = "") -> Path:
    """A new folder of a name of its own, which others may read, such as a server of another user."""
    folder = Path(tempfile.mkdtemp(suffix, prefix, parent))
    folder.chmod(0o755)
    return folder


def put_anew(work: Path, target: Path) -> None:
    """For `atomic_folder`: the folder takes the place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can: not on Windows, nor on file systems (SMB, some FUSE) that have no
    sync of folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        # Windows writes other ends of lines where it is not told not to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags, 0o666)
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
    """An advisory lock of the operating system on a file, which also names its owner: for messages, and so that an
    owner sees that its file was deleted or that another one has come in.

    Where the file system has no such locks, the file alone says that someone is there: a process that is killed then
    leaves it behind, and whoever comes next on this machine sees that its process is gone.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] | None = None
        self._claim: Path | None = None
        self._name = b""
        self._path = path
        self._pid = os.getpid()
        with disk_errors(path):
            # Without a buffer, whose rest would be written at the close.
            file = self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._take(path, file)
            with disk_errors(path):
                self._name = _write_name(file)
        except BaseException:
            self.release()
            raise

    def _take(self, path: Path, file: IO[bytes]) -> None:
        try:
            _system_lock(file)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                raise _in_use(path, file.read(200), error.strerror or str(error)) from error
            if error.errno not in NOT_SUPPORTED:
                raise RunDirectoryError(f"{path} can't be locked: {error}. Give another run_dir.") from error
            self._claim = _claimed(path.with_name(f"{path.name}.owner"))
            logger.warning(
                "%s is on a file system without locks (%s): only a file says that it is in use. Don't start the same "
                "run on two machines at once.",
                path.parent,
                error.strerror,
            )

    @property
    def held(self) -> bool:
        """Whether `release` was not called yet."""
        return self._file is not None

    @property
    def lost(self) -> bool:
        """Whether the file at the path is no longer that of this object: it was deleted or moved, or another owner has
        come in since. Told by the name in it, as numbers of files change on some file systems. Raises
        RunDirectoryError where the file can't be read."""
        return self._name_there() != self._name

    def _name_there(self) -> bytes | None:
        with disk_errors(self._path):
            try:
                return self._path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would race with a process that just opened it."""
        if self._file is None:
            return
        if os.getpid() == self._pid:
            # Closing is not enough: a fork of this process, such as a worker of a pool, has the file open as well.
            _system_unlock(self._file)
            with contextlib.suppress(RunDirectoryError):
                # That of another owner, who came in since, stays.
                if self._claim is not None and self._name_there() in (None, self._name):
                    self._claim.unlink(missing_ok=True)
        self._file.close()
        self._file = None


def _claimed(path: Path) -> Path:
    """A file that this process made, which stands for a lock; that of a process of this machine that ended is taken
    over. Raises RunDirectoryError while its owner lives, or is on another machine."""
    owner = f"process {os.getpid()} on {platform.node()}"
    for _ in range(2):
        with disk_errors(path):
            try:
                file = open(path, "x", encoding="utf-8")  # noqa: SIM115
            except FileExistsError:
                found = path.read_text("utf-8")
            else:
                try:
                    with file:
                        file.write(owner)
                except BaseException:
                    path.unlink()
                    raise
                return path
        if _lives(found):
            break
        with disk_errors(path):
            path.unlink(missing_ok=True)
    raise _in_use(path, found.encode(), f"if that process has ended, delete {path}")


def _lives(owner: str) -> bool:
    """Whether the process that wrote this may still run."""
    import psutil

    found = re.fullmatch(r"process (\d+) on (.*)", owner)
    if found is None or found[2] != platform.node():
        return True
    return int(found[1]) == os.getpid() or psutil.pid_exists(int(found[1]))


def _in_use(path: Path, owner: bytes, why: str) -> RunDirectoryError:
    name = owner.decode("utf-8", "replace").strip() or "unknown"
    return RunDirectoryError(
        f"{path.parent} is in use by another run ({name}; {why}): wait until it ends, or give another run_dir."
    )


def _write_name(file: IO[bytes]) -> bytes:
    """Write into a lock's file who has it, and return what it then holds: a full disk keeps nobody out."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        # To the microsecond: the next owner may come in the same second, in this process.
        file.write(f"process {os.getpid()} since {datetime.now(UTC).isoformat()}\n".encode())
    file.seek(0)
    return file.read()


def _system_lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        # Beyond the text, which others must be able to read.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _system_unlock(file: IO[bytes]) -> None:
    # Windows has no forks.
    if os.name != "nt":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def cached_model(name: str, fill: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The folder of a model in the cache, into which `fill` writes it on the first call: whole or not at all.

    Safe when two processes do it at once. What `fill` raises is passed on, and leaves nothing behind; an OSError of the
    system's, as on a full disk, is a ModelError that says what to do.
    """
    folder = model_place(name, cache)
    try:
        if not folder.exists():
            with atomic_folder(folder, _put_unless_there) as filling:
                fill(filling)
                _durable(filling)
    except OSError as error:
        if isinstance(error, BetterTogetherError):
            raise
        raise ModelError(
            f"{folder} can't be written: {error}. Free some space, or set BETTERTOGETHER_CACHE to another folder."
        ) from error
    return folder


def model_place(name: str, cache: Path | None = None) -> Path:
    """Where a model of this name is in the cache, or would be."""
    return (cache or cache_folder()) / "models" / name


def _durable(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())


def _put_unless_there(filled: Path, folder: Path) -> None:
    try:
        os.replace(filled, folder)
    except OSError:
        # Renaming onto a folder that is not empty fails: another process was first, and its copy is as good.
        if not folder.exists():
            raise
