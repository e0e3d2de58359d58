"""The directory of a compile run: what was asked, one record per finished step, adapters, report. Made to be killed.

Guarantees:
- `append` returns after the record is on disk (fsync). A kill at any moment loses at most the record being written:
  its torn line is dropped when the directory is opened again.
- Every other file is written whole or not at all (temporary file, fsync, `os.replace`).
- A full or failing disk raises RunDirectoryError and leaves what was there before as it was.
- One process at a time: the lock is the operating system's, so that it ends with its process, however that ends.
- A run whose directory was deleted or replaced meanwhile notes nothing there: whatever it would note raises
  RunDirectoryError. Only a training that goes on may still write its adapter.
- A directory that holds anything else, or another run, is never written to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ..errors import (
    BudgetExceeded,
    ConfigError,
    DataError,
    NoTrainingDataError,
    NotTrainableError,
    ProgramError,
    RunDirectoryError,
    TooManyErrors,
    UnknownPriceError,
)
from ..files import (
    FileLock,
    append_line,
    atomic_write,
    cache_folder,
    disk_errors,
    json_text,
    now,
)
from ..printable import get_logger
from ..records import Ledger, StepRecord
from ..working_folders import remove_working_folder, working_folders
from .same_call import PER_STEP, finished_steps, going_on

logger = get_logger(__name__)

SCHEMA = 1
"""Version of run.json; a newer one is refused."""

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError)
"""What reading a damaged file raises."""

UNSCORED = "unscored.json"
"""What a step gave whose round is being scored."""

_FAILS_AGAIN = (
    ConfigError, DataError, NoTrainingDataError, NotTrainableError, ProgramError, NotImplementedError, TypeError,
    AttributeError,
)  # fmt: skip
"""What ends a run for a reason that the same call would meet again."""

_LOCKS = ("lock", "lock.owner")
_TEMPORARY = re.compile(r"\..+\.tmp")


def new_run_directory() -> Path:
    """A folder under the cache that no run has yet."""
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return cache_folder().absolute() / "runs" / f"{started}-{uuid.uuid4().hex[:8]}"


def checked_folder(run_dir: Any) -> Path:
    """The absolute path of a run directory, "~" expanded. Raises RunDirectoryError for what can't name a folder."""
    advice = 'give a folder, such as run_dir="runs/first"'
    if not isinstance(run_dir, str | os.PathLike) or not isinstance(os.fspath(run_dir), str):
        raise RunDirectoryError(f"run_dir={run_dir!r} is not allowed: {advice}.")
    text = os.fspath(run_dir)
    if not text.strip() or "\0" in text:
        raise RunDirectoryError(f"run_dir={text!r} names no folder: {advice}.")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise RunDirectoryError(f"run_dir={text!r} can't be found ({error}): {advice}.") from error


class RunDirectory:
    """A directory opened by `RunDirectory.open`; close it, or use it in a `with`, to let other processes in."""

    def __init__(
        self,
        path: Path,
        lock: FileLock,
        header: dict[str, Any],
        records: list[StepRecord],
        unscored: StepRecord | None,
    ) -> None:
        self.path = path
        self._lock = lock
        self._header = header
        self._records = records
        self.unscored = unscored
        """What a step gave whose round no earlier sitting scored to its end."""
        self._aside = None if unscored is None else unscored.strategy
        """The round whose step is set aside on disk now, this sitting's too."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], run: Mapping[str, Any]) -> Self:
        """Start a run in a new or empty directory, or go on with the same run in its own.

        `run` says what was asked (strategy, seeds, student, datasets, options, versions, ...), as JSON. A run is the
        same when all of it is equal but the keys of `INFORMATIVE`, and `PER_STEP` of the steps that never finished:
        those have decided nothing yet, and are noted anew. So is the strategy: the records of rounds that it does not
        have stay, and it may be any other, unless one of the two is "auto". Raises RunDirectoryError when the directory
        belongs to another run, to something else, to another process, to a newer version, or is damaged.
        """
        folder = checked_folder(path)
        asked = _as_json(run)
        with disk_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise RunDirectoryError(
                    f"{folder} is a file: give a run_dir that is a directory, or does not exist yet."
                )
            folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        lock = FileLock(folder / "lock")
        try:
            header = _read_header(folder)
            if header is None:
                header = {"schema": SCHEMA, "created": now(), "finished": None, "run": asked}
                atomic_write(folder / "run.json", _pretty(header))
            records = _read_records(folder / "records.jsonl")
            unscored = _read_unscored(folder / UNSCORED)
            noted = going_on(folder, header["run"], asked, records)
            if noted != header["run"]:
                if unscored and _of_step(noted, unscored.step) != _of_step(header["run"], unscored.step):
                    with disk_errors(folder):
                        (folder / UNSCORED).unlink(missing_ok=True)
                    unscored = None
                header = {**header, "finished": None, "run": noted}
                atomic_write(folder / "run.json", _pretty(header))
            _remove_temporary(folder)
            with disk_errors(folder):
                (folder / "adapters").mkdir(exist_ok=True)
            directory = cls(folder, lock, header, records, unscored)
            for record in directory.rounds().values():
                # One whose program is not all in its record is run again, and may have been cut off in that.
                if record.program is not None:
                    directory._forget(record)
        except BaseException:
            lock.release()
            raise
        return directory

    @property
    def adapters(self) -> Path:
        """Folder for trained adapters."""
        return self.path / "adapters"

    @property
    def report(self) -> Path:
        """Where the HTML report goes."""
        return self.path / "report.html"

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, in this process or an earlier one."""
        return self._header["finished"] is not None

    @property
    def spent(self) -> Ledger | None:
        """What all sittings so far used; None in a directory of before that was noted."""
        noted = self._header.get("spent")
        return None if noted is None else Ledger(**noted)

    def records(self) -> tuple[StepRecord, ...]:
        """The records on disk, in the order they were appended."""
        return tuple(self._records)

    def rounds(self) -> dict[str, StepRecord]:
        """The finished rounds on disk by strategy; of one that was scored again, the last record."""
        return {record.strategy: record for record in self._records if record.status == "complete"}

    def how_to_go_on(self, error: BaseException, step: str = "") -> str:
        """Which call goes on after an error that ended the run at a step with this key."""
        run_dir = f"run_dir={str(self.path)!r}"
        mended = "a mended program or metric, other examples or another teacher need another one."
        if isinstance(error, BudgetExceeded | UnknownPriceError):
            other = "a larger" if isinstance(error, BudgetExceeded) else "such a"
            return f"The same call with {run_dir} and {other} budget goes on after the last finished step."
        if isinstance(error, TooManyErrors):
            passed = f"The same call with {run_dir} goes on once the cause has passed (a service that was away)"
            return f"{passed}, and so does one with a higher max_errors; {mended}"
        if not isinstance(error, _FAILS_AGAIN):
            return f"Make the same call with {run_dir} to go on."
        if step in finished_steps(self._records):
            return "The same call would fail again: change it, and give another run_dir."
        return f"The same call would fail again: one with {run_dir} and other options of {step!r} goes on; {mended}"

    def begin(self, strategy: str) -> None:
        """Note that the step of a round begins, whose working folders are kept until `append` has the round."""
        self._note(checkpoints=self._checkpoints(), under_way=strategy)

    def append(self, record: StepRecord) -> None:
        """Add a record; it is on disk when this returns. Raises RunDirectoryError and leaves the file as it was."""
        self._require_open()
        append_line(self.path / "records.jsonl", _line(record))
        self._records.append(record)
        if record.status == "complete":
            self._forget(record)

    def _forget(self, done: StepRecord) -> None:
        """Delete what was kept for going on within a round: by trainings with other options too, which the step can't
        be given any more. What can't be deleted now is when the directory is opened again."""
        if done.strategy == self._aside:
            self.unscored = self._aside = None
            with contextlib.suppress(OSError):
                (self.path / UNSCORED).unlink(missing_ok=True)
        for name, of_round in self._checkpoints().items():
            if of_round == done.strategy:
                remove_working_folder(self.adapters, name)

    def _checkpoints(self) -> dict[str, str | None]:
        """The round that each working folder is of: what nobody has noted came with the round under way, as steps run
        one by one. None: of before that was noted."""
        noted, under_way = self._header.get("checkpoints", {}), self._header.get("under_way")
        return {name: noted.get(name, under_way) for name in working_folders(self.adapters)}

    def set_aside(self, record: StepRecord) -> None:
        """Keep what a step gave until `append` has its round with the scores."""
        self._require_open()
        atomic_write(self.path / UNSCORED, _line(record))
        self._aside = record.strategy

    def note_spent(self, ledger: Ledger) -> None:
        """Keep what all sittings used, whatever became of it."""
        self._note(spent=asdict(ledger))

    def finish(self) -> None:
        """Mark the run as complete."""
        self._note(finished=now())

    def _note(self, **values: Any) -> None:
        self._require_open()
        header = {**self._header, **values}
        atomic_write(self.path / "run.json", _pretty(header))
        self._header = header

    def close(self) -> None:
        """Let other processes open the directory."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._lock.held:
            raise RunDirectoryError(f"{self.path} was closed: open it again with RunDirectory.open to write to it.")
        if self._lock.lost:
            raise RunDirectoryError(
                f"{self.path} was deleted, moved or taken over by another run while this one was under way, so it "
                "writes nothing more there. Make the same call with another run_dir, or with the place that it was "
                "moved to, and leave that alone until the run has ended."
            )


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _as_json(run: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(run)))
    except (TypeError, ValueError) as error:
        raise RunDirectoryError(f"run is not JSON: {error}. Give numbers, text, lists and dicts only.") from error
    return plain


def _of_step(run: Mapping[str, Any], step: str) -> list[Any]:
    """What is noted of a step alone."""
    return [run.get(key, {}).get(step) for key in sorted(PER_STEP)]


def _refuse_foreign(folder: Path) -> None:
    if (folder / "run.json").exists():
        return
    with disk_errors(folder):
        found = sorted(p.name for p in folder.iterdir() if p.name not in _LOCKS and not _TEMPORARY.fullmatch(p.name))
    if found:
        raise RunDirectoryError(
            f"{folder} is not empty and holds no run.json (found {found[:3]}): it belongs to something else and is "
            "left alone. Give a run_dir that is empty or does not exist yet."
        )


def _remove_temporary(folder: Path) -> None:
    """Remove what a kill left: files of `atomic_write`, folders of an artifact saved here, of rows trained on, of
    adapters that were learning from rewards and of strengths that were tried."""
    adapters = folder / "adapters"
    with disk_errors(folder):
        for leftover in [*folder.iterdir(), *(adapters.iterdir() if adapters.is_dir() else ())]:
            if not _TEMPORARY.fullmatch(leftover.name):
                continue
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _read_header(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_bytes())
        schema, run, _ = header["schema"], dict(header["run"]), header["finished"]
        Ledger(**header.get("spent", {}))
        header.get("checkpoints", {}).items()
        run |= {key: dict(run[key]) for key in PER_STEP & run.keys()}
    except DAMAGE as error:
        raise RunDirectoryError(f"{path} is damaged ({error!r}): restore it, or give another run_dir.") from error
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RunDirectoryError(
            f"{path} has schema {schema!r}, this version reads up to {SCHEMA}: "
            "update with pip install -U bettertogether, or give another run_dir."
        )
    return {**header, "run": run}


def _line(record: StepRecord) -> bytes:
    try:
        return (json_text(record.to_dict()) + "\n").encode("utf-8", "surrogatepass")
    except (TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"The record of step {record.index} ({record.strategy or 'student'}) is not JSON: {error}. Put only "
            "numbers, text, lists and dicts in its details and program."
        ) from error


def _read_unscored(path: Path) -> StepRecord | None:
    """What was set aside; None where there is none."""
    try:
        return StepRecord.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        logger.warning("%s is damaged (%r): its step runs again.", path, error)
        return None


def _read_records(path: Path) -> list[StepRecord]:
    """All records; a last line torn by a kill is cut off, damage anywhere else raises RunDirectoryError."""
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"{path} can't be read ({error}): restore it, or give another run_dir.") from error
    lines = content.split(b"\n")
    torn = lines.pop()
    records = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    if torn:
        logger.warning(
            "%s: the last line was torn by a kill (%d bytes) and is dropped; its step will run again.", path, len(torn)
        )
        atomic_write(path, content[: len(content) - len(torn)])
    return records


def _parse(path: Path, number: int, line: bytes) -> StepRecord:
    try:
        return StepRecord.from_dict(json.loads(line))
    except DAMAGE as error:
        raise RunDirectoryError(
            f"{path}, line {number} is damaged ({error!r}): restore the file, or delete this line and all after it to "
            "run those steps again, or give another run_dir."
        ) from error
