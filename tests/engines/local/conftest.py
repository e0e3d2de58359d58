"""A scheduler over a decoder without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_decoder import EOS, FakeDecoder, OutOfMemory

from bettertogether.engines.local.scheduler import Scheduler


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def scheduler(decoder: FakeDecoder) -> Iterator[Scheduler]:
    made = Scheduler(
        lambda: decoder,
        eos_ids=frozenset({EOS}),
        max_batch_size=8,
        out_of_memory=lambda error: isinstance(error, OutOfMemory),
        check_adapter=lambda name: None,
    )
    yield made
    decoder.gate.set()
    made.close()
