"""A tiny model and an engine for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_models import save_model

from bettertogether.engines import TransformersEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(folder: Path) -> Iterator[TransformersEngine]:
    made = TransformersEngine(folder)
    yield made
    made.close()
