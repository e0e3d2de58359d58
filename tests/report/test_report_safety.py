"""A report that comes from elsewhere is checked when it is read, and nothing in it is active where it is shown."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import EVIL, Page, full_report, page_of, report

from bettertogether.errors import BetterTogetherError, ConfigError, DataError
from bettertogether.records import Failure, OtherDetails, StepRecord
from bettertogether.report import CompileReport

STEERING = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\r"


def as_json(result: CompileReport) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(data)
    holder: Any = result
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return result


FULL = as_json(full_report("plain"))
FULL["rounds"][1]["failures"] = [{"kind": "timeout", "count": 1, "reason": "slow", "example": "example 0: n=1"}]


@pytest.mark.parametrize("value", [EVIL, {EVIL: EVIL}, [EVIL], {"score": EVIL}, [{EVIL: EVIL}]], ids=str)
def test_html_in_any_place_of_a_report_is_refused_or_escaped(value: Any) -> None:
    for path in places(FULL):
        try:
            page = page_of(CompileReport.from_dict(changed(FULL, path, value)))
        except DataError:
            continue
        assert "<script" not in page, path
        assert "<img" not in page, path
        assert Page(page).open == [], path


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, True, [], {}, [[]], {"x": None}, float("nan")], ids=str)
def test_a_wrong_value_in_any_place_of_a_report_is_our_error_or_shown(value: Any) -> None:
    for path in places(FULL):
        try:
            result = CompileReport.from_dict(changed(FULL, path, value))
            assert page_of(result), path
            assert str(result), path
        except BetterTogetherError:
            continue


def test_a_missing_field_in_any_place_of_a_report_is_our_error_or_shown() -> None:
    for path in places(FULL):
        data = copy.deepcopy(FULL)
        holder: Any = data
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        try:
            result = CompileReport.from_dict(data)
            assert page_of(result), path
            assert str(result), path
        except BetterTogetherError:
            continue


@pytest.mark.parametrize("field", ["seed", "valset_size", "strategy"])
def test_what_is_only_shown_is_escaped(field: str) -> None:
    page = page_of(CompileReport.from_dict(as_json(report()) | {field: EVIL}))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_status_of_a_round_is_escaped() -> None:
    page = page_of(CompileReport.from_dict(changed(as_json(report()), ("rounds", 1, "status"), EVIL)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_report_made_with_html_in_it_is_escaped_too() -> None:
    failures = (Failure(EVIL, 1, EVIL, EVIL),)
    rounds = (StepRecord(0, EVIL, EVIL, EVIL, 0.5, (0.0, 1.0), failures),)  # type: ignore[arg-type]
    page = page_of(CompileReport(rounds, 0, EVIL, EVIL, seed=EVIL))  # type: ignore[arg-type]
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("selected",), "1", "The report is damaged at selected: Input should be a valid integer, got '1'."),
        (("rounds",), {}, "The report is damaged at rounds: "),
        (("rounds", 1, "score"), EVIL, "The report is damaged at rounds.1.score: Input should be a valid number, got"),
        (("rounds", 0, "ledger", "lm_calls"), "9", "The report is damaged at rounds.0.ledger.lm_calls: "),
        (("rounds", 0, "new"), 1, "The report is damaged at rounds.0.new: Unexpected keyword argument, got 1."),
        (("rounds", 2, "details", "history", 0, "loss"), "low", "The report is damaged at rounds.2.details.weight.h"),
        (("schema",), 3, "report with schema 3; this version reads schemas 1 and 2"),
    ],
)
def test_the_error_names_the_place_and_what_came(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        CompileReport.from_dict(changed(FULL, path, value))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("data", [None, 5, "report", [], [1], {}, {"schema": 1}], ids=repr)
def test_what_is_no_report_is_our_error(data: Any) -> None:
    with pytest.raises(DataError):
        CompileReport.from_dict(data)
    with pytest.raises(DataError):
        StepRecord.from_dict(data)


def test_a_report_written_before_failures_were_counted_is_read() -> None:
    data = as_json(report())
    for each in data["rounds"]:
        del each["failures"], each["scored_example"]
    assert CompileReport.from_dict(data) == report()


def test_the_table_can_not_steer_a_terminal() -> None:
    rounds = (StepRecord(0, "", STEERING, STEERING, 0.5, (0.0, 1.0), (Failure(STEERING, 1, "", ""),)),)  # type: ignore[arg-type]
    result = CompileReport(rounds, 0, 2, STEERING, warnings=(STEERING,))
    for text in (str(result), repr(result), page_of(result), result._repr_html_()):
        assert not {"\x1b", "\x07", "\r"} & set(text)
        assert r"\x1b]52;c;ZXZpbA==\x07\x1b[2J\r" in text


def test_a_notebook_shows_the_table_of_rounds_and_the_warnings() -> None:
    result = report(warnings=(EVIL,))
    page = Page(result._repr_html_())
    assert page.open == []
    assert page.tags == {
        "div", "header", "h1", "p", "code", "b", "span",
        "table", "thead", "tbody", "tr", "th", "td", "aside", "ul", "li",
    }  # fmt: skip
    assert "p -> w selected0.750+0.500 [+0.000, +1.000]4complete" in page.text
    assert "alert('x')" in page.text


def test_a_prompt_shows_the_table_not_the_records() -> None:
    assert repr(report()) == str(report())


def test_a_record_is_shown_without_its_scores_prompts_and_details() -> None:
    text = repr(StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0), details=OtherDetails("a"), program={"self": {}}))
    assert text == (
        "StepRecord(index=0, step='', strategy='', status='complete', score=0.5, failures=(), scored_example=None, "
        "step_gain=None, ledger=Ledger(program_calls=0, metric_calls=0, lm_calls=0, cache_hits=0, prompt_tokens=0, "
        "generated_tokens=0, trained_tokens=0, seconds=0.0, cost=0.0), models={}, error=None)"
    )


@pytest.mark.parametrize("position", [-1, 4, "1", None, 1.0, True])
def test_a_position_that_is_no_round_is_refused(position: Any) -> None:
    for method in (report().gain, report().score_interval):
        with pytest.raises(DataError, match="is not allowed: there are 4 rounds, from 0"):
            method(position)


@pytest.mark.parametrize("path", [None, 5, "", b""])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match="is not allowed: give the file to write"):
        report().to_html(path)


def test_a_page_is_written_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    report().to_html("~/report.html")
    assert (tmp_path / "report.html").read_text() == page_of(report())


def test_a_folder_that_is_not_there_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(BetterTogetherError):
        report().to_html(tmp_path / "missing" / "report.html")
