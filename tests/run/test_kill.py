"""A compile run is killed at random moments, and the same call always ends with the same report."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KILLS, LATEST_S = 10, 1.2


def start(run_dir: Path) -> subprocess.Popen[str]:
    """The run in a process of its own, at the moment when its work begins."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    process = subprocess.Popen(
        [sys.executable, str(tests / "run" / "killed_run.py"), str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n", process.communicate()[1]
    return process


def ended(process: subprocess.Popen[str]) -> Any:
    """What the run ended with."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def killed(process: subprocess.Popen[str], after_s: float) -> bool:
    """Whether the process was still there to be killed."""
    time.sleep(after_s)
    if process.poll() is not None:
        return False
    process.kill()
    process.communicate()
    return process.returncode == -9


def test_a_run_killed_at_ten_random_moments_ends_with_the_report_of_an_uninterrupted_one(tmp_path: Path) -> None:
    started = time.monotonic()
    whole = ended(start(tmp_path / "whole"))
    assert [record["strategy"] for record in whole["report"]["rounds"]] == ["", "p", "p -> w", "p -> w -> p"]
    rng = random.Random(32)
    runs = kills = 0
    while kills < KILLS:
        process = start(tmp_path / f"run {runs}")
        if killed(process, rng.uniform(0, LATEST_S)):
            kills += 1
        else:
            assert ended(process) == whole
            runs += 1
    assert ended(start(tmp_path / f"run {runs}")) == whole
    assert time.monotonic() - started < 120
