"""Models are built one at a time, and what is computed meanwhile does not depend on torch's default dtype."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import PACKED, bfloat16_by_default, save_model
from tiny import random_rows, tiny_model

from bettertogether.engines import merging
from bettertogether.engines.loading import load_model, meta_model, read_card
from bettertogether.training import LoRAConfig
from bettertogether.training.adapter import training_adapter
from bettertogether.training.building import building
from bettertogether.training.checkpoint import TrainingState, restore_optimizer
from bettertogether.training.weighting import TokenWeights


def loaded(folder: Path) -> Any:
    return load_model(read_card(folder), torch.device("cpu"), torch.float32)


def merged(folder: Path) -> Any:
    return merging._load(str(folder))[0]


def described(folder: Path) -> Any:
    return meta_model(PACKED["llama"], torch.float32)


def adapted(folder: Path) -> Any:
    model = tiny_model()
    with training_adapter(model, LoRAConfig(rank=2), 0):
        return model


@pytest.mark.parametrize("build", [loaded, merged, described, adapted])
def test_a_model_is_built_when_the_one_of_another_thread_is_done(build: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    with ThreadPoolExecutor(1) as pool:
        with building(), bfloat16_by_default():
            model = pool.submit(build, folder)
            assert not wait([model], timeout=0.3).done
        assert model.result(timeout=60).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_model_may_be_built_while_the_same_thread_builds_one() -> None:
    with building(), building():
        assert described(Path()).dtype == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_builds_models_though_one_was_being_built_by_a_thread_that_it_does_not_have() -> None:
    begun, ended = threading.Event(), threading.Event()

    def build() -> None:
        with building(), bfloat16_by_default():
            begun.set()
            assert ended.wait(60)

    def tell() -> None:
        by_default = torch.get_default_dtype()
        queue.put((str(by_default), str(described(Path()).dtype)))

    forks = multiprocessing.get_context("fork")
    queue = forks.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        builder = pool.submit(build)
        assert begun.wait(60)
        fork = forks.Process(target=tell, daemon=True)
        fork.start()
        fork.join(60)
        ended.set()
        builder.result()
    assert fork.exitcode == 0
    assert queue.get() == ("torch.float32", "torch.float32")


def test_tokens_weigh_what_they_do_whatever_the_default_dtype() -> None:
    (row,) = random_rows(1, shared=3)
    row = replace(row, forced=[place % 2 == 1 for place in range(len(row.completion_ids))])
    weights = TokenWeights.of([row], 0.3, False)
    expected_N, _ = weights.of_tokens([row])
    with bfloat16_by_default():
        weights_N, _ = weights.of_tokens([row])
    assert torch.equal(weights_N, expected_N)


def test_a_training_goes_on_at_its_own_step_whatever_the_default_dtype() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    moments = {"a": torch.zeros(2)}
    with bfloat16_by_default():
        state = TrainingState(step=257, first_moments=moments, second_moments=moments)
        restore_optimizer(optimizer, {"a": parameter}, state)
    assert optimizer.state[parameter]["step"].item() == 257
