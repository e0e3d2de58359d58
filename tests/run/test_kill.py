"""A compile run is killed at random moments, and the same call always ends with the same report."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import Programs, programs_that_import

KILLS, LATEST_S = 10, 1.2


@pytest.fixture
def programs() -> Iterator[Programs]:
    with programs_that_import("killed_run") as running:
        yield running


@pytest.fixture(scope="module")
def trainings() -> Iterator[Programs]:
    with programs_that_import("killed_training") as running:
        yield running


def start(programs: Programs, run_dir: Path, strategy: str = "p -> w -> p") -> int:
    """The number of the process of a run, at the moment when its work begins."""
    arguments = f"pathlib.Path({str(run_dir)!r}), {strategy!r}"
    number = programs.start(f"import pathlib, killed_run; killed_run.run({arguments})")
    assert programs.line() == "started"
    return number


def whole(programs: Programs, run_dir: Path, strategy: str = "p -> w -> p") -> Any:
    """What a run ends with that nobody kills."""
    start(programs, run_dir, strategy)
    assert programs.exit_code() == 0
    return ended(run_dir)


def ended(run_dir: Path) -> Any:
    return json.loads(Path(f"{run_dir}.json").read_text())


def killed(programs: Programs, run_dir: Path, after_s: float) -> bool:
    """Whether the process was still there to be killed."""
    process = start(programs, run_dir)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    code = programs.exit_code()
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_run_killed_at_ten_random_moments_ends_with_the_report_of_an_uninterrupted_one(
    programs: Programs, tmp_path: Path
) -> None:
    expected = whole(programs, tmp_path / "whole")
    assert [record["strategy"] for record in expected["report"]["rounds"]] == ["", "p", "p -> w", "p -> w -> p"]
    rng = random.Random(32)
    done = kills = 0
    while kills < KILLS:
        run_dir = tmp_path / f"run {done}"
        if killed(programs, run_dir, rng.uniform(0, LATEST_S)):
            kills += 1
        else:
            assert ended(run_dir) == expected
            done += 1
    assert whole(programs, tmp_path / f"run {done}") == expected


def test_a_run_that_is_killed_with_a_longer_strategy_goes_on_and_so_does_the_shorter_one(
    programs: Programs, tmp_path: Path
) -> None:
    expected, shorter = whole(programs, tmp_path / "whole"), whole(programs, tmp_path / "run", "p")
    for after_s in (0.1, 0.5):
        assert killed(programs, tmp_path / "run", after_s)
        assert whole(programs, tmp_path / "run", "p") == shorter
    assert whole(programs, tmp_path / "run") == expected
    assert whole(programs, tmp_path / "run", "p") == shorter


@pytest.mark.parametrize(("kind", "last_step", "saved"), [("policy", 1, "step-1"), ("preference", 2, "epoch-1")])
def test_a_training_that_is_killed_goes_on_to_the_weights_of_an_uninterrupted_one(
    trainings: Programs, tmp_path: Path, kind: str, last_step: int, saved: str
) -> None:
    def exit_code(run_dir: Path, last_step: int = 0) -> int:
        arguments = f"{kind!r}, pathlib.Path({str(run_dir)!r}), {last_step}"
        trainings.start(f"import pathlib, killed_training; killed_training.run({arguments})")
        return trainings.exit_code()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_code(whole) == 0
    assert exit_code(killed, last_step) == -signal.SIGKILL
    assert len(list(killed.rglob(saved))) == 1
    assert exit_code(killed) == 0
    assert ended(killed) == ended(whole)
