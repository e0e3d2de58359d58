"""What the progress display shows, in a terminal, a notebook and elsewhere."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import evaluate
from bettertogether.callbacks import ProgressDisplay, emit, listening, warn
from bettertogether.errors import ConfigError
from bettertogether.records import Ledger, RewardLine, StepRecord
from bettertogether.report import CompileReport
from bettertogether.training.progress import TrainingProgress


def test_a_warning_is_a_line_at_once() -> None:
    file = io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=60, clock=lambda: 0.0)]):
        emit("run_start", {"strategy": "p", "rounds": ["", "p"]})
        warn("all 10 examples failed")
        assert file.getvalue().splitlines()[-1] == "[bettertogether 0:00] warning: all 10 examples failed"


@pytest.mark.parametrize(
    ("of_handler", "of_logger"),
    [(logging.WARNING, logging.INFO), (logging.ERROR, logging.INFO), (logging.WARNING, logging.ERROR)],
)
def test_a_warning_is_shown_once_where_the_log_goes_to_the_same_stream(
    of_handler: int, of_logger: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    handler.setLevel(of_handler)
    logging.getLogger("bettertogether").addHandler(handler)
    caplog.set_level(of_logger, "bettertogether")
    try:
        with listening([ProgressDisplay(file=file, interval_s=60, clock=lambda: 0.0)]):
            emit("run_start", {"strategy": "p", "rounds": ["", "p"]})
            warn("all 10 examples failed")
    finally:
        logging.getLogger("bettertogether").removeHandler(handler)
    told = (
        "all 10 examples failed"
        if max(of_handler, of_logger) == logging.WARNING
        else "[bettertogether 0:00] warning: all 10 examples failed"
    )
    assert file.getvalue().splitlines() == ["[bettertogether 0:00] start p", told]


def test_a_warning_goes_to_the_log_with_and_without_a_run(caplog: pytest.LogCaptureFixture) -> None:
    warn("100% of examples failed")
    assert caplog.messages == ["100% of examples failed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quiet": 1}, "quiet=1 is not allowed: give True or False"),
        ({"interval_s": "15"}, "interval_s='15' is not allowed: give seconds, 0 or more"),
        ({"interval_s": -1}, "interval_s=-1 is not allowed"),
        ({"interval_s": float("nan")}, "interval_s=nan is not allowed"),
        ({"interval_s": True}, "interval_s=True is not allowed"),
        ({"file": "log.txt"}, "file='log.txt' is not allowed: give an open text file"),
        ({"clock": 5}, "clock=5 is not allowed: give a function"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProgressDisplay(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (5, "callbacks=5 is not allowed: give a list of bettertogether.Callback objects"),
        ("ab", "callbacks='ab' is not allowed"),
        (ProgressDisplay(quiet=True), "is not allowed: give a list of bettertogether.Callback objects"),
        ([5], "callbacks[0]=5 is not allowed: give a bettertogether.Callback."),
        ([ProgressDisplay], "give a bettertogether.Callback (an object, not the class)"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught, listening(callbacks):
        pass
    assert message in str(caught.value)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def shown_run(file: io.StringIO, **options: Any) -> str:
    """Two steps with one pass of ten examples each, one example a second, then a report."""
    clock = Clock()
    scores = {"": (0.0, 1.0), "w": (1.0, 1.0)}
    records = []
    with listening([ProgressDisplay(file=file, interval_s=4, clock=clock, **options)]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        for index, step in enumerate(scores):
            emit("step_start", {"index": index, "step": step, "strategy": step})
            for done in range(1, 11):
                clock.now_s += 1
                emit("progress", {"phase": "score", "done": done, "total": 10, "tokens": 120})
            mean = sum(scores[step]) / 2
            record = StepRecord(index, step, step, "complete", mean, scores[step], ledger=Ledger(seconds=10))
            records.append(record)
            emit("step_end", {"record": record})
        emit("run_end", {"report": CompileReport(tuple(records), 1, 2, "w")})
    return file.getvalue()


def test_without_a_terminal_plain_lines_come_at_intervals_and_at_each_step() -> None:
    assert shown_run(io.StringIO()).splitlines() == [
        "[bettertogether 0:00] start w",
        "[bettertogether 0:00] step 1 of 2 (student) starts",
        "[bettertogether 0:04] step 1 of 2 (student): score 4/10, 120 tokens/s, about 0:06 left in this phase",
        "[bettertogether 0:08] step 1 of 2 (student): score 8/10, 120 tokens/s, about 0:02 left in this phase",
        "[bettertogether 0:10] step 1 of 2 (student) complete, score 0.500, 0:10",
        "[bettertogether 0:10] step 2 of 2 (w) starts",
        "[bettertogether 0:14] step 2 of 2 (w): score 4/10, 120 tokens/s, about 0:06 left in this phase, "
        "best so far 0.500 (student)",
        "[bettertogether 0:18] step 2 of 2 (w): score 8/10, 120 tokens/s, about 0:02 left in this phase, "
        "best so far 0.500 (student)",
        "[bettertogether 0:20] step 2 of 2 (w) complete, score 1.000, 0:10",
        "[bettertogether 0:20] done: w, score 1.000",
    ]


def test_quiet_shows_nothing() -> None:
    assert shown_run(io.StringIO(), quiet=True) == ""


def test_the_display_writes_to_stderr_not_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with listening([ProgressDisplay()]):
        emit("run_start", {"strategy": "p -> w", "rounds": ["", "p", "p -> w"]})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "start p -> w" in captured.err


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_the_start_names_the_directory_of_the_run(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    file = io.StringIO() if term == "dumb" else Terminal()
    with listening([ProgressDisplay(file=file, clock=lambda: 0.0)]):
        emit("run_start", {"strategy": "p", "rounds": ["", "p"], "run_dir": "/runs/1"})
    if term == "dumb":
        assert file.getvalue() == "[bettertogether 0:00] start p, run directory /runs/1\n"
    else:
        assert "  run directory /runs/1" in file.getvalue()


def test_the_time_left_of_the_run_is_told_once_every_kind_of_step_was_timed() -> None:
    clock, file = Clock(), io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=1, clock=clock)]):
        emit("run_start", {"strategy": "p -> p", "rounds": ["", "p", "p -> p"]})
        for index, seconds in enumerate([10, 60]):
            emit("step_start", {"index": index, "step": "p" if index else "", "strategy": "p" if index else ""})
            record = StepRecord(index, "p" if index else "", "p", "complete", ledger=Ledger(seconds=seconds))
            emit("step_end", {"record": record})
        assert "left in all" not in file.getvalue()
        emit("step_start", {"index": 2, "step": "p", "strategy": "p -> p"})
        clock.now_s += 15
        emit("progress", {"phase": "score", "done": 1, "total": 9})
    assert "about 0:45 left in all" in file.getvalue()


def test_of_auto_no_number_of_steps_and_no_time_left_in_all_is_told() -> None:
    clock, file = Clock(), io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=1, clock=clock)]):
        emit("run_start", {"strategy": "auto", "rounds": [""]})
        emit("step_end", {"record": StepRecord(1, "p", "p", "complete", ledger=Ledger(seconds=60))})
        emit("step_start", {"index": 2, "step": "p", "strategy": "p -> p"})
        clock.now_s += 10
        emit("progress", {"phase": "score", "done": 5, "total": 9})
    assert file.getvalue().splitlines()[-2:] == [
        "[bettertogether 0:00] step 3 (p -> p) starts",
        "[bettertogether 0:10] step 3 (p -> p): score 5/9, about 0:08 left in this phase",
    ]


def training_line(step: int, rewards: RewardLine | None = None) -> None:
    done: dict[str, Any] = {"step": step, "epoch": step / 8, "tokens": 1000 * step, "new_tokens": 1000}
    line = TrainingProgress(**done, total_steps=40, loss=1.0, validation_loss=None, learning_rate=1e-4)
    emit("training", {"progress": line} if rewards is None else {"progress": line, "rewards": rewards})


def test_of_a_training_that_goes_on_rate_and_time_left_are_those_of_this_sitting() -> None:
    clock, file = Clock(), io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=0, clock=clock)]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        for step in (20, 21, 22):
            clock.now_s += 10
            training_line(step)
    assert file.getvalue().splitlines()[1:] == [
        "[bettertogether 0:10] training 20/40, loss 1.000",
        "[bettertogether 0:20] training 21/40, 100 tokens/s, about 3:10 left in this phase, loss 1.000",
        "[bettertogether 0:30] training 22/40, 100 tokens/s, about 3:00 left in this phase, loss 1.000",
    ]


def test_a_step_of_learning_from_rewards_is_told_within_its_passes_over_examples() -> None:
    clock, file = Clock(), io.StringIO()
    with listening([ProgressDisplay(file=file, interval_s=0, clock=clock)]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        for step in (1, 2):
            clock.now_s += 10
            emit("progress", {"phase": f"step {step} of 40", "done": 8, "total": 8, "tokens": 1000})
            clock.now_s += 10
            training_line(step, rewards=RewardLine(step, reward=0.5, kept_groups=1, groups=2))
    assert file.getvalue().splitlines()[2::2] == [
        "[bettertogether 0:20] step 1 of 40 8/8, 50 tokens/s, loss 1.000, reward 0.500, 1 of 2 groups differ in reward",
        "[bettertogether 0:40] step 2 of 40 8/8, 50 tokens/s, loss 1.000, reward 0.500, 1 of 2 groups differ in reward",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_view_is_live_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown_run(Terminal())
    assert "\x1b[?25l" in text
    assert text.rstrip().endswith("done: w, score 1.000")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_in_a_terminal_the_cursor_comes_back_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    with contextlib.suppress(KeyboardInterrupt), listening([ProgressDisplay(file=file)]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        raise KeyboardInterrupt
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


def test_an_evaluation_alone_shows_how_far_it_is_and_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        evaluate(parity_program(parity_engine(learner)), numbers(4), parity_match)
    text = file.getvalue()
    assert "evaluate" in text
    assert "4/4" in text
    assert text.rstrip().endswith("] evaluate: 0.500 on 4 examples")


def test_without_a_terminal_an_evaluation_alone_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(parity_program(parity_engine(learner)), numbers(4), parity_match)
    assert capsys.readouterr().err == "[bettertogether 0:00] evaluate: 0.500 on 4 examples\n"


def test_an_evaluation_within_a_run_is_shown_by_the_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with listening([]):
        evaluate(parity_program(parity_engine(learner)), numbers(4), parity_match)
    assert capsys.readouterr().err == ""


def test_an_evaluation_can_be_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(parity_program(parity_engine(learner)), numbers(4), parity_match, progress=False)
    assert capsys.readouterr().err == ""


class Notebook:
    """What a notebook shows: each output in its last state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[str] = []
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
        monkeypatch.setattr("IPython.display.display", self._display)

    def _display(self, content: Any, *, raw: bool = False, display_id: bool = False, **options: Any) -> Any:
        self.outputs.append("")
        position = len(self.outputs) - 1

        def update(content: Any, raw: bool = False) -> None:
            self.outputs[position] = content["text/plain"]

        update(content if raw else content._repr_mimebundle_([], []))
        return SimpleNamespace(update=update)


def test_in_a_notebook_the_view_is_one_output_that_stays_with_the_result_below(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    notebook = Notebook(monkeypatch)
    with listening([ProgressDisplay()]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        emit("step_start", {"index": 0, "step": "", "strategy": ""})
        record = StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0), ledger=Ledger(seconds=10))
        emit("step_end", {"record": record})
        emit("run_end", {"report": CompileReport((record,), 0, 2, "w")})
    view, end = notebook.outputs
    assert [line.split() for line in view.splitlines()][1] == ["student", "0.500", "0:10", "complete"]
    assert end.strip() == "[bettertogether 0:00] done: student, score 0.500"


def test_in_a_notebook_a_display_with_a_file_writes_lines_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert shown_run(io.StringIO()).splitlines()[-1] == "[bettertogether 0:20] done: w, score 1.000"


def test_a_display_that_watches_a_second_run_shows_nothing_of_the_first() -> None:
    file, clock = io.StringIO(), Clock()
    with listening([ProgressDisplay(file=file, interval_s=1, clock=clock)]):
        for score in (1.0, 0.5):
            emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
            emit("step_start", {"index": 0, "step": "", "strategy": ""})
            clock.now_s += 5
            emit("progress", {"phase": "score", "done": 1, "total": 2, "tokens": 120})
            emit("step_end", {"record": StepRecord(0, "", "", "complete", score, (score,))})
    shown = [line for line in file.getvalue().splitlines() if "score 1/2" in line]
    assert len(shown) == 2
    assert "best so far" not in shown[1]
