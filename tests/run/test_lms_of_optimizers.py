"""What LMs were asked in a step of another optimizer is told, whatever the optimizer makes of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.exceptions import LMServerError
from fakes import api_lm, learner, numbers, parity_engine, parity_match, parity_program
from foreign_optimizers import TRAIN, foreign

from bettertogether import BetterTogether
from bettertogether.report import CompileReport
from bettertogether.testing import FakeRequest

FAILED = (
    "(most often LMServerError: [local/api] no api_key='***'). The LM's service failed or was not reached: check "
    "it and the LM's api_base, or give the LM a higher num_retries or a longer timeout."
)


def refusing(times: int) -> dspy.LM:
    """An LM whose service answers after so many calls."""
    left = [None] * times

    def answer(request: FakeRequest) -> str:
        if not left:
            return "fine"
        left.pop()
        raise lm15.ServerError("no api_key='hunter2'")

    return api_lm(answer, num_retries=0)


class AsksAndGoesOn(Teleprompter):
    """Asks its LM so often, and returns the student whatever came."""

    def __init__(self, lm: dspy.LM, calls: int) -> None:
        super().__init__()
        self.lm, self.calls = lm, calls

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        student(number=1)
        for _ in range(self.calls):
            with suppress(LMServerError):
                self.lm("Go.")
        return student


def report_of(step: Teleprompter) -> CompileReport:
    compiled = BetterTogether(parity_match, x=step).compile(
        parity_program(parity_engine(learner)),
        trainset=TRAIN,
        valset=numbers(8, start=16),
        strategy="x",
        progress=False,
        num_threads=4,
    )
    report: CompileReport = compiled.report
    return report


@pytest.mark.parametrize(
    ("failed", "calls", "told"), [(0, 4, ()), (2, 4, ()), (3, 4, ("3 of 4",)), (4, 4, ("4 of 4",))]
)
def test_a_step_warns_of_a_model_of_whose_calls_more_than_half_failed(
    failed: int, calls: int, told: tuple[str, ...]
) -> None:
    report = report_of(AsksAndGoesOn(refusing(failed), calls))
    warnings = tuple(f"{counts} calls of local/api failed {FAILED}" for counts in told)
    assert (report.rounds[1].status, report.rounds[1].warnings) == ("complete", warnings)
    assert [text for text in report.warnings if "local/api" in text] == [f"x: {text}" for text in warnings]


def test_a_gepa_step_whose_reflection_is_refused_says_so() -> None:
    lm = refusing(10**6)
    record = report_of(foreign("GEPA", lm)).rounds[1]
    asked = len(lm.engine.fake.requests)
    assert record.warnings == (f"{asked} of {asked} calls of local/api failed {FAILED}",)
