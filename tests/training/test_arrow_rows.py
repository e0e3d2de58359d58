"""Rows of tokens in an Arrow file are the rows that were written, and take four bytes a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import random_rows

from bettertogether.training import arrow_rows
from bettertogether.training.arrow_rows import ArrowRows, arrow_file, kept, row_folder, write_arrow
from bettertogether.training.packing import TokenizedRow

# More than are written at once, with and without forms and marks.
ROWS = random_rows(250, shared=5)
ROWS[3] = replace(ROWS[3], forms=[[3, 4, 5], [6]], forced=[True] * 6, fields=["a", "", "b", "", "", ""])


def test_rows_of_a_file_are_those_that_were_written(tmp_path: Path) -> None:
    rows = write_arrow(iter(ROWS), tmp_path / "new" / "rows.arrow")
    assert (len(rows), list(rows), list(ArrowRows(rows.path))) == (250, ROWS, ROWS)
    assert [rows[3], rows[-1], *rows[98:102], *rows[250:]] == [ROWS[3], ROWS[-1], *ROWS[98:102]]


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    assert list(write_arrow([], tmp_path / "rows.arrow")) == []


def test_a_token_takes_four_bytes_of_the_file(tmp_path: Path) -> None:
    sizes = []
    for number in (1000, 2000):
        rows = [TokenizedRow([7] * number, [8] * 16) for _ in range(128)]
        sizes.append(write_arrow(rows, tmp_path / f"{number}.arrow").path.stat().st_size)
    assert sizes[1] - sizes[0] == 4 * 1000 * 128


def test_rows_are_written_before_all_of_them_are_made(tmp_path: Path) -> None:
    sizes: list[int] = []

    def made() -> Iterator[TokenizedRow]:
        for _ in range(300):
            sizes.append(path.stat().st_size)
            yield TokenizedRow([7] * 10_000, [8])

    path = tmp_path / "rows.arrow"
    write_arrow(made(), path)
    assert sizes[250] >= 2 * 100 * 10_000 * 4


def test_few_rows_are_kept_in_a_list_and_many_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "MANY_ROWS", 250)
    few, many = (kept(iter(ROWS), number, tmp_path / "rows.arrow") for number in (249, 250))
    assert (type(few), type(many)) == (list, ArrowRows)
    assert list(few) == list(many) == ROWS


def test_a_job_is_handed_the_file_of_rows_that_lie_in_one(tmp_path: Path) -> None:
    rows = write_arrow(ROWS, tmp_path / "rows.arrow")
    assert arrow_file(rows, tmp_path / "other.arrow") == tmp_path / "rows.arrow"
    assert list(ArrowRows(arrow_file(ROWS, tmp_path / "other.arrow"))) == ROWS


def test_the_folder_of_rows_goes_with_what_is_in_it(tmp_path: Path) -> None:
    with row_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == []
        write_arrow(ROWS, folder / "rows.arrow")
    assert list(tmp_path.iterdir()) == []
