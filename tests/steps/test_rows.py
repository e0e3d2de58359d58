"""Rows, their files, and their labels in proportion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bettertogether.engines.protocol import ChatMessage, FieldSpan, TrainingRow
from bettertogether.errors import DataError
from bettertogether.steps.rows import SPELT_OUT, Row, balance_labels, read_rows, write_rows

PROMPT: tuple[ChatMessage, ...] = ({"role": "system", "content": "s"}, {"role": "user", "content": "ü\n"})


def row(label: str | None = None, predictor: str = "self", example: int = 0, source: str = "student") -> Row:
    return Row(PROMPT, f"answer {example}", predictor, example, label, source)


def test_rows_written_are_read_back_as_they_were(tmp_path: Path) -> None:
    rows = [row("a"), row(None, "other", 3, "rescue")]
    assert read_rows(write_rows(rows, tmp_path / "deep" / "rows.jsonl")) == rows


def test_a_rows_file_is_json_lines_that_datasets_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_rows([row("a"), row(None, example=1)], tmp_path / "rows.jsonl")
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["prompt", "completion", "predictor", "example", "label", "source"]
    assert table[0]["prompt"] == list(PROMPT)
    assert table[1]["completion"] == [{"role": "assistant", "content": "answer 1"}]


FORM: tuple[ChatMessage, ...] = ({"role": "user", "content": "demo"}, *PROMPT)
SCHEMA = {"type": "json_schema", "schema": {"properties": {"b": {"type": "string"}, "a": {"enum": [1, None]}}}}
WHOLE = Row(
    PROMPT, "answer", "self", 0, forms=(FORM, PROMPT), response_format=SCHEMA, fields=(FieldSpan("answer", 0, 6),)
)


def test_forms_format_and_fields_are_read_back_as_they_were(tmp_path: Path) -> None:
    (read,) = read_rows(write_rows([WHOLE], tmp_path / "rows.jsonl"))
    assert read == WHOLE
    assert json.dumps(read.response_format) == json.dumps(SCHEMA)
    assert isinstance(read.fields[0], FieldSpan)


def rows_with_forms(count: int) -> list[Row]:
    """Rows of a question each, with two forms that begin alike and one that shows something else before it."""
    rows = []
    for number in range(count):
        question: ChatMessage = {"role": "user", "content": f"question {number}"}
        prompt: tuple[ChatMessage, ...] = (PROMPT[0], question)
        after: tuple[ChatMessage, ...] = ({"role": "user", "content": "demo"},)
        rows.append(Row(prompt, "yes", "self", number, forms=((PROMPT[0], *after, question), prompt, after)))
    return rows


def test_forms_that_begin_as_those_of_earlier_rows_are_written_by_hash(tmp_path: Path) -> None:
    rows = rows_with_forms(SPELT_OUT + 2)
    path = write_rows(rows, tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["forms"] for line in lines[:SPELT_OUT]] == [[list(form) for form in row.forms] for row in rows][:-2]
    for line, row in zip(lines[SPELT_OUT:], rows[SPELT_OUT:], strict=True):
        first, second, third = line["forms"]
        assert [len(first), first[0].keys(), first[0]["role"]] == [1, {"role", "content"}, "beginning"]
        assert len(first[0]["content"]) == len(second[0]["content"]) == 12
        assert third == list(row.forms[2])
    assert read_rows(path) == rows


def test_rows_may_be_deleted_from_a_file_and_the_others_keep_their_forms(tmp_path: Path) -> None:
    rows = rows_with_forms(SPELT_OUT + 2)
    path = write_rows(rows, tmp_path / "rows.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:SPELT_OUT] + lines[-1:]))
    assert read_rows(path) == [*rows[1:SPELT_OUT], rows[-1]]


def test_a_form_whose_beginning_is_gone_from_the_file_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    path = write_rows(rows_with_forms(SPELT_OUT + 1), tmp_path / "rows.jsonl")
    path.write_text(path.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: no line before has the form .*keep the first 100 rows"):
        read_rows(path)


def test_a_row_without_forms_format_and_fields_is_written_without_them() -> None:
    assert row().to_json().keys() == {"prompt", "completion", "predictor", "example", "label", "source"}


def test_datasets_reads_a_file_of_rows_with_schemas_of_several_shapes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    other = replace(WHOLE, response_format={"type": "json_object", "schema": {"properties": ["x"]}})
    path = write_rows([row(), WHOLE, other], tmp_path / "rows.jsonl")
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [turn["content"] for turn in table[1]["prompt"]] == ["s", "ü\n"]
    assert json.loads(table[2]["response_format"]) == other.response_format


def test_the_engine_is_given_all_of_a_row() -> None:
    assert WHOLE.training_row == TrainingRow(PROMPT, "answer", (FORM, PROMPT), SCHEMA, (FieldSpan("answer", 0, 6),))


def test_a_sample_shows_a_row_without_its_other_forms() -> None:
    assert WHOLE.sample == replace(WHOLE, forms=(), response_format=None, fields=()).to_json()


@pytest.mark.parametrize(
    "wrong",
    [
        {"forms": [[{"role": "user"}]]},
        {"forms": 3},
        {"response_format": "{"},
        {"response_format": {"type": "json_object"}},
        {"fields": [{"name": "answer", "start": 0}]},
        {"fields": [{"name": "answer", "start": 0, "end": 7}]},
        {"fields": [{"name": "answer", "start": 3, "end": 2}]},
        {"fields": [{"name": "answer", "start": "0", "end": 2}]},
    ],
)
def test_wrong_forms_format_or_fields_are_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Not a row"):
        Row.from_json({**WHOLE.to_json(), **wrong})


def test_a_row_may_have_its_completion_as_text_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": list(PROMPT), "completion": "yes"}) + "\n")
    assert read_rows(path) == [Row(PROMPT, "yes", "", -1, None, "given")]


def test_null_in_a_row_is_missing_as_a_table_of_files_with_other_columns_writes_it() -> None:
    others = ("predictor", "example", "label", "source", "forms", "response_format", "fields", "rejected")
    sparse = {"prompt": list(PROMPT), "completion": "yes", **dict.fromkeys(others)}
    assert Row.from_json(sparse) == Row(PROMPT, "yes", "", -1, None, "given")


def test_the_example_of_a_row_is_a_whole_number_however_it_is_written() -> None:
    plain = {"prompt": list(PROMPT), "completion": "yes"}
    assert repr(Row.from_json({**plain, "example": 3.0}).example) == "3"
    for wrong in ("3", 3.5, True, float("nan"), [3]):
        with pytest.raises(DataError, match="is no whole number"):
            Row.from_json({**plain, "example": wrong})


def test_a_label_that_is_no_text_counts_by_its_text() -> None:
    assert Row.from_json({"prompt": list(PROMPT), "completion": "yes", "label": 0}).label == "0"


def test_blank_lines_in_a_rows_file_do_not_matter(tmp_path: Path) -> None:
    path = write_rows([row()], tmp_path / "rows.jsonl")
    path.write_text("\n" + path.read_text() + "\n")
    assert read_rows(path) == [row()]


def test_line_separators_of_unicode_in_a_row_do_not_break_its_line(tmp_path: Path) -> None:
    odd = Row(PROMPT, "one\u2028two\x85three", "self", 0)
    assert read_rows(write_rows([odd, odd], tmp_path / "rows.jsonl")) == [odd, odd]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "{}",
        '{"prompt": 1, "completion": "x"}',
        "[]",
        '{"prompt": [], "completion": []}',
        '{"prompt": [], "completion": [{"content": null}]}',
    ],
)
def test_a_line_that_is_no_row_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = write_rows([row()], tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl line 2"):
        read_rows(path)


def shares(labels: Sequence[str | None], wanted: Sequence[str | None]) -> dict[str | None, int]:
    chosen = balance_labels(labels, wanted)
    assert chosen == sorted(chosen)
    for label in labels:
        times = [chosen.count(position) for position, each in enumerate(labels) if each == label]
        assert max(times) - min(times) <= 1
    return Counter(labels[position] for position in chosen)


def test_balance_repeats_the_rare_label_and_leaves_out_of_the_common() -> None:
    assert shares(["a"] * 30 + ["b"] * 5, ["a", "b"] * 20) == {"a": 15, "b": 15}


def test_balance_keeps_rows_that_are_balanced_already() -> None:
    labels: list[str | None] = ["a", "b"] * 8
    assert balance_labels(labels, labels) == list(range(16))


def test_balance_aims_at_the_skew_of_the_trainset() -> None:
    found = shares(["a"] * 10 + ["b"] * 10, ["a"] * 30 + ["b"] * 10)
    assert found["a"] == 3 * found["b"]


def test_balance_never_repeats_a_row_more_than_three_times() -> None:
    labels = ["a"] * 50 + ["b"]
    chosen = balance_labels(labels, ["a", "b"] * 25)
    assert max(chosen.count(position) for position in chosen) == 3


def test_balance_keeps_rows_without_a_label_as_they_are() -> None:
    assert shares(["a", None, "a", "b", None, "a"], ["a", "b"]) == {"a": 3, "b": 3, None: 2}


def test_balance_keeps_a_label_whose_share_is_less_than_a_row() -> None:
    assert shares(["a", "b"], ["a"] * 100 + ["b"]) == {"a": 3, "b": 1}


def test_balance_without_labels_keeps_all() -> None:
    assert balance_labels([None, None], [None] * 4) == [0, 1]


def test_balance_keeps_every_label_it_has_when_another_has_no_rows() -> None:
    assert shares(["a"] * 12 + ["b"] * 4, ["a", "b", "c"] * 10) == {"a": 12, "b": 12}


def test_balance_with_one_label_left_keeps_all() -> None:
    assert balance_labels(["a"] * 4, ["a", "b"] * 4) == [0, 1, 2, 3]
