"""One server of those that share the requests: what is asked of it, and which adapters it holds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from dspy.lm15 import LM15Error, TransportError

from ...errors import BetterTogetherError, ModelError
from ...training.adapter_folder import read_adapter_config
from .api import GONE, check, understood
from .breakable import Breakable
from .server import VLLMServer

PROBE_S = 10.0
"""How long a server may take to say that it is well."""
UNMET = (LM15Error, httpx.HTTPError, httpx.InvalidURL, ValueError)
"""What `Member.served` raises."""


class Adapter(NamedTuple):
    """An adapter by its model name, and the folder that a server is to load."""

    name: str
    folder: Path


class Served(NamedTuple):
    """What a server says that it serves."""

    base: str
    max_length: int | None
    adapters: frozenset[str]


class Member:
    """A server, the adapters that this process had it load, and how it did lately (which its `Fleet` writes).

    Args:
        server: Where it is.
        client: For the requests to it.
        most_adapters: Adapters that it is to hold for this process at most.
    """

    def __init__(self, server: VLLMServer, client: httpx.Client, most_adapters: int) -> None:
        self.server = server
        self._client, self._most = client, most_adapters
        self.in_flight = 0
        self.failures = 0
        """How often in a row it was found gone; 0 while it is in service."""
        self.rests_until = 0.0
        """When one that is gone is to be tried again."""
        self._lock = threading.Lock()
        self._held: dict[str, Path] = {}
        """Adapters that it holds, the one asked for longest ago first, and the folders that it reads them from."""
        self._in_use: Counter[str] = Counter()
        self._start = 0

    def served(self) -> Served:
        """What it serves. Raises `UNMET`."""
        address, _ = self.server.address()
        reply = self._client.get(f"{address}/v1/models", headers=self.server.headers, timeout=PROBE_S)
        check(reply, self.server.url)
        with understood(reply, reply.text):
            models = reply.json()["data"]
            base, *_ = (model for model in models if not model.get("parent"))
            adapters = frozenset(model["id"] for model in models if model.get("parent"))
            return Served(base["id"], base.get("max_model_len"), adapters)

    def welcome_back(self, base: str) -> None:
        """See whether it serves again, and which of its adapters it kept. Raises lm15's TransportError."""
        try:
            served = self.served()
        except UNMET as error:
            raise TransportError(f"No answer from the vLLM server at {self.server.url}: {error!r}.") from error
        if served.base != base:
            raise TransportError(f"The vLLM server at {self.server.url} serves {served.base!r} now, and not {base!r}.")
        with self._lock:
            self._keep(served.adapters)

    def is_well(self) -> bool:
        """Whether it says that it is."""
        if self.server.why_gone():
            return False
        address, _ = self.server.address()
        try:
            reply = self._client.get(f"{address}/health", headers=self.server.headers, timeout=PROBE_S)
        except httpx.TransportError:
            return False
        return reply.status_code < 500

    def completion(
        self, body: Mapping[str, Any], adapter: Adapter | None, breakable: Breakable | None, *, stream: bool
    ) -> httpx.Response:
        """Its reply to a request, whatever its status; of a `stream` the body is still to be read.

        Raises what `holding` raises, and CancelledError where `breakable` was broken off. An adapter that it lost, as
        it was started anew or somebody else unloaded it, is loaded again.
        """
        reply = self._send("/v1/completions", body, breakable, stream=stream)
        if reply.status_code == 404 and adapter is not None:
            reply.close()
            with self._lock:
                self._keep(self.served().adapters)
                self._hold(adapter)
            reply = self._send("/v1/completions", body, breakable, stream=stream)
        return reply

    @contextmanager
    def holding(self, adapter: Adapter | None) -> Iterator[None]:
        """It runs and holds the adapter, until the end.

        Raises ModelError where it does not load it, httpx.TransportError, and lm15's ServerError and RateLimitError.
        """
        _, start = self.server.address()
        if adapter is None:
            yield
            return
        with self._lock:
            if start != self._start:
                self._held.clear()
                self._start = start
            self._hold(adapter)
            self._in_use[adapter.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_use[adapter.name] -= 1

    def _keep(self, there: frozenset[str]) -> None:
        self._held = {name: folder for name, folder in self._held.items() if name in there}

    def forget(self, name: str) -> None:
        """Have it unload an adapter that no request is in flight for. Where it can't be told, it holds it until there
        is need of room."""
        with self._lock:
            if name in self._held and not self._in_use[name] and self.server.runs:
                with suppress(BetterTogetherError, *UNMET):
                    self._unload(name, PROBE_S)

    def _hold(self, adapter: Adapter) -> None:
        if self._held.get(adapter.name) != adapter.folder:
            # Of what is long unused vLLM keeps the folder alone, and reads that again.
            if adapter.name in self._held:
                self._unload(adapter.name)
            self._make_room()
            self._load(adapter)
        self._held.pop(adapter.name, None)
        self._held[adapter.name] = adapter.folder

    def _make_room(self) -> None:
        unused = [name for name in self._held if not self._in_use[name]]
        for name in unused[: max(0, len(self._held) - self._most + 1)]:
            self._unload(name)

    def _unload(self, name: str, timeout_s: float | None = None) -> None:
        reply = self._told("unload", {"lora_name": name}, timeout_s)
        if reply.status_code >= 400 and reply.status_code != 404:
            raise ModelError(
                f"The vLLM server at {self.server.url} does not unload the adapter {name}: {_said(reply)}. Give a "
                "larger max_adapters in engine_options, so that none has to be unloaded."
            )
        del self._held[name]

    def _load(self, adapter: Adapter) -> None:
        folder = adapter.folder.resolve()
        reply = self._told("load", {"lora_name": adapter.name, "lora_path": str(folder)})
        if reply.status_code >= 400 and "already been loaded" not in reply.text:
            rank = read_adapter_config(folder)["r"]
            raise ModelError(
                f"The vLLM server at {self.server.url} does not load the adapter {folder}: {_said(reply)}. Its rank "
                f"({rank}) must be within that server's --max-lora-rank, its folder must be there under the same path, "
                "and a server that was started by hand needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora."
            )

    def _told(self, action: str, body: Mapping[str, Any], timeout_s: float | None = None) -> httpx.Response:
        """Its reply to being told to "load" or "unload" an adapter. One that is gone or busy says nothing of the
        adapter: that raises what it raises for a completion."""
        reply = self._send(f"/v1/{action}_lora_adapter", body, timeout_s=timeout_s)
        if reply.status_code in (429, *GONE):
            check(reply, self.server.url)
        return reply

    def _send(
        self,
        path: str,
        body: Mapping[str, Any],
        breakable: Breakable | None = None,
        *,
        stream: bool = False,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        address, _ = self.server.address()
        timeout = self._client.timeout if timeout_s is None else timeout_s
        request = self._client.build_request(
            "POST", f"{address}{path}", json=body, headers=self.server.headers, timeout=timeout
        )
        return (breakable or self._client).send(request, stream=stream)


def _said(reply: httpx.Response) -> str:
    return f"{reply.status_code} {reply.text:.500}"
