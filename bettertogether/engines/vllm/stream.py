"""Answers that a thread of their own reads from a server, at the server's pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from typing import Any

import httpx

from ..streaming import Put
from .breakable import Breakable


class StreamReader(Breakable):
    """Reads one answer to its end, whether or not anybody takes its events.

    So an answer that is taken slowly, or never to its end, keeps nobody waiting for the server.

    Args:
        client: See `Breakable`.
        put: Is given each event, then None; or the exception that ended it. Called on the reading thread.
    """

    def __init__(self, client: httpx.Client, put: Put) -> None:
        super().__init__(client)
        self._put = put

    def start(self, pool: Executor, events: Callable[[StreamReader], Iterable[Any]]) -> None:
        """Read what `events(self)` gives on a thread of the pool."""
        pool.submit(self._read, events).add_done_callback(self._ended)

    def until_stopped(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """The chunks of the reply; those that `stop` breaks off are at their end, as that is no fault of the server."""
        try:
            yield from chunks
        except httpx.TransportError:
            if not self.stopped:
                raise

    def _read(self, events: Callable[[StreamReader], Iterable[Any]]) -> None:
        for event in events(self):
            self._put(event)
            if self.stopped:
                return

    def _ended(self, future: Future[None]) -> None:
        if self.stopped:
            return
        try:
            self._put(future.exception())
        except CancelledError as error:
            self._put(error)
