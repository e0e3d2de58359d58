"""Run one function over many items in threads, with DSPy's settings and clean interruption."""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import dspy

from ..checks import require_whole

Item = TypeVar("Item")
Result = TypeVar("Result")

WAKE_UP_S = 0.2
"""How often the waiting thread wakes, so that Ctrl-C is heard at once."""

AHEAD = 4
"""Items that are submitted for each thread."""


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_threads: int,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """Results in the order of `items`. `on_result(index, result)` is called in this thread as each one comes in.

    The first exception (Ctrl-C too) stops the rest that has not started, and is raised.
    """
    results: dict[int, Result] = {}
    threads = max(1, min(num_threads, len(items) or 1))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="bettertogether")
    indices: dict[Future[Result], int] = {}
    # Not concurrent.futures.wait, which looks at every pending item each time that one is done.
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    waiting = iter(enumerate(items))

    def submit(count: int) -> None:
        for index, item in itertools.islice(waiting, count):
            future = pool.submit(contextvars.copy_context().run, function, item)
            indices[future] = index
            future.add_done_callback(finished.put)

    try:
        # A few more than there are threads, so that none waits; an item that is submitted takes memory.
        submit(AHEAD * threads)
        while len(results) < len(items):
            try:
                future = finished.get(timeout=WAKE_UP_S)
            except Empty:
                continue
            index = indices.pop(future)
            results[index] = future.result()
            submit(1)
            if on_result:
                on_result(index, results[index])
    finally:
        pool.shutdown(wait=len(results) == len(items), cancel_futures=True)
    return [results[index] for index in range(len(items))]


def thread_count(program: dspy.Module, num_threads: int | None) -> int:
    """Threads for a pass: what was asked for, else as many as the program's local engines like to have in flight,
    else `dspy.settings.num_threads`. Raises ConfigError."""
    if num_threads is not None:
        require_whole("num_threads", num_threads, 1)
        return num_threads
    engines = [getattr(predictor.lm, "engine", None) for predictor in program.predictors()]
    wanted = [getattr(engine, "concurrency", 0) for engine in engines]
    return int(max([dspy.settings.num_threads or 1, *wanted]))
