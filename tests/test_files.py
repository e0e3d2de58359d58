"""A folder is written whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from bettertogether.errors import RunDirectoryError
from bettertogether.files import FileLock, atomic_folder, atomic_write, cached_model, model_place, put_anew
from bettertogether.working_folders import working_folder


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as work:
        (work / "file").write_text("text")
        assert not target.exists()
        assert work.parent == target.parent
    assert (target / "file").read_text() == "text"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


def test_of_a_folder_that_is_broken_off_nothing_is_left(tmp_path: Path) -> None:
    def break_off() -> None:
        with atomic_folder(tmp_path / "folder") as work:
            (work / "file").write_text("text")
            raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_of_a_folder_left_goes_a_day_later_when_it_is_written_again(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "folder", put_anew) as work:
            (work / "file").write_text("text")

    left, other = tmp_path / ".folder.a1b2c3d4.tmp", tmp_path / ".folder.old.a1b2c3d4.tmp"
    for each in (left, other):
        (each / "part").mkdir(parents=True)
    # It may be in work.
    write()
    assert left.exists()
    for each in (left, other):
        os.utime(each, (0, 0))
    write()
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "folder"]


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "file").write_text("theirs")
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as work:
        (work / "file").write_text("ours")
    assert (target / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_that_another_process_has_put_into_the_cache_meanwhile_is_taken(tmp_path: Path) -> None:
    place = model_place("model", tmp_path)

    def fill(folder: Path) -> None:
        (folder / "file").write_text("ours")
        place.mkdir()
        (place / "file").write_text("theirs")

    assert cached_model("model", fill, tmp_path) == place
    assert (place / "file").read_text() == "theirs"
    assert list(place.parent.iterdir()) == [place]


def test_a_working_folder_whose_deletion_is_cut_off_is_gone_and_leaves_nothing_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with working_folder(tmp_path, "training") as folder:
            found.append([path.name for path in folder.iterdir()])
            for name in ("state.json", "tensors"):
                (folder / name).touch()

    def cut(folder: Path, **_: object) -> None:
        for file in folder.glob("*"):
            file.unlink()
            raise KeyboardInterrupt

    found: list[list[str]] = []
    with monkeypatch.context() as cutting:
        cutting.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            work()
    work()
    assert found == [[], []]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_a_file_may_be_read_by_those_whom_the_umask_allows_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_the_umask_which_all_threads_share_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[int] = []
    monkeypatch.setattr(os, "umask", masks.append)
    atomic_write(tmp_path / "file", "text")
    assert masks == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_lock_that_was_given_back_is_free_while_a_fork_of_its_owner_lives(tmp_path: Path) -> None:
    lock, forks = FileLock(tmp_path / "lock"), multiprocessing.get_context("fork")
    releasing = forks.Process(target=lock.release)
    releasing.start()
    releasing.join()
    with pytest.raises(RunDirectoryError, match="in use"):
        FileLock(tmp_path / "lock")
    with forks.Pool(1) as pool:
        pool.apply(os.getpid)
        lock.release()
        FileLock(tmp_path / "lock").release()
