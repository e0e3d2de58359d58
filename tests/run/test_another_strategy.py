"""The call of a run directory with another strategy goes on with the rounds that both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import learner, parity_engine, parity_match
from parity_run import CutOff, Step, comparable, compile_, rounds, steps

from bettertogether import Budget, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.errors import RunDirectoryError
from bettertogether.testing import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


def noted(run_dir: Path) -> Any:
    return json.loads((run_dir / "run.json").read_text())


@pytest.mark.parametrize(
    ("before", "now", "trainings"),
    [
        ("w -> p -> w", "w -> p -> w -> p", 0),
        ("w -> p", ["p -> w", "w -> p -> w"], 2),
        (["w -> p", "p -> w"], ["w", "p -> w -> p"], 0),
        ("p", "w -> x", 1),
    ],
)
def test_it_ends_as_a_fresh_run_of_its_own_and_runs_only_the_steps_that_are_new(
    engine: FakeEngine, tmp_path: Path, before: Any, now: Any, trainings: int
) -> None:
    options = {"optimizers": steps(x=Step("Take care."))}
    fresh = compile_(parity_engine(learner), now, run_dir=tmp_path / "fresh", **options)
    compile_(engine, before, run_dir=tmp_path / "run", **options)
    done = len(engine.trainings)
    compiled = compile_(engine, now, run_dir=tmp_path / "run", **options)
    assert comparable(compiled.report, tmp_path / "run") == comparable(fresh.report, tmp_path / "fresh")
    assert len(engine.trainings) == done + trainings
    assert compiled.lm.model == fresh.lm.model
    assert [dict(demo) for demo in compiled.demos] == [dict(demo) for demo in fresh.demos]
    assert compiled.signature.instructions == fresh.signature.instructions
    header, of_fresh = noted(tmp_path / "run"), noted(tmp_path / "fresh")
    assert header["run"]["strategy"] == of_fresh["run"]["strategy"]
    assert header["run"]["optimizers"].items() >= of_fresh["run"]["optimizers"].items()
    assert header["finished"] is not None


class Starts(Callback):
    """Notes the rounds that were finished when a run began."""

    def on_run_start(self, event: Any) -> None:
        self.finished = [record.strategy for record in event["finished"]]


def test_rounds_that_it_does_not_have_are_kept_but_neither_shown_nor_returned(
    engine: FakeEngine, tmp_path: Path
) -> None:
    longer, starts = compile_(engine, "w -> p", run_dir=tmp_path), Starts()
    records, made = (tmp_path / "records.jsonl").read_bytes(), len(engine.requests)
    compiled = compile_(engine, "w", run_dir=tmp_path, callbacks=[starts])
    assert rounds(compiled) == [("", "complete"), ("w", "complete")]
    assert {candidate["strategy"] for candidate in compiled.candidate_programs} == {"", "w"}
    assert starts.finished == ["", "w"]
    assert "w -> p" not in (tmp_path / "report.html").read_text()
    assert (tmp_path / "records.jsonl").read_bytes() == records
    assert compile_(engine, "w -> p", run_dir=tmp_path).report.rounds == longer.report.rounds
    assert len(engine.requests) == made


def test_a_longer_run_that_was_cut_off_goes_on_and_lets_the_shorter_one_be_asked_for_meanwhile(
    engine: FakeEngine, tmp_path: Path
) -> None:
    fresh = compile_(parity_engine(learner), "p -> w", run_dir=tmp_path / "fresh")
    short = compile_(engine, "p", run_dir=tmp_path / "run")
    cut = compile_(engine, "p -> w", run_dir=tmp_path / "run", callbacks=[CutOff("score p -> w")])
    assert rounds(cut)[-1] == ("p -> w", "skipped")
    assert noted(tmp_path / "run")["finished"] is None
    made = len(engine.requests)
    assert compile_(engine, "p", run_dir=tmp_path / "run").report.rounds == short.report.rounds
    assert len(engine.requests) == made
    again = compile_(engine, "p -> w", run_dir=tmp_path / "run")
    assert comparable(again.report, tmp_path / "run") == comparable(fresh.report, tmp_path / "fresh")
    assert len(engine.trainings) == 1
    assert compile_(engine, "p", run_dir=tmp_path / "run").report.rounds == short.report.rounds


def test_a_step_that_was_left_out_meanwhile_and_has_other_options_now_is_not_taken_unscored(
    engine: FakeEngine, tmp_path: Path
) -> None:
    compile_(engine, "p", run_dir=tmp_path)
    compile_(engine, "w", run_dir=tmp_path, callbacks=[CutOff("score w")])
    compile_(engine, "p", run_dir=tmp_path)
    other = steps(w=LoRAFinetune(parity_match, num_samples=1, rescue=False))
    compile_(engine, "w", run_dir=tmp_path, optimizers=other)
    assert len(engine.trainings) == 2


@pytest.mark.parametrize(("cut", "now"), [("p -> w", ["w", "p -> w"]), (["w", "p -> w"], "p -> w")])
def test_a_round_that_was_cut_off_has_its_place_in_the_strategy_asked_for_now(
    engine: FakeEngine, tmp_path: Path, cut: str | list[str], now: str | list[str]
) -> None:
    compile_(engine, "w", run_dir=tmp_path / "run")
    compile_(engine, cut, run_dir=tmp_path / "run", callbacks=[CutOff("score p -> w")])
    again = compile_(engine, now, run_dir=tmp_path / "run")
    fresh = compile_(parity_engine(learner), now, run_dir=tmp_path / "fresh")
    assert comparable(again.report, tmp_path / "run") == comparable(fresh.report, tmp_path / "fresh")


@pytest.mark.parametrize(("before", "now"), [("auto", "w"), ("w", "auto")])
def test_auto_is_another_run(engine: FakeEngine, tmp_path: Path, before: str, now: str) -> None:
    compile_(engine, before, optimizers={"w": steps()["w"]}, max_rounds=1, run_dir=tmp_path)
    with pytest.raises(RunDirectoryError, match=f"strategy: the directory has '{before}', this call has '{now}'"):
        compile_(engine, now, optimizers={"w": steps()["w"]}, max_rounds=1, run_dir=tmp_path)


def test_a_budget_counts_what_rounds_that_it_does_not_have_took(engine: FakeEngine, tmp_path: Path) -> None:
    compile_(engine, "w -> p", run_dir=tmp_path)
    used, made = noted(tmp_path)["spent"]["metric_calls"], len(engine.requests)
    cut = compile_(engine, "p", run_dir=tmp_path, budget=Budget(metric_calls=used))
    assert rounds(cut) == [("", "complete"), ("p", "skipped")]
    assert f"{used} of {used} metric calls" in str(cut.report.rounds[1].error)
    assert len(engine.requests) == made
