"""A run directory holds whole records or none, one run at a time, and says what is damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from directory_files import RUN, files_of, record
from forking import Programs, programs_that_import

from bettertogether.errors import RunDirectoryError
from bettertogether.files import atomic_write
from bettertogether.records import OtherDetails
from bettertogether.run.directory import RunDirectory, new_run_directory
from bettertogether.run.same_call import WHOLE
from bettertogether.working_folders import kept_working_folders, working_folder

APPEND_FOREVER = """
from bettertogether.records import StepRecord
from bettertogether.run.directory import RunDirectory
with RunDirectory.open({folder!r}, {{}}) as directory:
    append = lambda: directory.append(StepRecord(len(directory.records()), "p", "p", "complete", error="x" * 5000))
    append()
    print("ready", flush=True)
    while True:
        append()
"""

FULL_DISK = """
import resource, signal
from bettertogether.errors import RunDirectoryError
from bettertogether.files import atomic_write
from bettertogether.records import StepRecord
from bettertogether.run.directory import RunDirectory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunDirectory.open({folder!r}, {{}}) as directory:
    directory.append(StepRecord(0, "", "", "complete", error="x" * 1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        directory.append(StepRecord(1, "p", "p", "complete", error="x" * 9000))
    except RunDirectoryError as error:
        print(len(directory.records()), error)
"""


def test_records_come_back_as_they_were_appended(tmp_path: Path) -> None:
    written = [record(0), record(1, details=OtherDetails("é\n"), error="x"), record(2, scores=None)]
    with RunDirectory.open(tmp_path / "run", RUN) as directory:
        for each in written:
            directory.append(each)
    with RunDirectory.open(tmp_path / "run", RUN) as directory:
        assert directory.records() == tuple(written)


def test_what_was_set_aside_stays_when_an_earlier_round_is_appended_again(tmp_path: Path) -> None:
    first, second = record(0), record(1, strategy="p -> p")
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(first)
        directory.set_aside(second)
        directory.append(first)
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert directory.unscored == second
        directory.append(second)
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert directory.unscored is None


def test_what_could_not_be_deleted_of_a_round_that_is_recorded_goes_when_the_directory_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("Input/output error")

    done = record(0, program={})
    with RunDirectory.open(tmp_path, RUN) as directory, monkeypatch.context() as breaking:
        directory.begin(done.strategy)
        with kept_working_folders(directory.adapters), working_folder(directory.adapters, "training-1"):
            directory.set_aside(done)
        for module, name in ((Path, "unlink"), (shutil, "rmtree")):
            breaking.setattr(module, name, broken)
        directory.append(done)
        assert directory.records() == (done,)
    left = {"unscored.json", ".training-1.lock", "training-1"}
    assert left <= {path.name for path in tmp_path.rglob("*")}
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert (directory.records(), directory.unscored) == ((done,), None)
    assert not left & {path.name for path in tmp_path.rglob("*")}


def test_a_working_folder_that_can_not_be_renamed_is_deleted_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "replace", broken)
    with working_folder(tmp_path, "training-1") as folder:
        (folder / "file").write_text("text")
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_has_a_folder_for_adapters_and_says_what_was_asked(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a" / "run", RUN) as directory:
        assert directory.adapters.is_dir()
        header = json.loads((directory.path / "run.json").read_text())
        assert (header["schema"], header["run"]) == (1, RUN)
        assert sorted(path.name for path in directory.path.iterdir() if path.is_dir()) == ["adapters"]


def test_finish_is_remembered(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert not directory.finished
        directory.finish()
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert directory.finished


def test_a_last_line_torn_at_any_byte_is_dropped_and_the_file_repaired(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0))
        directory.append(record(1, details=OtherDetails("é" * 20)))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in [*range(first + 1, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with RunDirectory.open(tmp_path, RUN) as directory:
            assert directory.records() == (record(0),)
        assert path.read_bytes() == whole[:first]


def test_a_torn_line_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0))
    with open(tmp_path / "records.jsonl", "ab") as file:
        file.write(b'{"schema": 1, "ind')
    RunDirectory.open(tmp_path, RUN).close()
    assert "18 bytes" in caplog.text


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0))
        directory.append(record(1))
    path = tmp_path / "records.jsonl"
    damaged = path.read_bytes().replace(b'"index": 0', b'"index": #', 1)
    path.write_bytes(damaged)
    with pytest.raises(RunDirectoryError, match="line 1 is damaged"):
        RunDirectory.open(tmp_path, RUN)
    assert path.read_bytes() == damaged


def test_a_record_of_another_schema_is_an_error(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    (tmp_path / "records.jsonl").write_text(json.dumps({**record(0).to_dict(), "schema": 99}) + "\n")
    with pytest.raises(RunDirectoryError, match="schema 99"):
        RunDirectory.open(tmp_path, RUN)


def test_another_run_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    before = files_of(tmp_path)
    other = {**RUN, "seed": 1, "options": {"p": {"candidates": 9}}, "valset": "abc"}
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(tmp_path, other)
    message = str(caught.value)
    assert "options.p.candidates: the directory has 6, this call has 9" in message
    assert "seed: the directory has 0, this call has 1" in message
    assert "valset: the directory has None, this call has 'abc'" in message
    assert "strategy" not in message
    assert files_of(tmp_path) == before


def test_what_differs_in_the_call_itself_is_shown_before_the_options_of_steps(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    other = {**RUN, "options": {"w": {f"option_{number}": number for number in range(20)}}, "valset": "abc"}
    with pytest.raises(RunDirectoryError, match=r"what differs:\n  valset: [^\n]*\n  options\.p\.candidates: "):
        RunDirectory.open(tmp_path, other)


STEPS = {WHOLE: "Sampling 1", "num_samples": "4", "rescue": "True"}


def test_an_object_of_several_fields_differs_by_its_fields_and_is_the_same_as_its_text_alone(tmp_path: Path) -> None:
    def asked(sampling: Any) -> dict[str, Any]:
        return {**RUN, "optimizers": {"w": {"sampling": sampling}}}

    for before, named in (
        (STEPS[WHOLE], ": the directory has 'Sampling 1', this call has 'Sampling 2'"),
        (STEPS, ".num_samples: the directory has '4', this call has '2'"),
    ):
        folder = tmp_path / type(before).__name__
        with RunDirectory.open(folder, asked(before)) as directory:
            directory.append(record(1, step="w"))
        RunDirectory.open(folder, asked(STEPS)).close()
        with pytest.raises(RunDirectoryError) as caught:
            RunDirectory.open(folder, asked({**STEPS, WHOLE: "Sampling 2", "num_samples": "2"}))
        assert str(caught.value).splitlines()[1:-1] == [f"  optimizers.w.sampling{named}"]


def test_of_many_differences_the_first_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "run", {**RUN, "student": {f"field_{n}": 1 for n in range(9)}}).close()
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(tmp_path / "run", {**RUN, "student": {f"field_{n}": 2 for n in range(9)}})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == [
        *(f"  student.field_{n}" for n in range(5)),
        "  and 4 more",
    ]


def test_other_versions_are_noted_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    RunDirectory.open(tmp_path, {**RUN, "versions": {"dspy": "9"}}).close()
    assert "versions.dspy: the directory has '3.4.1', this call has '9'" in caplog.text


def test_tuples_in_what_was_asked_do_not_make_another_run(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, {"fields": ("a", "b")}).close()
    RunDirectory.open(tmp_path, {"fields": ["a", "b"]}).close()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"thesis\.txt"):
        RunDirectory.open(tmp_path, RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.open(tmp_path / "run", RUN)


def test_a_newer_run_json_is_refused(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, "schema": 2}))
    with pytest.raises(RunDirectoryError, match="schema 2"):
        RunDirectory.open(tmp_path, RUN)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "run": 3, "finished": null}'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunDirectoryError, match="is damaged"):
        RunDirectory.open(tmp_path, RUN)


def test_what_was_asked_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not JSON"):
        RunDirectory.open(tmp_path / "run", {"metric": print})
    assert not (tmp_path / "run").exists()


def test_a_record_that_is_not_json_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        with pytest.raises(RunDirectoryError, match=r"step 4 \(p\) is not JSON"):
            directory.append(record(4, details=OtherDetails(Path("x"))))  # type: ignore[arg-type]
        assert directory.records() == ()


def test_a_closed_directory_takes_no_more_records(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, RUN)
    directory.close()
    with pytest.raises(RunDirectoryError, match="was closed"):
        directory.append(record(0))


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with programs_that_import("bettertogether.run.directory") as running:
        yield running


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_process_loses_no_finished_record_and_holds_no_lock(programs: Programs, tmp_path: Path) -> None:
    count = 0
    for _ in range(3):
        process = programs.start(APPEND_FOREVER.format(folder=str(tmp_path)))
        assert programs.line() == "ready"
        time.sleep(0.15)
        os.kill(process, signal.SIGKILL)
        assert programs.exit_code() == -signal.SIGKILL
        with RunDirectory.open(tmp_path, {}) as directory:
            assert [each.index for each in directory.records()] == list(range(len(directory.records())))
            assert len(directory.records()) > count
            count = len(directory.records())


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_a_write_that_the_disk_cuts_off_raises_and_takes_nothing_with_it(programs: Programs, tmp_path: Path) -> None:
    programs.start(FULL_DISK.format(folder=str(tmp_path)))
    said = programs.line()
    assert said.startswith("1 ")
    assert "run_dir" in said
    assert programs.exit_code() == 0
    with RunDirectory.open(tmp_path, {}) as directory:
        assert [each.index for each in directory.records()] == [0]
    assert (tmp_path / "records.jsonl").read_bytes().endswith(b"\n")


def test_a_full_disk_leaves_an_earlier_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        atomic_write(directory.report, "old")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            atomic_write(directory.report, "new")
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            directory.finish()
        monkeypatch.undo()
        assert directory.report.read_text() == "old"
        assert not directory.finished
        assert [p.name for p in tmp_path.glob(".*")] == []


def test_what_a_kill_left_of_a_write_is_removed(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    (tmp_path / ".report.html.abc.tmp").write_text("half")
    RunDirectory.open(tmp_path, RUN).close()
    assert not (tmp_path / ".report.html.abc.tmp").exists()


def test_a_run_killed_before_run_json_was_written_can_start(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    (tmp_path / ".run.json.abc.tmp").write_text("half")
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert directory.records() == ()


def test_atomic_write_keeps_unpaired_surrogates_from_breaking_a_run(tmp_path: Path) -> None:
    atomic_write(tmp_path / "text", "a\ud800")
    assert (tmp_path / "text").read_bytes() == b"a\xed\xa0\x80"


def test_a_record_with_an_unpaired_surrogate_comes_back(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0, error="\ud800"))
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert directory.records() == (record(0, error="\ud800"),)


def test_the_default_directory_is_under_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path))
    assert new_run_directory().parent == tmp_path / "runs"
    monkeypatch.delenv("BETTERTOGETHER_CACHE")
    assert new_run_directory().parent == Path.home() / ".cache" / "bettertogether" / "runs"


def test_a_folder_that_a_kill_left_of_an_artifact_saved_here_is_removed(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    (tmp_path / ".program.abc.tmp" / "adapters").mkdir(parents=True)
    RunDirectory.open(tmp_path, RUN).close()
    assert not (tmp_path / ".program.abc.tmp").exists()


def test_a_file_system_without_sync_of_folders_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0))
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        directory.append(record(0, score=math.nan, step_gain=-math.inf, scores=(math.inf, 1.0)))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (tmp_path / "records.jsonl").read_text().splitlines()
    loaded = json.loads(line, parse_constant=refuse)
    assert (loaded["score"], loaded["step_gain"], loaded["scores"]) == (None, None, [None, 1.0])


def test_rows_that_a_killed_training_left_go_when_the_directory_is_opened(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run", RUN) as directory:
        (directory.adapters / ".rows-1f.tmp").mkdir()
        (directory.adapters / ".rows-1f.tmp" / "rows.arrow").touch()
        (directory.adapters / "model@r1-3f9c2a1b").mkdir()
    with RunDirectory.open(tmp_path / "run", RUN) as directory:
        assert [path.name for path in directory.adapters.iterdir()] == ["model@r1-3f9c2a1b"]
