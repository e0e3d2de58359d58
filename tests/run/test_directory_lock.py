"""A run directory belongs to one run at a time, on file systems without locks too."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from directory_files import RUN, files_of, record

from bettertogether.errors import RunDirectoryError
from bettertogether.run.directory import RunDirectory
from bettertogether.working_folders import working_folder


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with locks, and one without."""
    if not request.param:
        monkeypatch.setattr("fcntl.flock", without_locks)


def test_two_at_once_are_refused_and_the_directory_is_free_after_close(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, RUN)
    with pytest.raises(RunDirectoryError, match=f"in use by another run .process {os.getpid()} since"):
        RunDirectory.open(tmp_path, RUN)
    directory.close()
    RunDirectory.open(tmp_path, RUN).close()


def test_a_failed_open_leaves_no_lock_behind(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    with pytest.raises(RunDirectoryError, match="another run"):
        RunDirectory.open(tmp_path, {})
    RunDirectory.open(tmp_path, RUN).close()


@pytest.mark.usefixtures("locks")
def test_a_run_whose_directory_was_deleted_leaves_that_of_the_next_run_alone(tmp_path: Path) -> None:
    first = RunDirectory.open(tmp_path / "run", RUN)
    first.append(record(0))
    shutil.rmtree(first.path)
    with pytest.raises(RunDirectoryError, match="was deleted, moved or taken over by another run"):
        first.append(record(1))
    assert not first.path.exists()
    second = RunDirectory.open(first.path, {**RUN, "seed": 1})
    before = files_of(first.path)
    for write in (first.append, first.set_aside):
        with pytest.raises(RunDirectoryError, match="was deleted, moved or taken over"):
            write(record(1))
    with pytest.raises(RunDirectoryError, match="was deleted, moved or taken over"):
        first.finish()
    first.close()
    assert files_of(first.path) == before
    second.append(record(0))
    with pytest.raises(RunDirectoryError, match="in use by another run"):
        RunDirectory.open(first.path, {**RUN, "seed": 1})


@pytest.mark.usefixtures("locks")
def test_a_directory_that_a_full_disk_kept_from_opening_is_free_while_the_error_is_kept(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(RunDirectoryError, match="can't be written: File too large") as kept:
            RunDirectory.open(tmp_path, RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0))
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_a_file_says_that_a_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    directory = RunDirectory.open(tmp_path, RUN)
    assert "a file system without locks" in caplog.text
    with pytest.raises(RunDirectoryError, match=f"in use by another run .process {os.getpid()} on"):
        RunDirectory.open(tmp_path, RUN)
    directory.close()
    RunDirectory.open(tmp_path, RUN).close()


def test_without_locks_a_run_of_a_process_that_ended_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = tmp_path / "lock.owner"
    owner.write_text(f"process {ended.pid} on {platform.node()}")
    with RunDirectory.open(tmp_path, RUN):
        assert owner.read_text() == f"process {os.getpid()} on {platform.node()}"
    owner.write_text(elsewhere := f"process {ended.pid} on another-machine")
    with pytest.raises(RunDirectoryError, match=f"{elsewhere}; if that process has ended, delete"):
        RunDirectory.open(tmp_path, RUN)


def test_without_locks_a_working_folder_that_is_done_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks)
    with working_folder(tmp_path, "training-1f") as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".training-1f.lock",
            ".training-1f.lock.owner",
            "training-1f",
        ]
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []
