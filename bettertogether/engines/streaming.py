"""Answers as events, which come from another thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from typing import Any

from dspy.lm15 import Request

from ._upstream import StreamEvent

Put = Callable[[Any], Any]
"""Takes each event; then None, or the exception that ended them."""
Begin = Callable[[Put], Callable[[], object]]
"""Has an answer written whose events go to `put`, on any thread; returns what breaks it off."""


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
        begin = await asyncio.to_thread(self._prepared, request)
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
