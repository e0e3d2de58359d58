"""What a weight step would do: tries for rows, and their training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dspy

from ..rollouts.graded import are_few
from ..training.auto import auto_epochs
from ..training.length import RunLength
from .adapter_rows import adapter_key, held_out_count
from .given_rows import given_rows
from .step import StepContext
from .work import ExpectedTries, Outlook, Work

if TYPE_CHECKING:
    from .training_step import TrainingStep


def training_work(step: TrainingStep, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work:
    """The work of the step as the outlook has it."""
    seed, share = context.settings.seed or 0, step.validation_share if step.training.keep_best else 0.0
    trainable = step.trainable(student)
    if context.rows is not None:
        given, _ = given_rows(step, student, context.rows, trainable)
        splits = step.split_by_adapter(given, (), trainable, context.settings.seed).values()
        return sum((_training(step, len(rows), len(held_out), outlook) for rows, held_out in splits), Work())
    adapters = len({adapter_key(name, lm, step.multitask) for name, (_, lm) in trainable.items()})
    measured = step.measured(context.trainset, context.valset or (), seed)
    work, rows, examples = _tried(step, student, context.trainset, context, outlook, outlook.known)
    if measured:
        apart, held_out, _ = _tried(step, student, measured, context, outlook, float(outlook.is_scored))
        work += apart
    else:
        held_out = rows * held_out_count(round(examples), share) / max(1.0, examples)
        rows -= held_out
    if not context.teachers:
        work += Work(given=len(context.trainset), bare=0 if outlook.has_demos else len(context.trainset))
    return sum([_training(step, rows / adapters, held_out / adapters, outlook)] * adapters, work)


def _tried(
    step: TrainingStep,
    student: dspy.Module,
    examples: Sequence[dspy.Example],
    context: StepContext,
    outlook: Outlook,
    known: float,
) -> tuple[Work, float, float]:
    """The runs on some examples, of which a share is known, the rows that they give, and of how many examples."""
    tries = ExpectedTries.of(student, examples, outlook, len(context.teachers))
    step.sampling.carry_out(tries)
    learned = tries.solved if outlook.learned is None else outlook.learned * len(examples)
    if outlook.graded and are_few(tries.solved, len(examples), step.sampling.enough):
        learned = float(len(examples))
    runs = tries.runs if context.teachers else tries.unknown(known * len(examples))
    rows = max(1.0, step.rows_per_call * outlook.calls * learned)
    return Work.of_runs(runs, outlook, by_teacher=bool(context.teachers)), rows, learned


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
