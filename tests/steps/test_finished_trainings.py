"""A step that trains several adapters and is killed trains only those that were not done."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fakes import numbers, parity_match, two_step_engine, two_step_program

from bettertogether import LoRAFinetune
from bettertogether.engines.protocol import FinetuneResult
from bettertogether.steps.step import StepContext, StepResult
from bettertogether.testing import FakeEngine


class Killed(BaseException):
    pass


class KillsTraining(FakeEngine):
    """Dies in its training of this number, once."""

    dies_in = 2

    def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
        if len(self.trainings) + 1 == self.dies_in:
            self.dies_in = 0
            raise Killed
        return super().finetune(*args, **options)


def killing_engine() -> KillsTraining:
    return KillsTraining(two_step_engine(lambda *_: True).answer)


def train(engine: FakeEngine, folder: Path, **options: Any) -> StepResult:
    off: dict[str, Any] = {"num_samples": 0, "rescue": False, "balance": False, "multitask": False}
    step = LoRAFinetune(parity_match, **(off | options))
    return step.run(two_step_program(engine), StepContext(numbers(30), folder=folder))


def models(result: StepResult) -> list[str]:
    return [predictor.lm.model for predictor in result.program.predictors()]


def test_after_a_kill_only_the_adapters_that_were_not_done_are_trained(tmp_path: Path) -> None:
    whole = train(two_step_engine(lambda *_: True), tmp_path / "whole")
    engine, folder = killing_engine(), tmp_path / "killed"
    with pytest.raises(Killed):
        train(engine, folder)
    (done,) = engine.trainings
    assert len(list(folder.glob("trainings-*/*.json"))) == 1
    again = FakeEngine(engine.answer)
    result = train(again, folder)
    (other,) = again.trainings
    assert {row.completion.split(" ## ]]")[0] for row in done} == {"[[ ## remark"}
    assert {row.completion.split(" ## ]]")[0] for row in other} == {"[[ ## parity"}
    assert models(result) == models(whole)
    assert result.ledger.trained_tokens == whole.ledger.trained_tokens
    assert [line.adapter for line in result.details.history] == models(whole)  # type: ignore[union-attr]
    assert result.step_gain == whole.step_gain == 1.0
    assert not list(folder.glob("*trainings-*"))


def test_a_folder_that_was_moved_after_the_kill_still_holds_them(tmp_path: Path) -> None:
    engine = killing_engine()
    with pytest.raises(Killed):
        train(engine, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    again = FakeEngine(engine.answer)
    result = train(again, tmp_path / "after")
    assert len(again.trainings) == 1
    assert {Path(each.folder).parent for each in result.details.adapters.values()} == {tmp_path / "after"}  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"seed": 7}, {"start_from": "base", "validation_share": 0.4}])
def test_a_step_that_asks_for_another_training_does_it(tmp_path: Path, options: dict[str, Any]) -> None:
    engine = killing_engine()
    with pytest.raises(Killed):
        train(engine, tmp_path)
    again = FakeEngine(engine.answer)
    train(again, tmp_path, **options)
    assert len(again.trainings) == 2


@pytest.mark.parametrize("damage", ["result", "adapter"])
def test_what_is_damaged_is_trained_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = killing_engine()
    with pytest.raises(Killed):
        train(engine, tmp_path)
    (saved,) = tmp_path.glob("trainings-*/*.json")
    if damage == "result":
        saved.write_text('{"model": 1}')
    else:
        saved.write_text(saved.read_text().replace("local/fake@r1-", "local/fake@r1-0"))
    again = FakeEngine(engine.answer)
    with caplog.at_level(logging.WARNING, "bettertogether"):
        train(again, tmp_path)
    assert len(again.trainings) == 2
    assert "is trained again" in caplog.text
