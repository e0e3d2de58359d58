"""Every field, every file of a saved program damaged in each way: the program loads, or the error is ours."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import Parity, learner, numbers, parity_engine, two_step_program
from saved import fresh_engine, manifest_of, tuned_program

from bettertogether.artifact import load, load_report, merge, save
from bettertogether.errors import ArtifactError, BetterTogetherError
from bettertogether.records import StepRecord
from bettertogether.report import CompileReport

MISSING = object()
WRONG: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "number": 5,
    "negative": -1,
    "huge": 10**400,
    "infinite": float("inf"),
    "NaN": float("nan"),
    "text": "x",
    "empty": "",
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "long": "a" * 5000,
    "list": [1],
    "mapping": {"x": 1},
    "nested": None,
}
for _ in range(150):
    WRONG["nested"] = [WRONG["nested"]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in JSON data."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damaged(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(data)
    holder = result
    for key in path[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return result


def raw_errors(call: Callable[[], object], what: str) -> list[str]:
    """What a call raises that is none of our errors."""
    try:
        call()
    except BetterTogetherError:
        return []
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"]
    return []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    program = two_step_program(parity_engine(learner))
    tuned = tuned_program(program.remark.lm.engine)
    program.decide.lm, program.remark.lm = tuned.lm, dspy.LM("openai/gpt-4o-mini", top_p=0.5, stop=["x"])
    program.remark.demos = [dspy.Example(number=1, remark="odd").with_inputs("number")]
    program.decide.config = {"temperature": 0.5}
    program.report = CompileReport((StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0)),), 0, 2, "p")
    return save(program, tmp_path / "a")


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_each_field_of_the_manifest_damaged(saved: Path, value: Any) -> None:
    whole = manifest_of(saved)
    raw = []
    for path in places(whole):
        (saved / "artifact.json").write_text(json.dumps(damaged(whole, path, value)))
        raw += raw_errors(lambda: load(saved, base_model=fresh_engine()), f"load, {path}")
        raw += raw_errors(lambda: merge(saved, saved / "out", predictor="remark"), f"merge, {path}")
    assert raw == []


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_each_field_of_the_report_damaged(saved: Path, value: Any) -> None:
    whole = json.loads((saved / "report.json").read_text())
    raw = []
    for path in places(whole):
        (saved / "report.json").write_text(json.dumps(damaged(whole, path, value)))
        raw += raw_errors(lambda: load_report(saved), str(path))
    assert raw == []


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_each_field_of_a_program_that_is_made_anew_damaged(tmp_path: Path, value: Any) -> None:
    program = dspy.ChainOfThought(Parity, temperature=0.5)
    program.predict.demos = numbers(2)
    saved = save(program, tmp_path / "a")
    whole = manifest_of(saved)
    raw = []
    for path in places(whole):
        (saved / "artifact.json").write_text(json.dumps(damaged(whole, path, value)))
        raw += raw_errors(lambda: load(saved), str(path))
    assert raw == []


NOT_JSON = [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b'"x"', b"5", b"{}", b'{"schema": 1}', b"\0" * 50]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
@pytest.mark.parametrize("name", ["artifact.json", "report.json"])
def test_a_file_that_is_no_json_is_named(saved: Path, name: str, content: bytes) -> None:
    manifest = manifest_of(saved)
    del manifest["files"]
    (saved / "artifact.json").write_text(json.dumps(manifest))
    (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{saved}/{name}"):
        load(saved, base_model=fresh_engine())


@pytest.mark.parametrize("name", ["artifact.json", "report.json", "adapters", "adapter", "adapters/file"])
@pytest.mark.parametrize("how", ["gone", "a folder", "a file"])
def test_files_and_folders_in_each_others_place_are_named(saved: Path, name: str, how: str) -> None:
    adapter = next((saved / "adapters").iterdir())
    places = {"adapter": adapter, "adapters/file": adapter / "fake_adapter.json"}
    path = places.get(name, saved / name)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how != "gone":
        path.mkdir() if how == "a folder" else path.write_text("{}")
    with pytest.raises(ArtifactError, match=str(saved)):
        load(saved, base_model=fresh_engine())
