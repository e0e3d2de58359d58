"""Requests to a server that another thread may break off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import httpx

from ..making_process import MakingProcess


class Breakable:
    """Sends the requests for one answer, until it is broken off.

    Args:
        client: One that keeps no connections, so that each request has a new one: of one that was kept httpx doesn't
            say which it is before the server has answered.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._made_in = MakingProcess()
        self.stopped = False
        """Whether nobody waits for the answer any more."""

    def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """The reply, as `httpx.Client.send` gives it. Raises CancelledError where it was broken off, which is no fault
        of the server."""
        if self.stopped:
            raise CancelledError
        request.extensions["trace"] = self._trace
        try:
            return self._client.send(request, stream=stream)
        except httpx.TransportError as error:
            if self.stopped:
                raise CancelledError from error
            raise

    def stop(self) -> None:
        """Nobody waits for the answer any more: break it off, so that the server stops writing it.

        A fork, in which what never ran there is given up, has the connection open as well.
        """
        if not self._made_in.is_this:
            return
        with self._lock:
            self.stopped = True
            self._shut_down()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Learn the connection: https://www.encode.io/httpcore/extensions/#trace."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._connection = info["return_value"].get_extra_info("socket")
                if self.stopped:
                    self._shut_down()

    def _shut_down(self) -> None:
        """Closing it would leave the thread waiting that reads from it."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
