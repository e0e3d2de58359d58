"""Rows that a step is given, and so need not collect."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from ..checks import require
from ..errors import DataError, NoTrainingDataError
from ..programs.program import predictors_of
from .left_out import Dropped
from .rows import NO_EXAMPLE, Row, read_rows
from .rows_from_traces import Trainable

if TYPE_CHECKING:
    from .training_step import TrainingStep

FROZEN = "its predictor is not trained"


def given_rows(
    step: TrainingStep, student: dspy.Module, rows: Sequence[Row] | str | Path, trainable: Trainable
) -> tuple[tuple[Row, ...], Dropped]:
    """The rows that the step trains on, and those that it leaves out. Raises DataError, and NoTrainingDataError where
    none is left."""
    require(isinstance(rows, Sequence | Path), "rows", rows, "a list of rows, or a file of them")
    given = tuple(read_rows(rows) if isinstance(rows, str | Path) else rows)
    if not given:
        raise NoTrainingDataError("rows= is empty: give at least one row, or leave it out to collect them.")
    if any((row.rejected is not None) != step.learns_pairs for row in given):
        raise DataError(
            f"rows= are not all {'pairs, with a' if step.learns_pairs else 'without a'} rejected answer, which "
            f"{type(step).__name__} learns from: PreferenceFinetune learns pairs, LoRAFinetune rows."
        )
    names = predictors_of(student)
    allowed = {*names, ""} if step.multitask else {*names}
    unknown = sorted({row.predictor for row in given} - allowed, key=str)
    if unknown:
        unnamed = ', or leave "predictor" out' if step.multitask else "; with multitask=False each has to name one"
        raise DataError(f"rows= are for {unknown}: give the names of predictors, of {sorted(names)}{unnamed}.")
    trained = {"", *trainable}
    kept = tuple(row for row in given if row.predictor in trained)
    if not kept:
        others = sorted(names.keys() - trainable.keys())
        raise NoTrainingDataError(f"rows= are all for {others}, which are not trained: give some for {[*trainable]}.")
    left_out = Counter((row.predictor, FROZEN) for row in given if row.predictor not in trained)
    return tuple(_with_examples(kept)), left_out


def _with_examples(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows; to those that don't say of which example they are, each prompt is one of its own."""
    known = {row.prompt: row.example for row in rows if row.example != NO_EXAMPLE}
    numbers = itertools.count(max(row.example for row in rows) + 1)
    for row in rows:
        if row.example != NO_EXAMPLE:
            yield row
            continue
        prompt = row.prompt
        if prompt not in known:
            known[prompt] = next(numbers)
        yield replace(row, example=known[prompt])
