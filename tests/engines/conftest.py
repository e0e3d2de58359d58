"""A tiny model and an engine for it. Tiny models are fastest on one thread: others only wait for one another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import save_model

from bettertogether.engines import TransformersEngine


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(folder: Path) -> Iterator[TransformersEngine]:
    made = TransformersEngine(folder)
    yield made
    made.close()
