"""A round whose program is more than prompts and weights is never made again from its record: it is run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import Parity, numbers, parity_engine, parity_match, plain_lm, right
from parity_run import VAL

from bettertogether import BetterTogether
from bettertogether.testing import FakeEngine


class Alone(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity)

    def forward(self, number: int) -> dspy.Prediction:
        return self.p(number=number)


class Helped(dspy.Module):
    """Right where its predictor or a frozen module is, and everywhere once it is `sure`."""

    sure = False

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self.frozen, self.p = Alone(), dspy.Predict(Parity)
        self.set_lm(plain_lm(engine))
        self.frozen._compiled = True

    def forward(self, number: int) -> dspy.Prediction:
        said = {self.frozen(number=number).parity, self.p(number=number).parity}
        return dspy.Prediction(parity=right(number) if self.sure or right(number) in said else "unknown")


class Changes(Teleprompter):
    """A step that does something else to the program than to tell it more."""

    calls: int

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change, self.calls = change, 0

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        self.calls += 1
        self.change(student)
        return student


def is_sure(program: Any) -> None:
    program.sure = True


def is_configured(program: Any) -> None:
    program.p.config = {"temperature": 0.9}


def has_lm_options(program: Any) -> None:
    program.p.lm = program.p.lm.copy(temperature=0.9)


def has_frozen_demos(program: Any) -> None:
    program.frozen.p.demos = numbers(1, start=90)


def asks_another_engine(program: Any) -> None:
    program.p.lm = plain_lm(parity_engine(lambda *_: True, base_name="larger"))


def is_noted_on(program: Any) -> None:
    program.p.signature = program.p.signature.with_instructions("Even or odd?")
    program.notes = ["tried one"]


def compiled_with(change: Callable[[Any], None], run_dir: Path) -> tuple[dspy.Module, int]:
    """The compiled program, and how often its step was run."""
    engine, step = parity_engine(lambda request, _: bool(request.temperature > 0.5 or request.demos)), Changes(change)
    compiled = BetterTogether(parity_match, k=step).compile(
        Helped(engine), trainset=numbers(4, start=40), valset=VAL, strategy="k", run_dir=run_dir, progress=False
    )
    return compiled, step.calls


@pytest.mark.parametrize("change", [is_sure, is_configured, has_lm_options, has_frozen_demos, asks_another_engine])
def test_what_a_step_changed_besides_prompts_and_weights_is_there_after_the_same_call(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    for _ in range(2):
        compiled, calls = compiled_with(change, tmp_path)
        assert compiled.report.selected_round.score == 1.0
        assert dspy.Evaluate(devset=VAL, metric=parity_match, display_progress=False)(compiled).score == 100.0
        assert calls == 1


def test_notes_that_a_step_hangs_on_the_program_make_no_round_run_again(tmp_path: Path) -> None:
    assert [compiled_with(is_noted_on, tmp_path)[1] for _ in range(2)] == [1, 0]
