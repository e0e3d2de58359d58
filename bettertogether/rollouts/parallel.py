"""Run one function over many items in threads, with DSPy's settings and clean interruption."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import dspy
from dspy.dsp.utils.settings import DEFAULT_CONFIG

from ..checks import require_whole
from ..errors import BetterTogetherError, BudgetExceeded

Item = TypeVar("Item")
Result = TypeVar("Result")

WAKE_UP_S = 0.2
"""How often the waiting thread wakes, so that Ctrl-C is heard at once."""

ASYNC_WORKERS = 16
"""Calls by `dspy.asyncify` that each thread may have under way."""


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_threads: int,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """Results in the order of `items`. `on_result(index, result)` is called in this thread as each one comes in.

    The first exception (Ctrl-C too) stops the rest that has not started, and is raised. Where it is the end of a
    budget, what was under way is waited for and told to `on_result`, too: it is paid for.
    """
    results: dict[int, Result] = {}
    waiting = deque(range(len(items)))
    # Not futures of a pool, which cost as much as the run of a small program.
    finished: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    number = max(1, min(num_threads, len(items)))
    # DSPy bounds these calls for the whole process, and what waits for a place in the event loop of one thread is not
    # woken by those of the others. A bound of the user's own stays.
    bound = dspy.settings.async_max_workers
    if bound == DEFAULT_CONFIG.async_max_workers:
        bound = max(bound, ASYNC_WORKERS * number)
    with dspy.context(async_max_workers=bound):
        context = contextvars.copy_context()

    def work() -> None:
        while True:
            try:
                index = waiting.popleft()
            except IndexError:  # nothing is left
                return
            try:
                finished.put((index, context.copy().run(function, items[index]), None))
            except BaseException as error:
                finished.put((index, None, error))

    threads = [threading.Thread(target=work, name="bettertogether") for _ in range(number)]
    try:
        for thread in threads:
            thread.start()
        while len(results) < len(items):
            try:
                index, result, error = finished.get(timeout=WAKE_UP_S)
            except Empty:
                continue
            if error is not None:
                raise error
            results[index] = result
            if on_result:
                on_result(index, results[index])
    except BudgetExceeded:
        waiting.clear()
        for thread in threads:
            while thread.is_alive():  # so that Ctrl-C is heard
                thread.join(WAKE_UP_S)
        while not finished.empty():
            index, result, error = finished.get()
            if on_result and error is None:
                with contextlib.suppress(BetterTogetherError):
                    on_result(index, result)
        raise
    finally:
        waiting.clear()
    for thread in threads:
        thread.join()
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
