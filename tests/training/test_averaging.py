"""The weights that are kept are the running mean of the last ones, and a killed run goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_rows, tiny_model

from bettertogether.training import TrainingConfig
from bettertogether.training.averaging import RunningMean
from bettertogether.training.trainer import TrainingResult, train_adapter

ROWS = random_rows(12, shared=20)
HELD_OUT = random_rows(6, shared=20, seed=9)


def means(values: list[float]) -> list[float]:
    weight = torch.zeros(1)
    mean, seen = RunningMean({"w": weight}, {}), []
    for step, value in enumerate(values, 1):
        weight.fill_(value)
        mean.update(step)
        seen.append(float(mean.state()["w"]))
    return seen


def test_the_first_mean_is_the_first_weights() -> None:
    assert means([3.0]) == [3.0]


def test_the_mean_is_over_weights_of_a_ninth_of_the_steps() -> None:
    """Of weights that are their step's number, the mean is that of the last step less the mean age."""
    for steps in (90, 900):
        assert steps - means([float(step) for step in range(1, steps + 1)])[-1] == pytest.approx(steps / 9, abs=0.6)


def test_the_mean_of_two_values_by_hand() -> None:
    assert means([1.0, 0.0])[-1] == pytest.approx((1 / 2) ** 8)
    assert means([0.0, 0.0, 1.0])[-1] == pytest.approx(1 - (2 / 3) ** 8)


def test_in_place_the_model_has_the_mean_and_afterwards_its_own_weights_again() -> None:
    weight = torch.tensor([1.0])
    mean = RunningMean({"w": weight}, {"w": torch.tensor([5.0])})
    with mean.in_place():
        assert weight.tolist() == [5.0]
    assert weight.tolist() == [1.0]
    assert mean.state()["w"].tolist() == [5.0]


def train(folder: Path, scheduler: Any = "averaged", on_progress: Any = None, **options: Any) -> TrainingResult:
    training = TrainingConfig(
        learning_rate=0.01, epochs=3, batch_size=4, dtype="float32", scheduler=scheduler, **options
    )
    return train_adapter(
        tiny_model(), ROWS, validation_rows=HELD_OUT, training=training, folder=folder, on_progress=on_progress
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_training_steps_are_those_at_a_constant_rate_and_the_kept_weights_are_their_mean(tmp_path: Path) -> None:
    constant = train(tmp_path / "constant", "constant", keep_best=False)
    averaged = train(tmp_path / "averaged", keep_best=False)
    steps = [[(line.step, line.loss) for line in run.history if line.loss is not None] for run in (constant, averaged)]
    assert steps[0] == steps[1]
    last, mean = weights(tmp_path / "constant"), weights(tmp_path / "averaged")
    assert any(not torch.equal(last[key], mean[key]) for key in last)
    assert averaged.validation_loss != constant.validation_loss


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_with_the_same_mean(tmp_path: Path) -> None:
    def kill(line: Any) -> None:
        if line.step == 8:
            raise Killed

    expected = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", on_progress=kill)
    result = train(tmp_path / "killed")
    assert result.history == expected.history
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
