"""A command that never outlives the process that started it.

`WatchedProcess` runs this very file as a script between the two. It ends the command, with all that the command
started, when its own standard input closes: at `stop()`, and when the parent is gone, however it went. Nothing of the
package is imported in that script.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_S = 10.0
"""Time the processes get to end after they were asked to, before they are killed."""
LOG_LINES = 30


class WatchedProcess:
    """A running command whose output goes to a file.

    Args:
        command: Program and arguments.
        log: File for its output, written anew.
        environment: Its variables; those of this process when None.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with log.open("wb") as file:
            # A session of its own: a signal to this process's group (Ctrl-C, `timeout`) must not take the watcher away
            # from the command.
            self._process = subprocess.Popen(
                [sys.executable, __file__, *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of its watcher, whose child the command is."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The command's exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it and wait for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if os.name != "nt":
            # A fork of this process, such as a worker of a pool, may hold the other end of its input as well.
            self._process.terminate()
        self._process.wait()


def last_lines(text: str) -> str:
    """The end of a log, for an error's message."""
    return "\n".join(text.splitlines()[-LOG_LINES:])


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, and the rest of the group."""
    if os.name == "nt":
        stop_tree(process)
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, where there are no groups of processes."""
    import psutil

    try:
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(tree, STOP_S)


def _wait_for_end_of_input(asked: threading.Event) -> None:
    # Not through sys.stdin: a thread that waits in there makes Python abort when the main thread ends.
    while os.read(0, 1):
        pass
    asked.set()


def _stop_when_asked(asked: threading.Event, process: subprocess.Popen[bytes]) -> None:
    asked.wait()
    stop_group(process)


def main(command: Sequence[str]) -> int:
    """Run a command until it ends, standard input closes or SIGTERM comes; returns its exit code, 128 + n where signal
    n ended it."""
    asked = threading.Event()
    # Before the command is there: it never lacks somebody to end it.
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_wait_for_end_of_input, args=(asked,), daemon=True).start()
    threading.Thread(target=_stop_when_asked, args=(asked, process), daemon=True).start()
    try:
        code = process.wait()
    finally:
        stop_group(process)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
