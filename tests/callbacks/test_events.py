"""Events reach the callbacks of their own run, from any thread, and what a callback raises comes out."""

from __future__ import annotations

import json
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import callbacks
from bettertogether.callbacks import Callback, ProgressEvent, emit, listening
from bettertogether.records import StepRecord
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
    line = TrainingProgress(
        step=1, total_steps=1, epoch=1.0, loss=0.5, validation_loss=None, tokens=10, learning_rate=1e-4
    )
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


def test_the_example_of_a_callback_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = str(callbacks.__doc__).partition("::\n")[2].partition("`events` says")[0]
    program = parity_program(parity_engine(learner))
    given: dict[str, Any] = {"metric": parity_match, "program": program, "trainset": numbers(24)}
    exec(textwrap.dedent(text), given)
    lines = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    report = given["program"].report
    assert [line["score"] for line in lines if "score" in line] == [record.score for record in report.rounds]
    assert lines[-1] == {"selected": report.selected_round.name, "error": None}
