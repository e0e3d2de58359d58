"""The side of dspy in `together.py`: `dspy.BetterTogether` with dspy's own optimizers, over the same engine.

Settings are dspy's defaults: 16 demo sets of up to 4 bootstrapped and 16 labelled demos, rows with the demos that the
prompt has; what the provider trains with is this engine's own defaults, as where a user gives no `train_kwargs`.
Mended for it, so that it runs at all: unparseable answers are left out of the rows (dspy 3.4.1 counts them as passed,
and fails), and rows can be written with JSONAdapter, which both sides use.
"""

from __future__ import annotations

import time
from typing import Any

import dspy
from together_cell import THREADS, Outcome
from together_tasks import Task


class TolerantFinetune(dspy.BootstrapFinetune):
    """DSPy's, without the runs whose answer could not be parsed."""

    def _prepare_finetune_data(self, trace_data: list[dict[str, Any]], *args: Any, **options: Any) -> Any:
        parsed = [data for data in trace_data if isinstance(data["prediction"], dspy.Prediction)]
        return super()._prepare_finetune_data(parsed, *args, **options)


class RowsWithJSON(dspy.JSONAdapter):
    """A JSONAdapter that can write rows, as ChatAdapter does."""

    format_finetune_data = dspy.ChatAdapter.format_finetune_data


def run_theirs(outcome: Outcome, task: Task, student: dspy.Module, data: tuple[list, list, list]) -> None:
    """Compile once, and test every round."""
    train, val, test = data
    lm = student.predictors()[0].lm
    dspy.configure(lm=lm, adapter=RowsWithJSON(), num_threads=THREADS)
    optimizers = {
        "p": dspy.BootstrapFewShotWithRandomSearch(task.metric, num_threads=THREADS),
        "w": TolerantFinetune(task.metric, num_threads=THREADS),
    }
    started, before = time.monotonic(), lm.engine.counters()["requests"]
    compiled = dspy.BetterTogether(task.metric, **optimizers).compile(
        student,
        trainset=train,
        valset=val,
        seed=outcome.cell.seed,
        num_threads=THREADS,
        max_errors=len(train) + len(val),
    )
    outcome.keep(
        minutes=(time.monotonic() - started) / 60,
        lm_calls=lm.engine.counters()["requests"] - before,
        step_failed=compiled.flag_compilation_error_occurred,
        returned=compiled.candidate_programs[0]["strategy"],
        sizes=[len(train), len(val), len(test)],
    )
    for candidate in compiled.candidate_programs:
        key = outcome.tested(candidate["program"], task, test)
        outcome.data["rounds"][candidate["strategy"]] = {"val": candidate["score"] / 100, "test": key}
        outcome.keep()
