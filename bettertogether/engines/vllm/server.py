"""A vLLM server: one that this process starts when it is needed and stops, or one that runs already."""

from __future__ import annotations

import json
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

from ...errors import BetterTogetherError, ConfigError, MissingExtraError, ModelError
from ...files import cache_folder
from ...printable import get_logger
from ...processes import WatchedProcess, last_lines

logger = get_logger(__name__)

POLL_S = 0.5
DEFAULT_OPTIONS: Mapping[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": 64,
    # It reads the grammars that this library writes (lark).
    "structured_outputs_config": {"backend": "guidance"},
    "enable_prompt_tokens_details": True,
}
OWN_OPTIONS = ("host", "port", "served_model_name", "api_key")


class VLLMServer:
    """Where the server is.

    Args:
        source: Folder or hub id of the base model.
        served_name: Name under which a server of ours serves it.
        url: Of a server that runs already, "http://host:8000"; None starts one at the first `address()`.
        api_key: Key of a server that runs already; VLLM_API_KEY of the environment when None. Ours gets a random one.
        command: Program to start, with the arguments that come before "serve".
        options: More options of `vllm serve`, as {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 2}; True is
            a bare flag, False its --no- form.
        startup_timeout_s: How long a server may take until it answers.

    Raises ConfigError for options that this class sets itself.
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
        refused = sorted(set(options) & set(OWN_OPTIONS))
        if refused or (url is not None and options):
            allowed = "with url= there are none, the server runs already" if url else f"any but {OWN_OPTIONS}"
            raise ConfigError(f"server_options {refused or sorted(options)} can't be given: {allowed}.")
        if url is None and api_key is not None:
            raise ConfigError("api_key= is for a server that runs already (url=); ours gets a random key of its own.")
        self.ours = url is None
        self.api_key = secrets.token_urlsafe(32) if url is None else api_key or os.environ.get("VLLM_API_KEY")
        self.options = {**DEFAULT_OPTIONS, **options}
        self._source, self._served_name, self._command = source, served_name, list(command)
        self._startup_timeout_s = startup_timeout_s
        self._url = "" if url is None else url.rstrip("/").removesuffix("/v1")
        self.process: WatchedProcess | None = None
        """Our server, where one was started and not stopped."""
        self.log = Path()
        """Where its output goes."""
        self.starts = 0
        """How often one was started."""
        self._failure: BetterTogetherError | None = None
        self._failures = 0
        self._lock = threading.Lock()

    def address(self) -> tuple[str, int]:
        """Its URL, and a number that changes whenever a new server stands there. Starts ours where it is not running.

        Raises MissingExtraError without vLLM, and ModelError when the server does not come up; those who waited for the
        same start get the same error, and whoever comes later has it started again.
        """
        failures = self._failures
        with self._lock:
            if self.ours and (self.process is None or self.process.exit_code is not None):
                if self._failures > failures and self._failure is not None:
                    raise type(self._failure)(str(self._failure)) from self._failure
                self._start()
            return self._url, self.starts

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

    def stop(self) -> None:
        """Stop our server and free its memory; the next `address()` starts another. One that is not ours runs on."""
        with self._lock:
            if self.process is not None:
                self.process.stop()
                self.process = None

    def _start(self) -> None:
        program = self._command[0]
        if shutil.which(program) is None:
            raise MissingExtraError(
                f"{program!r} is not to be found. Install vLLM (pip install 'bettertogether[vllm]'), or give command= "
                "the path of `vllm` in another environment, or url= the address of a server that runs."
            )
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        own = {"host": "127.0.0.1", "port": port, "served_model_name": self._served_name}
        command = [*self._command, "serve", self._source, *_arguments({**self.options, **own})]
        self.log = cache_folder() / "logs" / f"vllm-{os.getpid()}-{port}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Starting vLLM for %s; its log is %s.", self._served_name, self.log)
        # Not as an argument: those of a process are for everybody to read.
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": self.api_key or ""}
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
            reply = httpx.get(f"{self._url}/v1/models", headers=self.headers, timeout=5, trust_env=False)
            return any(model["id"] == self._served_name for model in reply.raise_for_status().json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False  # not listening yet, or not ours

    def _log_end(self) -> str:
        return last_lines(self.log.read_text(errors="replace"))


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as command line arguments."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return arguments


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
