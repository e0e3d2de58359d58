"""A process that is a fork: it can't ask through the engine that it came with, and leaves its parent's in peace."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running_vllm import FAKE
from vllm_requests import request, train

from bettertogether import vllm_lm
from bettertogether.engines import VLLMEngine
from bettertogether.training.config import TrainingConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")


def in_a_fork(*works: Callable[[], Any]) -> list[Any]:
    """What each of these returns, or raises, as text, in one child of this process."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run() -> None:
        for work in works:
            try:
                queue.put(work())
            except Exception as error:
                queue.put(f"{type(error).__name__}: {error}")

    child = context.Process(target=run)
    child.start()
    try:
        return [queue.get(timeout=60) for _ in works]
    finally:
        child.kill()
        child.join()


@contextmanager
def held_by_another_thread(lock: Any) -> Iterator[None]:
    """Taken for good in a fork, as a thread that would give it back does not come along."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.acquire).result()
        try:
            yield
        finally:
            pool.submit(lock.release).result()


def test_a_fork_is_told_to_make_an_engine_of_its_own_whatever_it_asks(served: VLLMEngine, tmp_path: Path) -> None:
    asked = request(served)
    served.complete(asked)
    asyncio.run(served.complete_async(asked))
    with held_by_another_thread(served.server._lock):
        refused = in_a_fork(
            lambda: served.complete(asked),
            lambda: asyncio.run(served.complete_async(asked)),
            lambda: next(served.stream(asked)),
            lambda: train(served, tmp_path),
            lambda: served.trained_model(TrainingConfig()),
            lambda: served.server.address(),
        )
    assert [error.partition(":")[0] for error in refused] == ["EngineClosedError"] * 6
    assert all("another process" in error and "Call vllm_lm(...) in this process" in error for error in refused)
    assert served.server.starts == 1


def test_the_engine_that_a_fork_makes_answers_as_its_parents(served: VLLMEngine, folder: Path) -> None:
    place: dict[str, Any] = {"url": served.server.address()[0], "api_key": served.server.api_key}
    parents = vllm_lm(folder, cache=False, max_tokens=8, engine_options={"command": FAKE})
    assert in_a_fork(lambda: vllm_lm(folder, **place, cache=False, max_tokens=8)("hello")) == [parents("hello")]


def test_a_fork_that_closes_the_engine_leaves_its_parents_server_and_connections(alone: VLLMEngine) -> None:
    answer = alone.complete(request(alone)).text
    with held_by_another_thread(alone.server._lock):
        assert in_a_fork(alone.close) == [None]
    assert alone.complete(request(alone)).text == answer
    assert alone.server.starts == 1


def test_a_stream_that_a_fork_gives_up_goes_on_in_its_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_PAUSES", "0.3")
    engine = VLLMEngine(folder, command=FAKE)
    stream = engine.stream(request(engine))
    assert [next(stream).type, next(stream).type] == ["start", "delta"]
    assert isinstance(stream, Generator)
    assert in_a_fork(stream.close) == [None]
    assert [event.type for event in stream] == ["delta"] * 4 + ["end"]
    engine.close()
