"""A run that was cut off goes on with the next call and ends as if it had not been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, models, parity_engine, parity_match, parity_program, two_step_engine, two_step_program
from parity_run import TRAIN, VAL, CutOff, Step, comparable, compile_, rounds, steps

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.errors import BudgetExceeded, RunDirectoryError
from bettertogether.report import CompileReport
from bettertogether.run.directory import RunDirectory
from bettertogether.testing import FakeEngine, FakeRequest


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


def test_ctrl_c_in_a_step_returns_the_best_so_far_without_a_failure(engine: FakeEngine) -> None:
    compiled = compile_(engine, "w -> x -> p", optimizers=steps(x=Step(raises=[KeyboardInterrupt()])))
    assert compiled.flag_compilation_error_occurred is False
    assert rounds(compiled)[-1] == ("w -> x", "skipped")
    assert compiled.report.selected == 1
    assert "interrupted" in str(compiled.report.rounds[-1].error)


def test_ctrl_c_in_a_step_is_raised_where_asked_to_and_all_is_kept_for_going_on(
    engine: FakeEngine, tmp_path: Path
) -> None:
    stopping = steps(x=Step(raises=[KeyboardInterrupt()]))
    options: dict[str, Any] = {"on_step_error": "raise", "run_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compile_(engine, "w -> x", optimizers=stopping, **options)
    requests = len(engine.requests)
    compiled = compile_(engine, "w -> x", optimizers=steps(x=Step()), **options)
    assert rounds(compiled) == [("", "complete"), ("w", "complete"), ("w -> x", "complete")]
    assert len(engine.requests) == requests + len(VAL)


def test_ctrl_c_while_the_student_is_scored_is_raised() -> None:
    def interrupt(request: FakeRequest, number: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_(parity_engine(interrupt), "p")


@pytest.mark.parametrize(
    ("error", "strategy"),
    [
        (OSError("disk gone"), "x -> p -> w"),
        (KeyboardInterrupt(), "p -> x -> w"),
        (BudgetExceeded("used up"), "p -> w -> x"),
        (OSError("disk gone"), "w -> p -> x -> p"),
    ],
)
def test_the_same_call_goes_on_and_ends_as_an_uninterrupted_run(
    tmp_path: Path, error: BaseException, strategy: str
) -> None:
    whole_engine, engine = parity_engine(learner), parity_engine(learner)
    whole = compile_(whole_engine, strategy, optimizers=steps(x=Step()), run_dir=tmp_path / "whole")
    first = compile_(engine, strategy, optimizers=steps(x=Step(raises=[error])), run_dir=tmp_path / "run")
    assert len(first.report.rounds) < len(whole.report.rounds) + 1
    second = compile_(engine, strategy, optimizers=steps(x=Step()), run_dir=tmp_path / "run")
    assert comparable(second.report, tmp_path / "run") == comparable(whole.report, tmp_path / "whole")
    assert len(engine.trainings) == len(whole_engine.trainings)
    assert second.lm.model == whole.lm.model
    assert [dict(demo) for demo in second.demos] == [dict(demo) for demo in whole.demos]


def test_a_finished_run_runs_nothing_again(engine: FakeEngine, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = compile_(engine, run_dir=run_dir)
    made = len(engine.requests)
    second = compile_(engine, run_dir=run_dir)
    assert (len(engine.requests), len(engine.trainings)) == (made, 1)
    assert comparable(second.report, run_dir) == comparable(first.report, run_dir)
    assert second(number=5).parity == "odd"


def test_a_run_goes_on_in_another_engine_that_loads_the_adapters(tmp_path: Path) -> None:
    first_engine, second_engine = parity_engine(learner), parity_engine(learner)
    first = compile_(first_engine, "w", run_dir=tmp_path / "run")
    second = compile_(second_engine, "w", run_dir=tmp_path / "run")
    assert second_engine.requests == []
    assert second.lm.model == first.lm.model
    second(number=5)
    assert models(second_engine.requests) == {first.lm.model}


def test_a_run_directory_that_was_moved_goes_on(tmp_path: Path) -> None:
    first = compile_(parity_engine(learner), "w", run_dir=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    engine = parity_engine(learner)
    second = compile_(engine, "w", run_dir=tmp_path / "moved")
    assert second.lm.model == first.lm.model
    assert engine.adapter_folder(second.lm.model) == tmp_path / "moved" / "adapters" / second.lm.model.partition("/")[2]


def test_a_run_whose_directory_another_one_took_ends_without_a_word_in_it(engine: FakeEngine, tmp_path: Path) -> None:
    class Replacing(Step):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            shutil.rmtree(tmp_path / "run")
            RunDirectory.open(tmp_path / "run", {"seed": 1}).close()
            return student

    with pytest.raises(RunDirectoryError, match="was deleted, moved or taken over by another run"):
        compile_(engine, "x", optimizers=steps(x=Replacing()), run_dir=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapters", "lock", "run.json"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["run"]["seed"] == 1


def test_an_adapter_of_a_record_that_was_changed_since_is_not_taken(tmp_path: Path) -> None:
    compile_(parity_engine(learner), strategy="w", run_dir=tmp_path / "run")
    (saved,) = (tmp_path / "run" / "adapters").rglob("fake_adapter.json")
    content = json.loads(saved.read_text())
    saved.write_text(json.dumps({**content, "memory": {}}))
    with pytest.raises(RunDirectoryError, match=rf"{saved.parent} does not hold the adapter .*damaged or changed"):
        compile_(parity_engine(learner), strategy="w", run_dir=tmp_path / "run")


@pytest.mark.parametrize(("phase", "status"), [("score p -> w", "skipped"), ("score the 2x2", "complete")])
def test_a_step_whose_scoring_was_cut_off_is_scored_by_the_next_call_and_not_run_again(
    engine: FakeEngine, tmp_path: Path, phase: str, status: str
) -> None:
    few: dict[str, Any] = {"trainset": TRAIN[:8], "valset": VAL[:6]}
    whole = compile_(engine, "p -> w", run_dir=tmp_path / "whole", **few)
    assert len(engine.trainings) == 1
    cut = compile_(engine, "p -> w", run_dir=tmp_path / "cut", callbacks=[CutOff(phase)], **few)
    assert rounds(cut)[-1] == ("p -> w", status)
    again = compile_(engine, "p -> w", run_dir=tmp_path / "cut", **few)
    assert len(engine.trainings) == 2
    assert comparable(again.report, tmp_path / "cut") == comparable(whole.report, tmp_path / "whole")
    assert again.report.rounds[2].ledger.metric_calls == whole.report.rounds[2].ledger.metric_calls
    assert not (tmp_path / "cut" / "unscored.json").exists()


def test_a_step_whose_scoring_was_cut_off_runs_again_with_other_options_or_when_its_file_is_damaged(
    engine: FakeEngine, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"trainset": TRAIN[:8], "valset": VAL[:6], "run_dir": tmp_path}
    compile_(engine, "w", callbacks=[CutOff("score w")], **few)
    few["optimizers"] = steps(w=LoRAFinetune(parity_match, num_samples=1, rescue=False))
    compile_(engine, "w", callbacks=[CutOff("score w")], **few)
    assert len(engine.trainings) == 2
    (tmp_path / "unscored.json").write_text("{")
    assert rounds(compile_(engine, "w", **few)) == [("", "complete"), ("w", "complete")]
    assert len(engine.trainings) == 3


def test_a_step_whose_scoring_was_cut_off_runs_again_where_its_program_is_gone(tmp_path: Path) -> None:
    few: dict[str, Any] = {"trainset": TRAIN[:8], "valset": VAL[:6], "run_dir": tmp_path}
    compile_(parity_engine(learner), "w", callbacks=[CutOff("score w")], **few)
    shutil.rmtree(tmp_path / "adapters")
    engine = parity_engine(learner)
    assert rounds(compile_(engine, "w", **few)) == [("", "complete"), ("w", "complete")]
    assert len(engine.trainings) == 1


class Service(Callback):
    """What an engine's answers need: away from when a phase begins."""

    def __init__(self, away_from: str) -> None:
        self.away_from, self.is_away = away_from, False

    def on_progress(self, event: Any) -> None:
        self.is_away = self.is_away or event["phase"] == self.away_from

    def engine(self) -> FakeEngine:
        def knows(request: FakeRequest, number: int) -> bool:
            if self.is_away:
                raise ConnectionError("away")
            return learner(request, number)

        return parity_engine(knows)


@pytest.mark.parametrize("away_from", ["score untouched student", "score x -> w"])
def test_rounds_in_which_every_example_raised_are_scored_again_by_the_next_call(tmp_path: Path, away_from: str) -> None:
    service = Service(away_from)
    engine, options = service.engine(), {"optimizers": steps(x=Step("Take care.")), "valset": VAL[:10]}
    whole = compile_(engine, "x -> w", run_dir=tmp_path / "whole", **options)
    first = compile_(engine, "x -> w", run_dir=tmp_path / "run", callbacks=[service], **options)
    assert first.flag_compilation_error_occurred
    service.is_away = False
    second = compile_(engine, "x -> w", run_dir=tmp_path / "run", **options)
    assert not second.flag_compilation_error_occurred
    again, at_once = comparable(second.report, tmp_path / "run"), comparable(whole.report, tmp_path / "whole")
    for record in (*again["rounds"], *at_once["rounds"]):
        del record["ledger"]
    assert again == at_once
    requests = len(engine.requests)
    third = compile_(engine, "x -> w", run_dir=tmp_path / "run", **options)
    assert (third.report.rounds, len(engine.requests)) == (second.report.rounds, requests)
    assert len(engine.trainings) == 2


def test_what_it_takes_to_score_a_round_again_is_noted_at_once(tmp_path: Path) -> None:
    noted: list[int] = []

    class Noted(Callback):
        def on_step_end(self, event: Any) -> None:
            noted.append(json.loads((tmp_path / "run.json").read_text())["spent"]["metric_calls"])

    service = Service("score x")
    options: dict[str, Any] = {"optimizers": {"x": Step("Take care.")}, "valset": VAL[:10], "run_dir": tmp_path}
    engine = service.engine()
    compile_(engine, "x", callbacks=[service], **options)
    service.is_away = False
    compile_(engine, "x", callbacks=[Noted()], **options)
    assert noted == [20, 30]


@pytest.mark.parametrize("again", ["away", "too many errors", "no budget"])
def test_a_round_that_can_not_be_scored_again_stays_as_it_was(tmp_path: Path, again: str) -> None:
    service = Service("score x")
    options: dict[str, Any] = {"optimizers": {"x": Step("Take care.")}, "valset": VAL[:10], "run_dir": tmp_path}
    engine = service.engine()
    first = compile_(engine, "x", callbacks=[service], **options)
    assert [record.failed for record in first.report.rounds] == [0, 10]
    lines = (tmp_path / "records.jsonl").read_bytes()
    service.is_away = again != "no budget"
    options |= {"max_errors": 9} if again == "too many errors" else {}
    options |= {"budget": Budget(metric_calls=10)} if again == "no budget" else {}
    assert compile_(engine, "x", **options).report == first.report
    assert (tmp_path / "records.jsonl").read_bytes() == lines


def test_a_round_scored_again_counts_where_the_budget_ends_its_2x2(tmp_path: Path) -> None:
    service = Service("score x -> w")
    options: dict[str, Any] = {"optimizers": steps(x=Step("Take care.")), "valset": VAL[:10], "run_dir": tmp_path}
    engine = service.engine()
    first = compile_(engine, "x -> w", callbacks=[service], **options)
    service.is_away = False
    used = json.loads((tmp_path / "run.json").read_text())["spent"]["metric_calls"]
    second = compile_(engine, "x -> w", budget=Budget(metric_calls=used + 12), **options)
    third = compile_(engine, "x -> w", **options)
    found = [(run.report.rounds[2].failed, run.report.rounds[2].two_by_two is None) for run in (first, second, third)]
    assert found == [(10, False), (0, True), (0, False)]
    assert "The run ended at 'x -> w': BudgetExceeded" in second.report.warnings[-1]
    assert second.report.rounds[2].score == third.report.rounds[2].score == 1.0


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    reports = [compile_(parity_engine(learner), "p", seed=seed, run_dir=tmp_path / str(seed)).report for seed in (0, 1)]
    assert reports[0].rounds[1].details != reports[1].rounds[1].details


def test_a_round_whose_demos_can_not_be_saved_is_scored_told_and_run_again_by_a_later_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    class Odd(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            calls.append(1)
            student.demos = [dspy.Example(number=object(), parity="odd")]
            return student

    engine = parity_engine(learner)
    options = {"optimizers": {"o": Odd(), "w": steps()["w"]}, "two_by_two": True}
    compiled = compile_(engine, "o -> w", run_dir=tmp_path / "run", **options)
    assert [record.status for record in compiled.report.rounds] == ["complete"] * 3
    assert compiled.report.rounds[1].program is None
    assert "Round 'o' can't be restored by a later call, nor its program saved" in caplog.text
    assert "field 'number' holds a builtins:object" in caplog.text
    compile_(engine, "o -> w", run_dir=tmp_path / "run", **options)
    assert len(calls) == 2


def test_the_users_own_steps_keep_what_they_did_and_are_no_other_call_for_it(tmp_path: Path) -> None:
    own = steps()
    for name in ("first", "second"):
        compiled = BetterTogether(parity_match, **own).compile(
            parity_program(parity_engine(learner)),
            trainset=TRAIN,
            valset=VAL,
            strategy="p -> w",
            run_dir=tmp_path / name,
            progress=False,
        )
        for step, record in zip(own.values(), compiled.report.rounds[1:], strict=True):
            assert step.last.details == record.details
    asked = [json.loads((tmp_path / name / "run.json").read_text())["run"] for name in ("first", "second")]
    assert asked[0] == asked[1]


def test_a_resumed_run_reads_an_adapter_once_for_all_rounds_and_predictors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = two_step_engine(learner)
    read: list[str] = []
    add_adapter = engine.add_adapter

    def noted(folder: Path) -> str:
        read.append(folder.name)
        return add_adapter(folder)

    monkeypatch.setattr(engine, "add_adapter", noted)

    def report() -> CompileReport:
        p = BootstrapFewShotRS(parity_match, num_candidates=1, num_samples=0, rescue=False, strengths=())
        w = LoRAFinetune(parity_match, num_samples=0, rescue=False)
        options: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "run_dir": tmp_path, "progress": False}
        compiled = BetterTogether(parity_match, p=p, w=w).compile(
            two_step_program(engine), strategy="w -> p", **options
        )
        return compiled.report

    first = report()
    adapters = [path.name for path in (tmp_path / "adapters").iterdir() if path.is_dir()]
    assert read == adapters
    again = report()
    assert again.rounds == first.rounds
    assert read == 2 * adapters
