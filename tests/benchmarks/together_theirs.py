"""The side of dspy in `together.py`: `dspy.BetterTogether` with dspy's own optimizers, over the same engine.

It tries as many demo sets as ours, of as many demos (dspy's own defaults, 16 sets with 16 labelled demos each, take
many times as long on two cores); rows have the demos that the prompt has, as is dspy's default; the provider trains
with this engine's defaults, as where a user gives no `train_kwargs`.
Mended for it, so that it runs at all: runs whose answer could not be parsed give no rows (dspy 3.4.1 counts them as
passed, and fails), failing examples do not end a step, and rows can be written with JSONAdapter, which both sides use.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import dspy
from dspy.teleprompt.bootstrap_trace import bootstrap_trace_data
from together_cell import tested
from together_results import Outcome
from together_tasks import Task

DEMO_SETS, DEMOS = 6, 3
"""The defaults of `BootstrapFewShotRS`. One of dspy's sets is the first traces in order, on top of those drawn."""


class TolerantFinetune(dspy.BootstrapFinetune):
    """DSPy's, without the runs whose answer could not be parsed."""

    def compile(self, student: dspy.Module, trainset: list[dspy.Example], teacher: Any = None) -> dspy.Module:
        """As dspy's, where an example that failed does not end the step."""
        tolerant = functools.partial(bootstrap_trace_data, raise_on_error=False)
        with mock.patch("dspy.teleprompt.bootstrap_finetune.bootstrap_trace_data", tolerant):
            return super().compile(student, trainset, teacher)

    def _prepare_finetune_data(self, trace_data: list[dict[str, Any]], *args: Any, **options: Any) -> Any:
        parsed = [data for data in trace_data if isinstance(data["prediction"], dspy.Prediction)]
        return super()._prepare_finetune_data(parsed, *args, **options)


class RowsWithJSON(dspy.JSONAdapter):
    """A JSONAdapter that can write rows, as ChatAdapter does."""

    format_finetune_data = dspy.ChatAdapter.format_finetune_data


def compile_theirs(
    metric: Callable[..., Any],
    student: dspy.Module,
    train: list[dspy.Example],
    val: list[dspy.Example],
    seed: int,
    demo_sets: tuple[int, int] = (DEMO_SETS, DEMOS),
) -> dspy.Module:
    """What `dspy.BetterTogether` returns. `demo_sets`: how many, of how many demos."""
    lm = student.predictors()[0].lm
    threads, errors = lm.engine.concurrency, 100 * (len(train) + len(val))
    dspy.configure(lm=lm, adapter=RowsWithJSON(), num_threads=threads, max_errors=errors)
    sets, demos = demo_sets
    optimizers = {
        "p": dspy.BootstrapFewShotWithRandomSearch(
            metric,
            max_bootstrapped_demos=demos,
            max_labeled_demos=demos,
            num_candidate_programs=sets - 1,
            num_threads=threads,
        ),
        "w": TolerantFinetune(metric, num_threads=threads),
    }
    return dspy.BetterTogether(metric, **optimizers).compile(
        student, trainset=train, valset=val, seed=seed, num_threads=threads, max_errors=errors
    )


def run_theirs(outcome: Outcome, task: Task, student: dspy.Module, data: tuple[list, list, list]) -> None:
    """Compile once, and test every round."""
    train, val, test = data
    lm = student.predictors()[0].lm
    started, before = time.monotonic(), lm.engine.counters()["requests"]
    compiled = compile_theirs(task.metric, student, train, val, outcome.cell.seed)
    outcome.keep(
        minutes=(time.monotonic() - started) / 60,
        lm_calls=lm.engine.counters()["requests"] - before,
        step_failed=compiled.flag_compilation_error_occurred,
        returned=compiled.candidate_programs[0]["strategy"],
        sizes=[len(train), len(val), len(test)],
    )
    for candidate in compiled.candidate_programs:
        key = tested(outcome, candidate["program"], task, test)
        outcome.data["rounds"][candidate["strategy"]] = {"val": candidate["score"] / 100, "test": key}
        outcome.keep()
