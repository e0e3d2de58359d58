"""Checkpoints of trainings that were cut off stay in a run directory until the round that they are of is done."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import dspy
import pytest
from directory_files import RUN, record
from fakes import learner, parity_engine, parity_match, parity_program, two_step_engine, two_step_program
from parity_run import TRAIN, compile_, steps

from bettertogether import BetterTogether, LoRAFinetune, TrainingConfig
from bettertogether.engines.protocol import FinetuneResult
from bettertogether.run.directory import RunDirectory
from bettertogether.testing import FakeEngine
from bettertogether.working_folders import working_folder, working_folders


class GoesOn(FakeEngine):
    """Trains in a folder, and notes whether it found a checkpoint there."""

    found: list[bool]

    def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
        with working_folder(options["folder"], "training-1") as work:
            self.found.append((work / "state.json").exists())
            (work / "state.json").touch()
        return super().finetune(*args, **options)


def test_what_a_training_gave_that_was_cut_off_after_its_end_is_still_there_for_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(engine: FakeEngine, program: dspy.Module, run_dir: str) -> None:
        w = LoRAFinetune(parity_match, num_samples=0, rescue=False, multitask=False)
        optimizer = BetterTogether(parity_match, w=w)
        optimizer.compile(program, trainset=TRAIN, strategy="w", run_dir=tmp_path / run_dir, progress=False)

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    one, several = GoesOn(parity_engine(learner).answer), two_step_engine(lambda *_: True)
    one.found = []
    with monkeypatch.context() as cutting:
        cutting.setattr(RunDirectory, "set_aside", cut_off)
        call(one, parity_program(one), "one")
        call(several, two_step_program(several), "several")
    call(one, parity_program(one), "one")
    call(several, two_step_program(several), "several")
    assert one.found == [False, True]
    assert len(several.trainings) == 2
    assert working_folders(tmp_path / "one" / "adapters") == working_folders(tmp_path / "several" / "adapters") == []


class KeepsCheckpoints(FakeEngine):
    """Trains in a folder named by the learning rate, and is interrupted at the lowest ones."""

    def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
        rate = options["training"].learning_rate
        with working_folder(options["folder"], f"training-{rate}"):
            if rate < 1:
                raise KeyboardInterrupt
        return super().finetune(*args, **options)


def test_checkpoints_stay_until_their_round_is_done_whatever_strategy_and_options_it_had(tmp_path: Path) -> None:
    engine = KeepsCheckpoints(parity_engine(learner).answer)

    def call(strategy: Any, rate: float) -> list[str]:
        w = LoRAFinetune(parity_match, num_samples=0, training=TrainingConfig(learning_rate=rate))
        compile_(engine, strategy, optimizers=steps(w=w), run_dir=tmp_path)
        return working_folders(tmp_path / "adapters")

    assert call("p -> w", 0.1) == ["training-0.1"]
    assert call("w", 0.2) == ["training-0.1", "training-0.2"]
    assert call("w", 0.3) == ["training-0.1", "training-0.2", "training-0.3"]
    assert call(["w", "p"], 1.0) == ["training-0.1"]
    assert call("p -> w", 1.0) == []


def test_what_cut_off_trainings_of_a_round_left_goes_when_the_round_is_there_and_that_of_others_stays(
    tmp_path: Path,
) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        for strategy, name in [("w", "training-1"), ("p -> w", "training-2"), ("w", "policy-3")]:
            directory.begin(strategy)
            leave_checkpoint(directory.adapters / name)
        directory.append(record(1, strategy="w", status="skipped"))
    with RunDirectory.open(tmp_path, RUN) as directory:
        assert working_folders(directory.adapters) == ["policy-3", "training-1", "training-2"]
        directory.begin("w")
        directory.append(record(2, strategy="w"))
        assert sorted(path.name for path in directory.adapters.iterdir()) == [".training-2.lock", "training-2"]
        with working_folder(directory.adapters, "training-2"):
            directory.append(record(3, strategy="p -> w"))
            assert (directory.adapters / "training-2" / "state.json").exists()
        leave_checkpoint(directory.adapters / "training-2")
        directory.append(record(4, strategy="p -> w"))
        assert list(directory.adapters.iterdir()) == []


def test_checkpoints_of_before_it_was_noted_what_round_they_are_of_stay(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, RUN) as directory:
        leave_checkpoint(directory.adapters / "training-1")
        directory.begin("w")
        directory.append(record(1, strategy="w"))
        assert working_folders(directory.adapters) == ["training-1"]


def leave_checkpoint(folder: Path) -> None:
    """As a training does that is interrupted."""
    with contextlib.suppress(KeyboardInterrupt), working_folder(folder.parent, folder.name) as work:
        (work / "state.json").touch()
        raise KeyboardInterrupt
