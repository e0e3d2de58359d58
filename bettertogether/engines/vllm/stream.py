"""Answers that a thread of their own reads from a server, at the server's pace."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from typing import Any

import httpx

from ..making_process import MakingProcess
from ..streaming import Put


class StreamReader:
    """Reads one answer to its end, whether or not anybody takes its events.

    So an answer that is taken slowly, or never to its end, keeps nobody waiting for the server.

    Args:
        put: Is given each event, then None; or the exception that ended it. Called on the reading thread.
    """

    def __init__(self, put: Put) -> None:
        self._put = put
        self._lock = threading.Lock()
        self._reply: httpx.Response | None = None
        self._made_in = MakingProcess()
        self.stopped = False
        """Whether nobody takes the events any more."""

    def start(self, pool: Executor, events: Callable[[StreamReader], Iterable[Any]]) -> None:
        """Read what `events(self)` gives on a thread of the pool."""
        pool.submit(self._read, events).add_done_callback(self._ended)

    def reads(self, reply: httpx.Response) -> None:
        """Name the reply that is being read, so that `stop` can break it off."""
        with self._lock:
            self._reply = reply
            if self.stopped:
                _break_off(reply)

    def until_stopped(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """The chunks of the reply; those that `stop` breaks off are at their end, as that is no fault of the server."""
        try:
            yield from chunks
        except httpx.TransportError:
            if not self.stopped:
                raise

    def stop(self) -> None:
        """Nobody takes the events any more: break the answer off, so that the server stops writing it.
        A fork, where a stream that it never took is given up, has the connection open as well."""
        if not self._made_in.is_this:
            return
        with self._lock:
            self.stopped = True
            if self._reply is not None and not self._reply.is_closed:
                _break_off(self._reply)

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


def _break_off(reply: httpx.Response) -> None:
    """End a reply that another thread is reading: closing it would leave that thread waiting."""
    stream = reply.extensions.get("network_stream")
    connection = stream.get_extra_info("socket") if stream is not None else None
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
