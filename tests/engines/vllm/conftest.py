"""Engines over the stand-in for the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_vllm import FAKE

from bettertogether.engines import VLLMEngine


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine.shared(folder, command=FAKE)
    yield engine
    engine.close()


@pytest.fixture
def alone(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(folder, command=FAKE)
    yield engine
    engine.close()
