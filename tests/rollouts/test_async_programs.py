"""Async programs, and what `dspy.syncify` makes of them, share one event loop and never wait for good."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, plain_lm, right

from bettertogether.rollouts.rollout import Rollout
from bettertogether.rollouts.runner import Runner


class Bounded(dspy.Module):
    """Asks twice within a semaphore."""

    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity)
        self.gate = asyncio.Semaphore(2)

    async def aforward(self, number: int) -> dspy.Prediction:
        async with self.gate:
            await self.p.acall(number=number + 1)
            await asyncio.sleep(0.002)
            return await self.p.acall(number=number)


class Holder(dspy.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.part = dspy.syncify(Bounded(), in_place=in_place)
        self.own_gate = asyncio.Semaphore(3)


class SyncHolder(Holder):
    def forward(self, number: int) -> dspy.Prediction:
        return self.part(number=number)


class AsyncHolder(Holder):
    async def aforward(self, number: int) -> dspy.Prediction:
        async with self.own_gate:
            await asyncio.sleep(0.001)
            return self.part(number=number)


def runs_within(seconds: float, program: dspy.Module, count: int) -> list[Rollout]:
    """Runs of a program in six threads; none of them may last longer."""
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    runner = Runner(program)
    runs: list[Rollout] = []

    def work() -> None:
        with ThreadPoolExecutor(6) as pool:
            runs.extend(pool.map(runner.run, numbers(count)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    return runs


MADE: dict[str, Any] = {
    "async": Bounded,
    "syncified": lambda: dspy.syncify(Bounded()),
    "wrapped": lambda: dspy.syncify(Bounded(), in_place=False),
    "a syncified part": lambda: SyncHolder(in_place=True),
    "a wrapped part": lambda: SyncHolder(in_place=False),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_runs_of_an_async_program_share_its_semaphore_and_keep_the_order_of_its_calls(made: Any) -> None:
    runs = runs_within(20, made(), 12)
    assert [run.prediction.parity for run in runs] == [right(n) for n in range(12)]
    assert [[call.inputs["number"] for call in run.calls] for run in runs] == [[n + 1, n] for n in range(12)]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_syncified_part_of_an_async_program_goes_on_where_dspy_lets_it(in_place: bool) -> None:
    pytest.importorskip("nest_asyncio")
    runs = runs_within(20, AsyncHolder(in_place), 12)
    assert [run.prediction.parity for run in runs] == [right(n) for n in range(12)]
