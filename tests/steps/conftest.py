"""A model for programs that learn from rewards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dspy
import pytest
from small_models import PACKED, byte_tokenizer, random_model

from bettertogether.engines import TransformersEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not sure of its letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_model(PACKED["llama"], std=0.05).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[TransformersEngine]:
    made = TransformersEngine(folder)
    with dspy.context(adapter=dspy.JSONAdapter()):
        yield made
    made.close()
