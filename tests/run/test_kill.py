"""A compile run is killed at random moments, and the same call always ends with the same report."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KILLS, LATEST_S = 10, 1.2


class Runs:
    """Runs in processes of their own, one at a time: see `killed_run.py`."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, run_dir: Path) -> int:
        """The number of a process, at the moment when its work begins."""
        assert self._server.stdin is not None
        self._server.stdin.write(f"{run_dir}\n")
        self._server.stdin.flush()
        return self._next("started")

    def exit_code(self) -> int:
        return self._next("ended")

    def _next(self, event: str) -> int:
        assert self._server.stdout is not None
        said, number = self._server.stdout.readline().split()
        assert said == event, number
        return int(number)


@pytest.fixture
def runs() -> Iterator[Runs]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, str(tests / "run" / "killed_run.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as server:
        yield Runs(server)
        os.killpg(server.pid, signal.SIGKILL)


def whole(runs: Runs, run_dir: Path) -> Any:
    """What a run ends with that nobody kills."""
    runs.start(run_dir)
    assert runs.exit_code() == 0
    return ended(run_dir)


def ended(run_dir: Path) -> Any:
    return json.loads(Path(f"{run_dir}.json").read_text())


def killed(runs: Runs, run_dir: Path, after_s: float) -> bool:
    """Whether the process was still there to be killed."""
    process = runs.start(run_dir)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    code = runs.exit_code()
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_run_killed_at_ten_random_moments_ends_with_the_report_of_an_uninterrupted_one(
    runs: Runs, tmp_path: Path
) -> None:
    started = time.monotonic()
    expected = whole(runs, tmp_path / "whole")
    assert [record["strategy"] for record in expected["report"]["rounds"]] == ["", "p", "p -> w", "p -> w -> p"]
    rng = random.Random(32)
    done = kills = 0
    while kills < KILLS:
        run_dir = tmp_path / f"run {done}"
        if killed(runs, run_dir, rng.uniform(0, LATEST_S)):
            kills += 1
        else:
            assert ended(run_dir) == expected
            done += 1
    assert whole(runs, tmp_path / f"run {done}") == expected
    assert time.monotonic() - started < 120
