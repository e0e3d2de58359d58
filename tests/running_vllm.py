"""Stand-ins for vLLM servers that somebody else started, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from fakes import wait_for

from bettertogether.engines.vllm.server import free_port

FAKE = (sys.executable, str(Path(__file__).parent / "engines" / "fake_vllm.py"))


class Running:
    """A server at a port: `environment` and `options` are its own ("--max-lora-rank", "8")."""

    def __init__(self, port: int | None = None, *options: str, model: str = "some/model", **environment: str) -> None:
        self.port = port or free_port()
        scheme = "https" if "FAKE_VLLM_CERTIFICATE" in environment else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        command = [*FAKE, "serve", model, "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, env={**os.environ, **environment})
        assert wait_for(self.answers, seconds=30)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", verify=False).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def seen(self) -> list[dict[str, Any]]:
        """The bodies of the completions that it was asked for."""
        return httpx.get(f"{self.url}/seen", verify=False).json()

    @property
    def told(self) -> list[str]:
        """What else it was told, in order: "load NAME", "unload NAME"."""
        return httpx.get(f"{self.url}/told", verify=False).json()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
