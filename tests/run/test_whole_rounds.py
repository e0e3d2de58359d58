"""A round that is trained and scored stays, whatever comes after it: its 2x2, a callback, a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import learner, number_of, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.engines import TrainingProgress
from bettertogether.errors import RunDirectoryError
from bettertogether.files import append_line
from bettertogether.records import Ledger
from bettertogether.run.budget import BudgetMeter, BudgetWatch
from bettertogether.testing import FakeEngine

TRAIN, VAL = numbers(24, start=40), numbers(20)


def compile_(metric: Any = parity_match, *, engine: FakeEngine | None = None, **options: Any) -> dspy.Module:
    p = BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False)
    w = LoRAFinetune(parity_match, num_samples=0, rescue=False)
    arguments: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "strategy": "p -> w", "progress": False}
    student = parity_program(engine or parity_engine(learner))
    return BetterTogether(metric, p=p, w=w).compile(student, **(arguments | options))


def statuses(compiled: dspy.Module) -> list[tuple[str, str, Any]]:
    return [(record.strategy, record.status, record.score) for record in compiled.report.rounds]


class At2x2(Callback):
    """Does something when the 2x2 is under way."""

    def __init__(self, raises: BaseException) -> None:
        self.raises = raises

    def on_progress(self, event: Any) -> None:
        if event["phase"] == "score the 2x2" and event["done"] == 3:
            raise self.raises


def test_a_budget_that_ends_within_the_2x2_keeps_the_round(tmp_path: Path) -> None:
    whole = compile_()
    calls = sum(record.ledger.metric_calls for record in whole.report.rounds)
    compiled = compile_(budget=Budget(metric_calls=calls - 60), run_dir=tmp_path)
    assert statuses(compiled) == statuses(whole)
    assert compiled.report.rounds[2].two_by_two is None
    assert whole.report.rounds[2].two_by_two is not None
    assert compiled.report.selected == whole.report.selected == 2
    assert "The run ended at 'p -> w'" in str(compiled.report.warnings)
    engine = parity_engine(learner)
    again = compile_(engine=engine, run_dir=tmp_path)
    assert statuses(again) == statuses(whole)
    assert again.report.rounds[2].two_by_two == whole.report.rounds[2].two_by_two
    assert engine.trainings == []


def test_an_interrupt_within_the_2x2_keeps_the_round() -> None:
    compiled = compile_(callbacks=[At2x2(KeyboardInterrupt())])
    assert [status for _, status, _ in statuses(compiled)] == ["complete"] * 3
    assert compiled.report.selected == 2


def test_errors_in_a_cell_of_the_2x2_are_a_warning() -> None:
    class Broken(FakeEngine):
        """The tuned model answers prompts without demos by an error."""

    def answer(request: Any) -> Any:
        if request.trained_on and len(request.messages) < 4:
            raise RuntimeError("broken")
        return sound(request)

    sound = parity_engine(learner).answer
    compiled = compile_(engine=Broken(answer), max_errors=5)
    assert [status for _, status, _ in statuses(compiled)] == ["complete"] * 3
    assert compiled.report.rounds[2].two_by_two is None
    assert "The 2x2 was not measured: " in compiled.report.rounds[2].score_warnings[-1]
    assert not compiled.flag_compilation_error_occurred


def test_a_round_that_a_full_disk_keeps_no_record_of_counts_with_the_flag_and_is_recorded_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, line: bytes) -> None:
        if b'"strategy": "w"' in line:
            raise RunDirectoryError(f"{path} can't be written")
        append_line(path, line)

    engine = parity_engine(learner)
    with monkeypatch.context() as filling:
        filling.setattr("bettertogether.run.directory.append_line", full)
        first = compile_(engine=engine, strategy="w -> p", run_dir=tmp_path)
    assert statuses(first) == [("", "complete", 0.35), ("w", "complete", 1.0)]
    assert (first.report.selected, first.flag_compilation_error_occurred) == (1, True)
    assert "The run ended at 'w': RunDirectoryError" in first.report.warnings[-1]
    again = compile_(engine=engine, strategy="w -> p", run_dir=tmp_path)
    assert statuses(again) == [*statuses(first), ("w -> p", "complete", 1.0)]
    assert (len(engine.trainings), again.flag_compilation_error_occurred) == (1, False)


def test_a_callback_that_raises_after_a_round_makes_no_second_record_of_it(tmp_path: Path) -> None:
    class Raises(Callback):
        def on_step_end(self, event: Any) -> None:
            if event["record"].strategy == "p":
                raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        compile_(callbacks=[Raises()], run_dir=tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [(line["strategy"], line["status"]) for line in map(json.loads, lines)] == [
        ("", "complete"),
        ("p", "complete"),
    ]


def test_of_a_training_that_goes_on_the_tokens_of_this_sitting_are_charged() -> None:
    watch = BudgetWatch(BudgetMeter(Budget()))
    for adapter, first in (("adapter 1/2", 2), ("adapter 2/2", 1)):
        for step in range(first, 4):
            done: dict[str, Any] = {"step": step, "total_steps": 3, "epoch": 1.0, "loss": 1.0, "learning_rate": 1e-3}
            line = TrainingProgress(**done, validation_loss=None, tokens=1000 * step, new_tokens=1000)
            watch.on_training({"adapter": adapter, "progress": line})
    assert watch.spent.trained_tokens == 5000


def test_a_run_that_failed_before_its_metric_was_called_counts_as_a_call_in_the_budget_alone() -> None:
    meter = BudgetMeter(Budget())
    watch = BudgetWatch(meter)
    for done, calls in ((0, 0), (1, 0), (2, 1)):
        watch.on_progress({"phase": "run", "done": done, "total": 2, "ledger": Ledger(lm_calls=1, metric_calls=calls)})
    assert (meter.used.metric_calls, meter.used.lm_calls) == (2, 2)
    assert (watch.spent.metric_calls, watch.spent.lm_calls) == (1, 2)


def test_a_step_that_was_cut_off_has_the_calls_that_were_made_and_the_next_call_no_more_budget(tmp_path: Path) -> None:
    asked = list[int]()

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        asked.append(example.number)
        return parity_match(example, prediction)

    engine = parity_engine(learner)
    sound = engine.answer
    engine.answer = lambda request: "unreadable" if number_of(request) % 2 else sound(request)
    arguments: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "strategy": "p", "progress": False}
    for _ in range(2):
        cut = BetterTogether(metric, p=BootstrapFewShotRS(metric)).compile(
            parity_program(engine), budget=Budget(metric_calls=30), run_dir=tmp_path, **arguments
        )
        assert [record.status for record in cut.report.rounds] == ["complete", "skipped"]
        assert cut.report.rounds[0].ledger.metric_calls == 10
        spent = json.loads((tmp_path / "run.json").read_text())["spent"]
        assert spent["metric_calls"] == spent["program_calls"] >= 30
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["ledger"]["metric_calls"] for record in records] == [10, len(asked) - 10, 0]


def test_where_the_same_call_would_fail_again_it_is_not_told_to_go_on(tmp_path: Path) -> None:
    def broken(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        if trace is not None:
            raise ValueError("broken")
        return parity_match(example, prediction)

    w = LoRAFinetune(broken, num_samples=0, rescue=False, threshold=1.0)
    arguments: dict[str, Any] = {"trainset": numbers(4, start=40), "valset": VAL, "strategy": "w", "progress": False}
    away = f"The same call with run_dir={str(tmp_path)!r} goes on once the cause has passed (a service that was away)"
    for limit, told in (
        (20, f"The same call would fail again: one with run_dir={str(tmp_path)!r} and other options of 'w' goes on; "),
        (1, f"{away}, and so does one with a higher max_errors; "),
    ):
        compiled = BetterTogether(parity_match, w=w).compile(
            parity_program(parity_engine(learner)), run_dir=tmp_path, max_errors=limit, **arguments
        )
        (ended,) = [warning for warning in compiled.report.warnings if warning.startswith("The run ended at 'w': ")]
        assert ended.endswith(f"{told}a mended program or metric, other examples or another teacher need another one.")
