"""Answers as events, which come from another thread."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

from dspy.lm15 import Request

from ._upstream import StreamEvent

T = TypeVar("T")
R = TypeVar("R")

Put = Callable[[Any], Any]
"""Takes each event; then None, or the exception that ended them."""
Begin = Callable[[Put], Callable[[], object]]
"""Has an answer written whose events go to `put`, on any thread; returns what breaks it off."""


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="bettertogether-prompts")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


async def off_the_loop(function: Callable[[T], R], argument: T) -> R:
    """What a function gives that takes its time, but waits for nobody. Not on threads that others have work for, as
    those of `asyncio.to_thread`: they may be waiting for the loop."""
    call = functools.partial(copy_context().run, function, argument)
    return await asyncio.get_running_loop().run_in_executor(_threads(), call)


class Streaming:
    """What hands on the events of answers; a subclass makes them."""

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """Answer one request as events, each sent when its tokens are decided."""
        events: SimpleQueue[Any] = SimpleQueue()
        stop = self._prepared(request)(events.put)
        try:
            while (event := events.get()) is not None:
                yield _event(event)
        finally:
            stop()

    async def stream_async(self, request: Request) -> AsyncIterator[StreamEvent]:
        """`stream` for an event loop, which stays free."""
        begin = await off_the_loop(self._prepared, request)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def put(event: Any) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:
                # The loop was closed: nobody takes events any more.
                stop()

        stop = begin(put)
        try:
            while (event := await events.get()) is not None:
                yield _event(event)
        finally:
            stop()

    def _prepared(self, request: Request) -> Begin:
        """Do what comes before an answer, which may take a while: its prompt's tokens, its grammar."""
        raise NotImplementedError


def _event(event: Any) -> StreamEvent:
    if isinstance(event, BaseException):
        raise event
    return event
