"""Processes that we start end with ours, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import wait_for

from bettertogether.processes import WatchedProcess, last_lines, stop_tree

CHILD = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
PARENT = """
import sys, time
from pathlib import Path
from bettertogether.processes import WatchedProcess
WatchedProcess([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and was not waited for still has a number.
    status = Path(f"/proc/{pid}/stat")
    try:
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        # It went between the two looks.
        return False


def pid_in(log: Path) -> int:
    assert wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    return int(log.read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["alone", "with its group"])
def test_it_ends_when_its_parent_is_killed(
    tmp_path: Path, number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(log)], start_new_session=True)
    child = pid_in(log)
    assert is_alive(child)
    kill(parent.pid, number)
    parent.wait()
    assert wait_for(lambda: not is_alive(child))


def test_it_ends_when_its_watcher_is_asked_to(tmp_path: Path) -> None:
    process = WatchedProcess([sys.executable, "-c", CHILD], tmp_path / "log")
    child = pid_in(tmp_path / "log")
    os.kill(process.pid, signal.SIGTERM)
    assert wait_for(lambda: not is_alive(child))
    process.stop()


def test_stop_ends_it_and_all_that_it_started(tmp_path: Path) -> None:
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    process = WatchedProcess([sys.executable, "-c", grandchild], tmp_path / "log")
    pid = pid_in(tmp_path / "log")
    assert process.exit_code is None
    process.stop()
    assert process.exit_code is not None
    assert wait_for(lambda: not is_alive(pid))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_stop_waits_for_no_fork_of_its_parent(tmp_path: Path) -> None:
    process = WatchedProcess([sys.executable, "-c", CHILD], tmp_path / "log")
    child = pid_in(tmp_path / "log")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(os.getpid)
        process.stop()
        assert wait_for(lambda: not is_alive(child))


def test_a_signal_that_ends_it_shows_in_its_exit_code(tmp_path: Path) -> None:
    process = WatchedProcess([sys.executable, "-c", CHILD], tmp_path / "log")
    os.kill(pid_in(tmp_path / "log"), signal.SIGKILL)
    assert wait_for(lambda: process.exit_code is not None)
    assert process.exit_code == 128 + signal.SIGKILL
    process.stop()


def test_its_exit_code_and_output_are_kept(tmp_path: Path) -> None:
    process = WatchedProcess([sys.executable, "-c", "print('hello'); raise SystemExit(7)"], tmp_path / "log")
    assert wait_for(lambda: process.exit_code is not None)
    assert process.exit_code == 7
    assert (tmp_path / "log").read_text() == "hello\n"
    process.stop()


def test_the_end_of_a_log_is_its_last_lines() -> None:
    assert last_lines("\n".join(map(str, range(100)))) == "\n".join(map(str, range(70, 100)))


def test_where_there_are_no_groups_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", start], stdout=file)
    child = pid_in(log)
    stop_tree(process)
    assert not is_alive(process.pid)
    assert wait_for(lambda: not is_alive(child))
    stop_tree(process)
