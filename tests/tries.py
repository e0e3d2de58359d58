"""Passes over numbers, for the tests of traces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy
from fakes import numbers, parity_match, parity_program

from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, Trace, TraceSet, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.rows import Row
from bettertogether.steps.rows_from_traces import RowOptions, TrainPrompt, rows_of_call
from bettertogether.testing import FakeEngine, FakeRequest

NO_MORE = Sampling(num_samples=0, rescue=False)


def collect(
    engine: FakeEngine,
    count: int = 6,
    sampling: Sampling = NO_MORE,
    metric: Any = parity_match,
    *,
    threshold: float | None = None,
    phase: str = "run",
    **settings: Any,
) -> TraceSet:
    options = ExamplePass(metric, threshold, RunSettings(**settings), phase)
    return collect_traces(parity_program(engine), numbers(count), options, sampling=sampling)


def call_rows(
    predictor: dspy.Predict, engine: FakeEngine, call: Call, train_prompt: TrainPrompt = "vanilla"
) -> Iterator[Row]:
    """The rows of a call of a run that passed."""
    trace = Trace(0, numbers(1)[0], None, (call,), Verdict(1.0, True), "student")
    return rows_of_call(predictor, engine, call, RowOptions(train_prompt=train_prompt), trace)


def at_most(max_errors: int) -> ExamplePass:
    return ExamplePass(parity_match, settings=RunSettings(max_errors=max_errors))


def attempts(traces: TraceSet) -> list[tuple[int, str, int, bool]]:
    return [(trace.index, trace.source, trace.attempt, trace.passed) for trace in traces.traces]


def sampled_only(request: FakeRequest, number: int) -> bool:
    """Knows even numbers at once, odd ones when sampled."""
    return number % 2 == 0 or request.temperature > 0
