"""The end of a run is told once, whatever way it ends, and MLflow's run ends the same way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import FakeMLflow, learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, Budget
from bettertogether.callbacks import Callback, MLflowCallback, RunEndEvent
from bettertogether.errors import TooManyErrors


class Step(Teleprompter):
    """Returns the student, or raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        if self._error is not None:
            raise self._error
        return student


class Watch(Callback):
    """The ends that were told, and whether the callback was closed after them."""

    def __init__(self) -> None:
        self.ends: list[RunEndEvent] = []
        self.closed_after = -1

    def on_run_end(self, event: RunEndEvent) -> None:
        self.ends.append(event)

    def close(self) -> None:
        self.closed_after = len(self.ends)


def no_answer_key(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    raise KeyError("gold")


def interrupts(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    raise KeyboardInterrupt


class Ending(NamedTuple):
    """A run that ends in one way, and how that is told."""

    error: str | None
    status: str
    raised: type[BaseException] | None = None
    """None where compile returns, and so the end comes with a report."""
    step: Callable[[], Step] = Step
    metric: Callable[..., float] = parity_match
    options: Mapping[str, Any] = MappingProxyType({})


ENDINGS = {
    "complete": Ending(None, "FINISHED"),
    "step failed": Ending("ValueError('x')", "FAILED", step=lambda: Step(ValueError("x"))),
    "step raised": Ending(
        "ValueError('x')", "FAILED", ValueError, lambda: Step(ValueError("x")), options={"on_step_error": "raise"}
    ),
    "student failed": Ending(
        "TooManyErrors(", "FAILED", TooManyErrors, metric=no_answer_key, options={"max_errors": 3}
    ),
    "Ctrl-C in a step": Ending("KeyboardInterrupt()", "KILLED", step=lambda: Step(KeyboardInterrupt())),
    "Ctrl-C at the student": Ending("KeyboardInterrupt()", "KILLED", KeyboardInterrupt, metric=interrupts),
    "budget at the student": Ending("BudgetExceeded(", "FAILED", options={"budget": Budget(metric_calls=5)}),
    "budget at a step": Ending("BudgetExceeded(", "FAILED", options={"budget": Budget(metric_calls=10)}),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_end_of_a_run_is_told_once_before_callbacks_are_closed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, watch, mlflow = ENDINGS[name], Watch(), FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)

    def run() -> None:
        BetterTogether(ending.metric, s=ending.step()).compile(
            parity_program(parity_engine(learner)),
            trainset=numbers(10, start=40),
            valset=numbers(10),
            strategy="s",
            run_dir=tmp_path / "run",
            callbacks=[watch, MLflowCallback()],
            progress=False,
            **ending.options,
        )

    if ending.raised is None:
        run()
    else:
        with pytest.raises(ending.raised):
            run()
    (end,) = watch.ends
    assert (end["report"] is None) is (ending.raised is not None)
    assert str(end["error"]).startswith(str(ending.error))
    assert watch.closed_after == 1
    assert [call for call in mlflow.calls if call[0] == "end_run"] == [("end_run", ending.status)]


def test_the_end_is_told_where_another_callback_raises_before_any_round(tmp_path: Path) -> None:
    class Strict(Callback):
        def on_warning(self, event: Any) -> None:
            raise ValueError(event["text"])

    watch = Watch()
    with pytest.raises(ValueError, match="The valset has 2 examples"):
        BetterTogether(parity_match, s=Step()).compile(
            parity_program(parity_engine(learner)),
            trainset=numbers(4),
            valset=numbers(2, start=40),
            strategy="s",
            run_dir=tmp_path / "run",
            callbacks=[watch, Strict()],
            progress=False,
        )
    (end,) = watch.ends
    assert (end["report"], watch.closed_after) == (None, 1)
