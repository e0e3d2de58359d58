"""A vLLM server: one that this process starts when it is needed and stops, or one that runs already."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from ...errors import BetterTogetherError, ConfigError, EngineClosedError, MissingExtraError, ModelError
from ...files import cache_folder
from ...printable import get_logger
from ...processes import WatchedProcess, last_lines
from ..making_process import MakingProcess
from .serve_options import arguments

logger = get_logger(__name__)

POLL_S = 0.5
PAUSE_S = 300.0
"""How long falling asleep and waking up may take: weights go to the machine's memory and back."""


class VLLMServer:
    """Where the server is.

    Args:
        source: Folder or hub id of the base model.
        served_name: Name under which a server of ours serves it.
        url: Of a server that runs already, "http://host:8000"; None starts one at the first `address()`.
        api_key: Key of a server that runs already; VLLM_API_KEY of the environment when None. Ours gets a random one.
        command: Program to start, with the arguments that come before "serve".
        options: Those of `vllm serve`, as `serve_options.checked` gives them; none for one that runs already.
        startup_timeout_s: How long a server may take until it answers.

    Raises ConfigError for a key of a server of ours.
    """

    def __init__(
        self,
        source: str,
        served_name: str,
        *,
        url: str | None,
        api_key: str | None,
        command: Sequence[str],
        options: Mapping[str, Any],
        startup_timeout_s: float,
    ) -> None:
        if url is None and api_key is not None:
            raise ConfigError("api_key= is for a server that runs already (url=); ours gets a random key of its own.")
        self.ours = url is None
        self.api_key = secrets.token_urlsafe(32) if url is None else api_key or os.environ.get("VLLM_API_KEY")
        self.options = dict(options)
        self._source, self._served_name, self._command = source, served_name, list(command)
        self._startup_timeout_s = startup_timeout_s
        self.url = url or ""
        """Where it is; "" while ours was never started."""
        self.process: WatchedProcess | None = None
        """Our server, where one was started and not stopped."""
        self.log = Path()
        """Where its output goes."""
        self.starts = 0
        """How often one was started."""
        self._asleep = self._closed = False
        self._failure: BetterTogetherError | None = None
        self._failures = 0
        self._lock = threading.RLock()
        self.made_in = MakingProcess()

    def address(self) -> tuple[str, int]:
        """Its URL, and a number that changes whenever a new server stands there. Starts ours where it is not running.

        Raises EngineClosedError after `close` and in a fork, MissingExtraError without vLLM, and ModelError when the
        server does not come up; those who waited for the same start get the same error, and whoever comes later has it
        started again.
        """
        self.check_open()
        failures = self._failures
        with self._lock:
            self.check_open()
            if not self.runs:
                if self._failures > failures and self._failure is not None:
                    raise type(self._failure)(str(self._failure)) from self._failure
                self._start()
            return self.url, self.starts

    @property
    def runs(self) -> bool:
        """Whether it needs no start, as far as this process can tell."""
        process = self.process
        return not self.ours or (process is not None and process.exit_code is None)

    def check_open(self) -> None:
        """Raise EngineClosedError after `close` and in a fork. Takes no lock."""
        self.made_in.check("vllm_lm(...)")
        if self._closed:
            raise EngineClosedError(f"The engine of {self._served_name} was closed. Make a new LM: vllm_lm(...).")

    @property
    def headers(self) -> dict[str, str]:
        """What a request to it must carry."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def why_gone(self) -> str:
        """What the log of our server says at its end, where it has ended; "" otherwise."""
        process = self.process
        if process is None or process.exit_code is None:
            return ""
        return f" It ended with code {process.exit_code}; the end of {self.log}:\n{self._log_end()}"

    def close(self) -> None:
        """`stop` for good: whoever still waits for an answer has no other server started."""
        self._closed = True
        self.stop()

    def stop(self) -> None:
        """Stop our server and free its memory; the next `address()` starts another. One that is not ours runs on, and
        so does that of the process that this is a fork of."""
        if not self.made_in.is_this:
            return
        with self._lock:
            if self.process is not None:
                self.process.stop()
                self.process = None
                self._asleep = False

    def pause(self) -> None:
        """Take our server off its memory until `resume`: asleep where it was started so that it can, stopped elsewhere.

        Nobody may ask it meanwhile. Asleep it keeps its weights in the machine's memory, and its adapters.
        """
        with self._lock:
            if self.process is not None and self.options.get("enable_sleep_mode"):
                self._asleep = self._told("/sleep?level=1")
            if not self._asleep:
                self.stop()

    def resume(self) -> None:
        """Wake our server where it sleeps; one that does not wake is stopped, so that `address()` starts another."""
        with self._lock:
            if not self._asleep or self.process is None:
                return
            self._asleep = False
            if not self._told("/wake_up"):
                self.stop()

    def _told(self, path: str) -> bool:
        """Whether our server did what a POST to `path` tells it."""
        try:
            with httpx.Client(trust_env=False, timeout=PAUSE_S) as client:
                client.post(f"{self.url}{path}", headers=self.headers).raise_for_status()
        except httpx.HTTPError as error:
            logger.warning("vLLM does not answer %s (%r), so it is stopped and started anew.", path, error)
            return False
        return True

    def _start(self) -> None:
        program = self._command[0]
        if shutil.which(program) is None:
            raise MissingExtraError(
                f"{program!r} is not to be found. Install vLLM (pip install 'bettertogether[vllm]'), or give command= "
                "the path of `vllm` in another environment, or url= the address of a server that runs."
            )
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        own = {"host": "127.0.0.1", "port": port, "served_model_name": self._served_name}
        command = [*self._command, "serve", self._source, *arguments({**self.options, **own})]
        self.log = cache_folder() / "logs" / f"vllm-{os.getpid()}-{port}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Starting vLLM for %s; its log is %s.", self._served_name, self.log)
        # Not as an argument: those of a process are for everybody to read.
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": self.api_key or ""}
        if self.options.get("enable_sleep_mode"):
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        self.starts += 1
        self.process = WatchedProcess(command, self.log, environment)
        try:
            self._wait_until_it_serves(self.process)
        except BaseException as error:
            self.process.stop()
            if isinstance(error, BetterTogetherError):
                self._failure = error
                self._failures += 1
            raise

    def _wait_until_it_serves(self, process: WatchedProcess) -> None:
        deadline = time.monotonic() + self._startup_timeout_s
        while process.exit_code is None:
            if self._serves():
                return
            if time.monotonic() > deadline:
                raise ModelError(
                    f"vLLM does not answer after {self._startup_timeout_s:.0f} s. Give a longer startup_timeout_s, or "
                    f"see the end of {self.log}:\n{self._log_end()}"
                )
            time.sleep(POLL_S)
        raise ModelError(
            f"vLLM ended with code {process.exit_code} before it could answer. Other server_options may help (memory: "
            f"gpu_memory_utilization, max_model_len). The end of {self.log}:\n{self._log_end()}"
        )

    def _serves(self) -> bool:
        """Whether our server answers at our port: somebody else may have taken the port before it could."""
        try:
            reply = httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=5, trust_env=False)
            return any(model["id"] == self._served_name for model in reply.raise_for_status().json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False  # not listening yet, or not ours

    def _log_end(self) -> str:
        return last_lines(self.log.read_text(errors="replace"))


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
