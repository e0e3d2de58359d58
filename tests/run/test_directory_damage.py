"""A run directory that is damaged is an error that names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from directory_files import RUN

from bettertogether.errors import RunDirectoryError
from bettertogether.run.directory import RunDirectory

DAMAGED_LINES = ["[" * 100_000, "{}", "[]", "5", "null", '{"schema": 1}', '{"schema": 1, "nope": 2}']


WHOLE = '{"schema": 1, "index": 0, "step": "", "strategy": "", "status": "complete"'


@pytest.mark.parametrize("line", [*DAMAGED_LINES, WHOLE + ', "ledger": 5}', WHOLE + ', "scores": 5}', "\xff"])
def test_a_damaged_record_is_an_error_that_names_file_and_line(tmp_path: Path, line: str) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    (tmp_path / "records.jsonl").write_text(WHOLE + "}\n" + line + "\n", encoding="latin-1")
    with pytest.raises(RunDirectoryError, match=r"records\.jsonl, line 2 is damaged"):
        RunDirectory.open(tmp_path, RUN)


def test_records_that_are_a_folder_are_an_error_that_names_it(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, RUN).close()
    (tmp_path / "records.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match=r"records\.jsonl can't be read"):
        RunDirectory.open(tmp_path, RUN)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "5",
        "null",
        '{"schema": 1, "run": {}}',
        '{"schema": 1, "run": {}, "finished": null, "checkpoints": 5}',
    ],
)
def test_a_run_json_of_any_damage_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged"):
        RunDirectory.open(tmp_path, RUN)


def test_a_run_json_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged"):
        RunDirectory.open(tmp_path, RUN)


@pytest.mark.parametrize("name", ["n" * 256, "a\0b", 5, b"run", "", "~nobody-of-this-name/run"])
def test_what_names_no_folder_is_an_error(tmp_path: Path, name: Any) -> None:
    with pytest.raises(RunDirectoryError):
        RunDirectory.open(tmp_path / name if name == "n" * 256 else name, RUN)
