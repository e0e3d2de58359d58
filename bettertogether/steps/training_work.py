"""What a weight step would do: tries for rows, and their training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from ..training.auto import auto_epochs
from ..training.length import RunLength
from .rows import read_rows
from .step import StepContext
from .work import ExpectedTries, Outlook, Work

if TYPE_CHECKING:
    from .training_step import TrainingStep


def training_work(step: TrainingStep, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work:
    """The work of the step as the outlook has it."""
    if context.rows is not None:
        given = read_rows(context.rows) if isinstance(context.rows, str | Path) else context.rows
        held_out = step.validation_share * len(given)
        return _training(step, len(given) - held_out, held_out, outlook)
    measured = step.measured(context.trainset, context.valset or (), context.settings.seed or 0)
    own, rows = _tried(step, student, context.trainset, context, outlook, outlook.known)
    if measured:
        apart, held_out = _tried(step, student, measured, context, outlook, float(outlook.is_scored))
        return own + apart + _training(step, rows, held_out, outlook)
    held_out = step.validation_share * rows if step.training.keep_best else 0.0
    return own + _training(step, rows - held_out, held_out, outlook)


def _tried(
    step: TrainingStep,
    student: dspy.Module,
    examples: Sequence[dspy.Example],
    context: StepContext,
    outlook: Outlook,
    known: float,
) -> tuple[Work, float]:
    """The runs on some examples, of which a share is known, and the rows that they give."""
    tries = ExpectedTries.of(student, examples, outlook, len(context.teachers))
    step.sampling.carry_out(tries)
    learned = tries.solved if outlook.learned is None else outlook.learned * len(examples)
    runs = tries.runs - (0 if context.teachers else known * len(examples))
    rows = max(1.0, step.rows_per_call * outlook.calls * learned)
    return Work.of_runs(runs, outlook, by_teacher=bool(context.teachers)), rows


def _training(step: TrainingStep, rows: float, held_out: float, outlook: Outlook) -> Work:
    training, most = step.training, step.training.epochs
    if isinstance(most, str):
        most = auto_epochs(math.ceil(rows), training.batch_size, held_out=held_out > 0)
    length = RunLength(training, most, math.ceil(rows), held_out > 0)
    share = training.form_share if step.shows_forms else 0.0
    if 0 < share < 1 and outlook.forms is not None:
        share = outlook.forms
    epochs = length.fewest_epochs + outlook.patience * (length.epochs - length.fewest_epochs)
    return Work(
        trained_rows=epochs * rows,
        form_batches=share * epochs * length.steps_per_epoch,
        # The reference judges each pair once.
        held_out_rows=(epochs + 1) * held_out + (rows + held_out if step.learns_pairs else 0),
        trainings=1,
    )
