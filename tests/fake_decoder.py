"""A decoder without a model and requests for it, for the tests of the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from bettertogether.engines.answers import FinishedAnswer, SamplingOptions, TokenScore
from bettertogether.engines.local.decoder import BatchRow, Decision
from bettertogether.engines.local.job import Job
from bettertogether.engines.local.scheduler import Scheduler
from bettertogether.engines.local.text_stream import TextStream

EOS = 0


class OutOfMemory(Exception):
    """What the fake decoder raises when its batch is too large."""


class FakeDecoder:
    """Answers a prompt [n, ...] with the tokens n, n - 1, ..., 1 and then the end. One token a step."""

    def __init__(self) -> None:
        self.held: set[BatchRow] = set()
        self.batches: list[int] = []
        self.resets = 0
        self.largest = 1_000_000
        self.fails: Callable[[Sequence[BatchRow]], BaseException | None] = lambda rows: None
        self.gate = threading.Event()
        self.gate.set()

    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        self.held |= set(rows)
        return list(rows)

    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        self.gate.wait()
        assert set(rows) == self.held
        if len(rows) > self.largest:
            raise OutOfMemory
        if error := self.fails(rows):
            raise error
        self.batches.append(len(rows))
        scores = [row.prompt_ids[0] - len(row.output_ids) for row in rows]
        return [Decision((token,), (TokenScore(token, -1.0),)) for token in scores]

    def release(self, row: BatchRow) -> None:
        self.held.discard(row)
        row.computed = 0

    def reset(self) -> None:
        self.held.clear()
        self.resets += 1

    def counters(self) -> dict[str, int]:
        return {"forward_passes": len(self.batches), "prefix_tokens_reused": 0}


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in token_ids)


def job(count: int, limit: int = 100, **options: Any) -> Job:
    row = BatchRow([count], limit, sampling=SamplingOptions(**options))
    return Job(row, TextStream(decode, row.sampling.stop))


def run(scheduler: Scheduler, *jobs: Job) -> list[FinishedAnswer]:
    for one in jobs:
        scheduler.submit(one)
    return [one.future.result(timeout=10) for one in jobs]
