"""Learning rate and length are chosen by model and rows, bounded, and the bounds are said."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_rows, tiny_model

from bettertogether.training import TrainingConfig
from bettertogether.training import length as length_module
from bettertogether.training import trainer as trainer_module
from bettertogether.training.auto import auto_epochs, auto_learning_rate, resolved
from bettertogether.training.held_out import HeldOutLosses
from bettertogether.training.length import RunLength, has_settled, since_low, told_held_out
from bettertogether.training.objective import RowObjective
from bettertogether.training.progress import TrainingProgress
from bettertogether.training.trainer import TrainingResult, train_adapter

ROWS = random_rows(20, shared=20)
HELD_OUT = random_rows(6, shared=20, seed=9)


@pytest.mark.parametrize(("hidden_size", "rate"), [(576, 1.32e-3), (2000, 5e-4), (4096, 2.86e-4)])
def test_the_learning_rate_falls_with_a_power_of_the_width(hidden_size: int, rate: float) -> None:
    assert auto_learning_rate(hidden_size) == pytest.approx(rate, rel=1e-2)


def test_pairs_take_a_third_of_the_rate_of_rows() -> None:
    assert [auto_learning_rate(width, pairs=True) for width in (576, 4096)] == pytest.approx([4.63e-4, 1e-4], rel=1e-2)
    assert resolved(TrainingConfig(), 4096, 64, pairs=True).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("rows", "epochs", "blind"),
    [(1, 40, 30), (40, 40, 6), (64, 25, 4), (200, 8, 2), (300, 6, 2), (7992, 2, 2), (7993, 1, 1), (100_000, 1, 1)],
)
def test_few_rows_are_seen_often_and_many_once(rows: int, epochs: int, blind: int) -> None:
    assert auto_epochs(rows, batch_size=8) == epochs
    assert auto_epochs(rows, batch_size=8, held_out=False) == blind


def test_numbers_stay_as_they_are() -> None:
    assert resolved(TrainingConfig.paper(), 576, 1000) == TrainingConfig.paper()
    paper = TrainingConfig.paper()
    assert (paper.learning_rate, paper.epochs) == (1e-5, 5)
    assert (paper.skeleton_weight, paper.balance_fields, paper.adam_beta2) == (1.0, False, 0.999)
    assert resolved(TrainingConfig(), 2000, 64) == TrainingConfig(learning_rate=5e-4, epochs=25)


def train(folder: Path, lines: list[TrainingProgress] | None = None, on_progress: Any = None, **options: Any) -> Any:
    training = TrainingConfig(**{"dtype": "float32", "batch_size": 8, **options})
    report = (lambda line: lines.append(line)) if lines is not None else on_progress
    result: TrainingResult = train_adapter(
        tiny_model(), ROWS, validation_rows=HELD_OUT, training=training, folder=folder, on_progress=report
    )
    return result


def losses(result: TrainingResult) -> list[float]:
    return told_held_out(result.history)[0][1:]


OVERFITTING: dict[str, Any] = {"learning_rate": 0.03, "scheduler": "constant", "warmup_ratio": 0.0}


@pytest.fixture
def short_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows are hardly learned by heart: a run ends 3 epochs after its best."""
    monkeypatch.setattr(length_module, "PLATEAU_STEPS", 9)


@pytest.mark.usefixtures("short_plateau")
def test_auto_stops_when_the_held_out_error_has_had_no_new_low_for_as_long_as_the_patience(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **OVERFITTING, epochs=40)
    result = train(tmp_path / "auto", **OVERFITTING, patience=2)
    trained = [line.loss for line in whole.history if line.loss is not None]
    by_epoch = [fmean(trained[start : start + 3]) for start in range(0, 120, 3)]
    told = told_held_out(whole.history)
    by_heart = [False, *(by_epoch[epoch - 1] < min(told[0][1 : epoch + 1]) / 4 for epoch in range(1, 41))]

    def settled(seen: list[float], end: int) -> bool:
        return has_settled(seen[: end + 1], by_heart[end], steps_per_epoch=3, patience=2)

    ends = next(end for end in range(41) if all(settled(seen, end) for seen in told))
    assert losses(result) == losses(whole)[:ends]
    assert 3 < ends < 40
    errors = told[1][1 : ends + 1]
    assert result.best_epoch == errors.index(min(errors)) + 1
    assert {line.total_steps for line in result.history} == {120}


@pytest.mark.parametrize(
    ("losses", "waited"),
    [
        ([1.0], 0),
        ([1.0, 3.0], 0),
        ([1.0, 0.5, 0.4, 0.41, 0.395], 2),
        ([1.0, 0.5, 0.495, 0.485], 0),
        ([1.0, 0.009, 0.006, 0.004, 0.001], 3),
        ([50.0, 1.0, 0.5], 1),
    ],
)
def test_a_loss_is_lower_when_it_fell_by_a_share_of_what_it_was_before(losses: list[float], waited: int) -> None:
    assert len(since_low(losses)) == waited


@pytest.mark.parametrize(
    ("losses", "settled"),
    [
        ([4.0, 2.0, 2.5], False),
        ([4.0, 2.0, 2.5, 2.5], True),
        ([4.0, 2.0, 2.0, 2.0], False),
        ([4.0, 2.0, 2.0, 2.0, 2.0], False),
        ([4.0, 2.0, *[2.0] * 9], False),
        ([4.0, 2.0, *[2.0] * 10], True),
        ([4.0, 2.0, *[2.0] * 9, 1.5], False),
        ([4.0, 2.0, 2.5, 2.0, 2.5], False),
        ([4.0, 2.0, 2.5, 2.0, 2.5, 2.5], True),
        ([4.0, 0.59, 0.59, 0.59], True),
        ([4.0, 0.61, 0.61, 0.61], False),
        ([4.0, 0.1, 0.1], False),
    ],
)
def test_a_loss_that_has_risen_or_has_little_left_to_fall_by_ends_a_run_sooner_than_one_that_stays(
    losses: list[float], settled: bool
) -> None:
    assert has_settled(losses, True, steps_per_epoch=6, patience=2) is settled


def test_a_rise_ends_a_run_only_where_rows_are_learned_by_heart() -> None:
    """Labels at chance, log(3), whose loss goes up and down before they are told apart."""
    losses = [4.2, 1.2, 1.3, 1.5, 1.4]
    assert has_settled(losses, True, steps_per_epoch=5, patience=3)
    assert not has_settled(losses, False, steps_per_epoch=5, patience=3)
    assert has_settled([*losses, *[1.3] * 9], False, steps_per_epoch=5, patience=3)


def test_a_run_goes_on_while_the_error_falls_though_the_loss_rises_and_while_no_row_is_learned_by_heart() -> None:
    def after(*held_out: tuple[float, float], trained: float = 0.4) -> bool:
        history = [line(0, None, 4.0, 0.8)]
        for step, (loss, error) in enumerate(held_out, 1):
            history += [line(step, trained if step > 1 else 9.0, None, None), line(step, None, loss, error)]
        return RunLength(TrainingConfig(), 20, 8, held_out=True).lost_patience(history)

    def line(step: int, loss: float | None, held_out: float | None, error: float | None) -> TrainingProgress:
        done: dict[str, Any] = {
            "step": step,
            "total_steps": 20,
            "epoch": float(step),
            "tokens": 0,
            "learning_rate": 1e-3,
        }
        return TrainingProgress(**done, loss=loss, validation_loss=held_out, validation_error=error)

    assert not after((2.0, 0.4), (2.1, 0.3), (2.2, 0.2), (2.3, 0.1))
    assert not after((2.0, 0.4), (1.9, 0.5), (1.8, 0.5), (1.7, 0.5))
    risen = ((2.0, 0.4), (2.1, 0.5), (2.2, 0.5), (2.3, 0.5))
    assert after(*risen)
    assert not after(*risen, trained=0.6)


def test_a_number_of_epochs_is_run_whatever_the_held_out_loss_says(tmp_path: Path) -> None:
    assert len(losses(train(tmp_path, **OVERFITTING, epochs=7, patience=1))) == 7


def test_without_keep_best_auto_runs_to_its_bound(tmp_path: Path) -> None:
    result = train(tmp_path, **OVERFITTING, patience=1, keep_best=False)
    assert (len(losses(result)), result.best_epoch) == (40, 40)


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("short_plateau")
def test_a_killed_auto_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    def kill(line: TrainingProgress) -> None:
        if line.step == expected.history[-1].step and line.loss is not None:
            raise Killed

    expected = train(tmp_path / "whole", **OVERFITTING, patience=2)
    with pytest.raises(Killed):
        train(tmp_path / "killed", on_progress=kill, **OVERFITTING, patience=2)
    result = train(tmp_path / "killed", **OVERFITTING, patience=2)
    assert (result.history, result.best_epoch) == (expected.history, expected.best_epoch)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in which nothing takes any but what a test adds."""
    now = [0.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.mark.parametrize(("minutes", "steps"), [(8.9, 6), (9.0, 9), (6.0, 6), (4.0, 3), (3.0, 3), (2.0, 3), (1.5, 2)])
def test_max_minutes_ends_the_run_before_the_epoch_that_would_pass_them(
    tmp_path: Path, clock: list[float], minutes: float, steps: int
) -> None:
    def a_minute(line: TrainingProgress) -> None:
        clock[0] += 60 * (line.loss is not None)

    result = train(tmp_path, on_progress=a_minute, learning_rate=1e-3, epochs=3, max_minutes=minutes)
    assert result.history[-1].step == steps
    assert result.history[-1].validation_loss is not None
    assert result.out_of_time == (steps < 9)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_bounds_are_said_before_and_the_time_after_the_first_steps(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(line: TrainingProgress) -> None:
        messages.setdefault(line.step, [record.getMessage() for record in caplog.records])
        clock[0] += 30 * (line.loss is not None)

    def held_out(self: RowObjective, rows: Any) -> HeldOutLosses:
        clock[0] += 20
        return HeldOutLosses(1.0, 1.0)

    monkeypatch.setattr(RowObjective, "held_out", held_out)
    messages: dict[int, list[str]] = {}
    with caplog.at_level(logging.INFO, "bettertogether"):
        train(tmp_path, on_progress=report, learning_rate=1e-3, max_minutes=80)
    patience = "ends 3 epochs or more after the best on the rows held out"
    assert messages[0] == [f"Training on 20 rows: at most 40 epochs, 120 steps, 80 minutes; {patience}."]
    minutes = (120 * 30 + 41 * 20) / 60
    assert messages[5][1:] == [f"The training takes about {minutes:.1f} minutes at most (30.00 s a step)."]


@pytest.mark.usefixtures("short_plateau")
def test_why_a_run_ended_early_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bettertogether"):
        result = train(tmp_path / "patience", **OVERFITTING, patience=1)
        assert not result.out_of_time
        train(tmp_path / "minutes", **OVERFITTING, max_minutes=1e-9)
    ends = [record.getMessage() for record in caplog.records if "ends after" in record.getMessage()]
    step = result.history[-1].step
    last_fall = len(losses(result)) - min(len(since_low(seen)) for seen in told_held_out(result.history))
    reason = f"nothing better on the rows held out since epoch {last_fall}"
    assert f"Training ends after {step} of 120 steps: {reason}." in ends
    assert "Training ends after 1 of 120 steps: max_minutes=1e-09 are over, within the first epoch." in ends
