"""The progress display never ends a run, and shows nothing that steers a terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from typing import Any

import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS
from bettertogether.callbacks import Callback, ProgressDisplay, emit, listening, warn
from bettertogether.records import StepRecord

EVIL = "p\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\nq"


class BreaksAfter(io.StringIO):
    """A stream that raises from its n-th write on."""

    def __init__(self, writes: int, error: Exception, terminal: bool = False) -> None:
        super().__init__()
        self._left, self._error, self._terminal = writes, error, terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().write(text)


def events(strategy: str = "p") -> None:
    emit("run_start", {"strategy": strategy, "rounds": ["", strategy]})
    for index, name in enumerate(["", strategy]):
        emit("step_start", {"index": index, "step": name, "strategy": name})
        for done in range(1, 4):
            emit("progress", {"phase": f"score {name}", "done": done, "total": 3})
        warn(f"metric error in {name}")
        emit("step_end", {"record": StepRecord(index, name, name, "complete", 0.5, (0.0, 1.0))})
    emit("run_end", {"report": None, "error": f"ValueError({name})"})


ERRORS = [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), OSError(5, "Input/output error")]


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "live"])
@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("error", [*ERRORS, ValueError("I/O operation on closed file")], ids=repr)
def test_a_stream_that_breaks_turns_the_display_off_with_one_warning(
    error: Exception, writes: int, terminal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    standard = sys.stdout, sys.stderr
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    with listening([ProgressDisplay(file=BreaksAfter(writes, error, terminal), interval_s=0)]):
        events()
    off = [line for line in caplog.messages if "progress display is off" in line]
    assert off == [
        "The progress display is off from here on, since it can't be written "
        f"({type(error).__name__}: {error}). The run goes on."
    ]
    assert (sys.stdout, sys.stderr) == standard
    assert died == []


def test_a_run_ends_well_on_a_full_disk() -> None:
    program = parity_program(parity_engine(learner))
    with open("/dev/full", "w", buffering=1) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=1))
        compiled = optimizer.compile(program, trainset=numbers(24, 40), valset=numbers(10), strategy="p")
        full_error: Exception | None = None
        patch.undo()
        try:
            full.close()
        except OSError as error:
            full_error = error
    assert full_error is not None
    assert [record.status for record in compiled.report.rounds] == ["complete", "complete"]


def test_a_run_ends_well_when_the_reader_of_its_pipe_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = parity_program(parity_engine(learner))
    with os.fdopen(writer, "w", buffering=1) as pipe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=1))
        compiled = optimizer.compile(program, trainset=numbers(24, 40), valset=numbers(10), strategy="p")
        patch.undo()
        with pytest.raises(BrokenPipeError):
            pipe.close()
    assert [record.status for record in compiled.report.rounds] == ["complete", "complete"]


def test_without_a_standard_error_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable(logging.CRITICAL)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        with listening([ProgressDisplay()]):
            events()
    finally:
        logging.disable(logging.NOTSET)


def test_what_another_callback_raises_ends_the_run_also_when_the_display_is_off() -> None:
    class Broken(Callback):
        def on_step_end(self, event: Any) -> None:
            raise OSError("my own log is full")

    display = ProgressDisplay(file=BreaksAfter(0, BrokenPipeError()))
    with pytest.raises(OSError, match="my own log is full"), listening([display, Broken()]):
        events()


def test_lines_can_not_steer_the_terminal_and_stay_lines() -> None:
    file = io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=0)]):
        events(EVIL)
    lines = file.getvalue().split("\n")
    assert all(line.startswith("[bettertogether 0:0") for line in lines[:-1])
    assert not {"\x1b", "\x07", "\r"} & set(file.getvalue())
    assert r"start p\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\nq" in lines[0]


def test_the_live_view_writes_no_escape_sequence_of_a_name_or_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = BreaksAfter(10**9, OSError(), terminal=True)
    with listening([ProgressDisplay(file=file)]):
        events(EVIL)
    assert "\x1b]52" not in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()
    assert r"! metric error in p\x1b]52;c;ZXZpbA==" in file.getvalue()
