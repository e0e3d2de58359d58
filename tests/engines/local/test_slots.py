"""Keys and values of rows under way take the memory that is written to, not that of the longest answer allowed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bettertogether.engines.local.slots import Slots

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def write(slots: Slots, place: int, value: float, rows: int, dtype: torch.dtype) -> None:
    written = torch.full((2, rows, 64), value, dtype=dtype)
    slots.write(0, torch.arange(rows), torch.full((rows,), place), written, -written)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_answers_that_end_early_never_take_the_memory_of_long_ones() -> None:
    slots = Slots()
    slots.reserve(32, 4096)
    before = resident_bytes()
    write(slots, 0, 1.0, 32, torch.float32)
    assert slots.keys[0].nbytes + slots.values[0].nbytes == 128 * MIB
    assert resident_bytes() - before < 16 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_stays_where_room_grows_and_the_rest_is_zero(dtype: torch.dtype) -> None:
    slots = Slots()
    slots.reserve(2, 64)
    write(slots, 3, 1.5, 2, dtype)
    slots.reserve(4, 128)
    for stores, value in ((slots.keys, 1.5), (slots.values, -1.5)):
        assert (stores[0].shape, stores[0].dtype) == ((4, 2, 128, 64), dtype)
        assert torch.all(stores[0][:2, :, 3] == value)
        assert stores[0].count_nonzero() == 2 * 2 * 64
