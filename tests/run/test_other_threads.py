"""A run, and what works by itself, has nothing of what other threads do meanwhile: their settings, their work."""

from __future__ import annotations

import contextvars
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.dsp.utils.settings import main_thread_config
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import numbers, parity_engine, parity_match, parity_program, wait_for

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, evaluate
from bettertogether.callbacks import Callback, ProgressEvent, listening
from bettertogether.errors import RunDirectoryError

DATA: dict[str, Any] = {"trainset": numbers(8), "valset": numbers(8, start=20)}

AT_WORK: dict[str, Callable[[Any, dspy.Module], Any]] = {
    "a run": lambda metric, program: BetterTogether(metric).compile(program, strategy="p", progress=False, **DATA),
    "an estimate": lambda metric, program: BetterTogether(metric).estimate(program, **DATA),
    "a prompt step": lambda metric, program: BootstrapFewShotRS(metric).compile(program, **DATA),
    "a weight step": lambda metric, program: LoRAFinetune(metric).compile(program, **DATA),
    "an evaluation": lambda metric, program: evaluate(program, DATA["valset"], metric, progress=False),
    "rows": lambda metric, program: LoRAFinetune(metric).collect(program, **DATA),
}


@pytest.mark.parametrize("work", AT_WORK.values(), ids=AT_WORK)
def test_all_calls_are_made_under_the_adapter_that_was_set_at_the_beginning(
    work: Callable[[Any, dspy.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = parity_engine(lambda request, _: request.schema is not None)
    configure(monkeypatch, dspy.JSONAdapter())
    outside(work, configuring(monkeypatch), parity_program(engine))
    assert {request.schema is not None for request in engine.requests} == {True}


def test_an_adapter_that_was_set_meanwhile_is_none_that_the_run_itself_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = parity_program(parity_engine(lambda *_: True))
    metric = configuring(monkeypatch)

    def call() -> Any:
        options: dict[str, Any] = {"strategy": "p", "progress": False, "run_dir": tmp_path / "run"}
        return BetterTogether(metric).compile(program, **DATA, **options).report

    configure(monkeypatch, dspy.JSONAdapter())
    assert outside(call).prompt_adapter == "JSONAdapter"
    with pytest.raises(RunDirectoryError, match=r"adapter\.class: the directory has 'JSONAdapter'"):
        outside(call)


class Recorder(Callback):
    def __init__(self) -> None:
        self.told: list[ProgressEvent] = []

    def on_progress(self, event: ProgressEvent) -> None:
        self.told.append(event)


@pytest.mark.parametrize("work", AT_WORK.values(), ids=AT_WORK)
def test_a_run_is_told_nothing_of_work_in_another_thread(work: Callable[[Any, dspy.Module], Any]) -> None:
    recorder, done = Recorder(), list[Any]()

    def other() -> None:
        done.append(work(parity_match, parity_program(parity_engine(lambda *_: True))))

    thread = threading.Thread(target=other)
    with listening([recorder]):
        thread.start()
        thread.join()
    assert (recorder.told, len(done)) == ([], 1)


class CaughtUp(Teleprompter):
    """Works until another step of it `is_near`."""

    def __init__(self, is_near: Callable[[], bool]) -> None:
        self.metric = parity_match
        self.seed = None
        self.entered: list[int] = []
        self._is_near = is_near

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        self.entered.append(1)
        assert wait_for(lambda: len(self.entered) == 2 or self._is_near())
        self.metric(trainset[0], trainset[0])
        return student


def test_an_optimizer_that_two_runs_share_works_for_one_after_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    optimizer = CaughtUp(lambda: "CaughtUp is at work in another thread" in caplog.text)
    reports = {}

    def run(name: str) -> None:
        together = BetterTogether(parity_match, s=optimizer)
        program = parity_program(parity_engine(lambda *_: True))
        options: dict[str, Any] = {"strategy": "s", "seed": 0, "progress": False, "run_dir": tmp_path / name}
        reports[name] = together.compile(program, **DATA, **options).report

    thread = threading.Thread(target=run, args=("first",))
    thread.start()
    assert wait_for(lambda: optimizer.entered != [])
    run("second")
    thread.join()
    assert [reports[name].rounds[-1].ledger.metric_calls for name in ("first", "second")] == [1 + 8] * 2
    assert (optimizer.metric, optimizer.seed) == (parity_match, None)
    notes = [json.loads((tmp_path / name / "run.json").read_text())["run"]["optimizers"]["s"] for name in reports]
    assert notes[0] == notes[1]
    assert notes[0]["entered"] == "[]"


class Giving(Teleprompter):
    """Gives the student back."""

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        return student


def test_a_run_that_waits_for_an_optimizer_keeps_no_other_one_from_the_run_that_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    giving, entered = Giving(), threading.Event()

    class Nested(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            entered.set()
            assert wait_for(lambda: "Nested is at work in another thread" in caplog.text)
            return run("nested", "g", g=giving)

    def run(name: str, strategy: str, **optimizers: Teleprompter) -> dspy.Module:
        program = parity_program(parity_engine(lambda *_: True))
        together = BetterTogether(parity_match, **optimizers)
        return together.compile(program, **DATA, strategy=strategy, progress=False, run_dir=tmp_path / name)

    nested = Nested()
    threads = [
        threading.Thread(target=run, args=("first", "n"), kwargs={"g": giving, "n": nested}, daemon=True),
        threading.Thread(target=run, args=("second", "g -> n"), kwargs={"g": giving, "n": nested}, daemon=True),
    ]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def configure(monkeypatch: pytest.MonkeyPatch, adapter: dspy.Adapter) -> None:
    """As `dspy.configure` in the thread that may do so."""
    monkeypatch.setitem(main_thread_config, "adapter", adapter)


def configuring(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """A metric during which another adapter is configured."""

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        configure(monkeypatch, dspy.ChatAdapter())
        return parity_match(example, prediction)

    return metric


def outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it outside of the tests' own `dspy.context`."""
    return contextvars.Context().run(function, *arguments)
