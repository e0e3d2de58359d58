"""Programs in processes of their own whose imports, most of the work of short ones, are made once.

    python tests/forking.py MODULE ...

imports the modules, reads a program a line, as JSON, and forks for each, one at a time. The child prints its number and
then what its program prints; the line after is "ended" and the exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_S = 300
"""A program that takes longer hangs: it is killed."""


class Programs:
    """Runs programs, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, program: str) -> int:
        """The number of the process that runs a program."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(program) + "\n")
        self._server.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        """The next line that the program prints."""
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "it is gone"
        return line.rstrip("\n")

    def exit_code(self) -> int:
        """Of the program, which prints no more until it ends."""
        said, code = self.line().split()
        assert said == "ended"
        return int(code)


@contextmanager
def programs_that_import(*modules: str) -> Iterator[Programs]:
    """Programs that find these modules imported; one that runs after the block is killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, *modules]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as server:
        yield Programs(server)
        os.killpg(server.pid, signal.SIGKILL)


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.alarm(LONGEST_S)
            say(str(os.getpid()))
            exec(json.loads(line), {"__name__": "__main__"})
            return
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
