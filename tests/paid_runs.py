"""Runs of a prompt step that something in them is paid for."""

from __future__ import annotations

from typing import Any

import dspy
from fakes import numbers

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget
from bettertogether.report import CompileReport

PRICE = 0.25
"""US dollars an answer: sums of it are exact."""


def report_within(dollars: float, program: dspy.Module, metric: Any) -> CompileReport:
    """Of a prompt step on 8 examples, scored on 8 others, that may cost so much."""
    compiled = BetterTogether(metric, p=BootstrapFewShotRS(metric)).compile(
        program,
        trainset=numbers(8),
        valset=numbers(8, 100),
        strategy="p",
        progress=False,
        budget=Budget(cost=dollars),
    )
    report: CompileReport = compiled.report
    return report
