"""Events reach the callbacks of their own run, from any thread, and MLflow's run holds what they say."""

from __future__ import annotations

import io
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import dspy
import pytest

from bettertogether.callbacks import Callback, MLflowCallback, ProgressDisplay, ProgressEvent, emit, listening
from bettertogether.errors import ConfigError, MissingExtraError
from bettertogether.records import Ledger, StepRecord
from bettertogether.report import CompileReport
from bettertogether.rollouts.parallel import parallel_map
from bettertogether.training.progress import TrainingProgress


class Recorder(Callback):
    def __init__(self) -> None:
        self.done: list[int] = []
        self.closed = 0

    def on_progress(self, event: ProgressEvent) -> None:
        self.done.append(event["done"])

    def close(self) -> None:
        self.closed += 1


class Broken(Callback):
    def on_progress(self, event: ProgressEvent) -> None:
        raise ZeroDivisionError("broken callback")


def progress(done: int) -> None:
    emit("progress", {"phase": "score", "done": done, "total": 9})


def interrupted_run(callback: Callback) -> None:
    def run() -> None:
        with listening([callback]):
            emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_an_event_without_listeners_goes_nowhere() -> None:
    progress(1)


def test_an_event_reaches_every_callback_of_the_block_and_none_after_it() -> None:
    first, second = Recorder(), Recorder()
    with listening([first, second]):
        progress(1)
    progress(2)
    assert first.done == second.done == [1]


def test_the_base_callback_takes_every_event_and_does_nothing() -> None:
    record = StepRecord(0, "", "", "complete")
    line = TrainingProgress(1, 1, 1.0, 0.5, None, 10, 1e-4)
    with listening([Callback()]):
        emit("run_start", {"strategy": "p", "rounds": ["", "p"]})
        emit("step_start", {"index": 0, "step": "", "strategy": ""})
        emit("candidate", {"number": 1, "total": None, "score": 0.5, "best_score": 0.5})
        progress(1)
        emit("training", {"progress": line})
        emit("warning", {"text": "all examples failed"})
        emit("step_end", {"record": record})
        emit("run_end", {"report": None})


def test_an_inner_block_adds_its_callbacks_and_a_callback_in_both_is_called_once() -> None:
    outer, inner = Recorder(), Recorder()
    with listening([outer]):
        with listening([outer, inner]):
            progress(1)
        progress(2)
    assert (outer.done, inner.done) == ([1, 2], [1])
    assert (outer.closed, inner.closed) == (1, 1)


def test_an_event_from_a_new_thread_reaches_the_only_run() -> None:
    recorder = Recorder()
    with listening([recorder]):
        in_thread(lambda: progress(1))
    assert recorder.done == [1]


def test_an_event_from_dspys_executor_reaches_the_run() -> None:
    recorder = Recorder()
    with listening([recorder]):
        dspy.Parallel(num_threads=3, disable_progress_bar=True)(
            [(lambda number: progress(number), {"number": number}) for number in range(6)]
        )
    assert sorted(recorder.done) == [0, 1, 2, 3, 4, 5]


def test_two_runs_in_two_threads_get_their_own_events_only() -> None:
    recorders = {0: Recorder(), 100: Recorder()}
    both_listen = threading.Barrier(2)

    def run(start: int) -> None:
        with listening([recorders[start]]):
            both_listen.wait(5)
            parallel_map(progress, range(start, start + 20), num_threads=4)
            both_listen.wait(5)

    threads = [threading.Thread(target=run, args=(start,)) for start in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(recorders[0].done) == list(range(20))
    assert sorted(recorders[100].done) == list(range(100, 120))


def test_an_event_that_could_belong_to_either_of_two_runs_is_dropped() -> None:
    first, second = Recorder(), Recorder()
    listens, go_on = threading.Event(), threading.Event()

    def other_run() -> None:
        with listening([second]):
            listens.set()
            go_on.wait(5)

    thread = threading.Thread(target=other_run)
    thread.start()
    with listening([first]):
        listens.wait(5)
        in_thread(lambda: progress(1))
        go_on.set()
        thread.join()
    assert (first.done, second.done) == ([], [])


def test_a_callback_is_never_called_by_two_threads_at_once() -> None:
    inside, most = 0, 0

    class Counting(Callback):
        def on_progress(self, event: ProgressEvent) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.002)
            inside -= 1

    with listening([Counting()]):
        parallel_map(progress, range(24), num_threads=8)
    assert most == 1


def test_what_a_callback_raises_surfaces_where_the_event_is_sent() -> None:
    with pytest.raises(ZeroDivisionError, match="broken callback"), listening([Broken()]):
        progress(1)


def test_what_a_callback_raises_in_a_worker_that_swallows_it_surfaces_at_the_end() -> None:
    def swallowing() -> None:
        with pytest.raises(ZeroDivisionError):
            progress(1)

    with pytest.raises(ZeroDivisionError, match="broken callback"), listening([Broken()]):
        in_thread(swallowing)


def test_an_error_of_an_inner_blocks_callback_that_is_handled_there_does_not_come_back_later() -> None:
    with listening([Recorder()]), pytest.raises(ZeroDivisionError), listening([Broken()]):
        progress(1)


def test_an_error_of_an_outer_blocks_callback_comes_back_even_when_an_inner_block_handles_it() -> None:
    outer, inner = listening([Broken()]), listening([Recorder()])
    with pytest.raises(ZeroDivisionError), outer, pytest.raises(ZeroDivisionError), inner:
        progress(1)


def test_callbacks_are_closed_after_an_interrupt() -> None:
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), listening([recorder]):
        raise KeyboardInterrupt
    assert recorder.closed == 1


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
        progress(1)
    assert "about 0:45 left in all" in file.getvalue()


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
    interrupted_run(ProgressDisplay(file=file))
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


class FakeMLflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, *arguments, *options.values()))

        return call


def test_mlflow_gets_params_scores_losses_and_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    record = StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0), ledger=Ledger(lm_calls=4, metric_calls=2))
    with listening([MLflowCallback(run_name="try")]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"], "params": {"seed": 1, "student": {"hops[0]": "QA"}}})
        emit("step_start", {"index": 1, "step": "w", "strategy": "w"})
        emit("training", {"progress": TrainingProgress(5, 9, 1.0, 0.25, None, 10, 1e-4), "adapter": "a@1"})
        emit("step_end", {"record": record})
        emit("run_end", {"report": CompileReport((record,), 0, 2, "w")})
    calls = [call for call in mlflow.calls if call[0] != "log_text"]
    metrics = {"score": 0.5, "seconds": 0.0, "lm_calls": 4.0, "metric_calls": 2.0, "tokens": 0.0}
    assert calls == [
        ("active_run",),
        ("start_run", "try"),
        ("log_params", {"strategy": "w", "seed": "1", "student.hops_0_": "QA"}),
        ("log_metrics", {"step_1/a_1/loss": 0.25, "step_1/a_1/learning_rate": 1e-4}, 5),
        ("log_metrics", metrics, 0),
        ("set_tag", "step_0", "student: complete"),
        ("log_metric", "selected", 0),
        ("log_metric", "selected_score", 0.5),
        ("end_run", "FINISHED"),
    ]


def test_an_interrupted_run_is_killed_in_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    interrupted_run(MLflowCallback())
    assert mlflow.calls[-1] == ("end_run", "KILLED")


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), ("ValueError('x')", "FAILED"), ("KeyboardInterrupt()", "KILLED")],
)
def test_the_mlflow_run_ends_as_the_run_did(error: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with listening([MLflowCallback()]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        emit("run_end", {"report": None, "error": error})
    assert [call for call in mlflow.calls if call[0] == "end_run"] == [("end_run", status)]


def test_a_run_name_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())
    with pytest.raises(ConfigError, match="run_name=5 is not allowed: give a text"):
        MLflowCallback(5)  # type: ignore[arg-type]


def test_without_mlflow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bettertogether\[mlflow\]'"):
        MLflowCallback()
