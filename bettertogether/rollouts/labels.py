"""Labels of examples, where labels repeat: what rows, demos and splits are balanced by."""

from __future__ import annotations

import enum
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import dspy
import numpy as np

from ..checks import plain, require_whole
from ..errors import ConfigError
from .examples import first_alike, refuse_dataset

MOST_LABELS = 50
_LABEL_TYPES = (str, int, enum.Enum, np.integer, np.bool_)

T = TypeVar("T")


def output_names(program: dspy.Module) -> set[str]:
    """The output fields of all of a program's predictors."""
    return {name for predictor in program.predictors() for name in predictor.signature.output_fields}


def label_fields(examples: Sequence[dspy.Example], outputs: Collection[str] = ()) -> list[str]:
    """Fields of the examples that are not inputs, in order; [] when the inputs were not declared. Where some are among
    `outputs`, those alone: the others (an id, a source, a difficulty) say nothing about the answer."""
    fields: dict[str, None] = {}
    for example in examples:
        for name, _ in example.labels().items():
            fields.setdefault(name)
    return [name for name in fields if name in outputs] or list(fields)


def label_value(example: dspy.Example, field: str) -> Any:
    """The value of a field; None where there is none, for which pandas has NaN."""
    value = example.get(field)
    return None if isinstance(value, float) and math.isnan(value) else value


def labels_of(
    examples: Sequence[dspy.Example], label_field: str | None = None, outputs: Collection[str] = ()
) -> list[str | None]:
    """A label for each example: the value of `label_field`, or of the first label field whose values repeat (at most
    50 distinct values, each seen twice on average); all None when there is none, as with free-text answers. `outputs`
    are the fields that the program answers. Raises ConfigError for a `label_field` that no example has."""
    candidates = [label_field] if label_field else label_fields(examples, outputs)
    if label_field and examples and not any(label_field in example for example in examples):
        raise ConfigError(f"label_field={label_field!r} is no field of the examples: they have {sorted(examples[0])}.")
    for field in candidates:
        values = [label_value(example, field) for example in examples]
        if not all(isinstance(value, _LABEL_TYPES) or value is None for value in values):
            continue
        distinct = {value for value in values if value is not None}
        if label_field or (1 < len(distinct) <= MOST_LABELS and 2 * len(distinct) <= len(examples)):
            return [None if value is None else str(value) for value in values]
    return [None] * len(examples)


def stratified_order(items: Sequence[T], labels: Sequence[str | None], seed: int) -> list[T]:
    """The items in a seeded random order in which every label is spread evenly, so that any head of it is a
    stratified sample. Without labels: a plain shuffle."""
    rng = random.Random(plain(seed))
    groups: dict[str | None, list[T]] = defaultdict(list)
    for item, label in zip(items, labels, strict=True):
        groups[label].append(item)
    placed: list[tuple[float, float, T]] = []
    for label in sorted(groups, key=str):
        members = groups[label]
        rng.shuffle(members)
        offset = rng.random()
        placed.extend(((rank + offset) / len(members), rng.random(), item) for rank, item in enumerate(members))
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def stratified_split(
    examples: Sequence[dspy.Example], first_size: int, seed: int, label_field: str | None = None
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Two disjoint parts, the first with `first_size` examples (all, where there are no more), each in a seeded random
    order and, where labels repeat, with the same shares of them. `label_field` holds the label; None finds it. Raises
    DataError and ConfigError."""
    refuse_dataset(examples, "examples")
    require_whole("first_size", first_size, 0, meaning="a number of examples, such as 100")
    order = stratified_order(list(range(len(examples))), labels_of(examples, label_field), seed)
    return [examples[i] for i in order[:first_size]], [examples[i] for i in order[first_size:]]


def split_apart(
    examples: Sequence[dspy.Example], first_size: int, seed: int
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """`stratified_split` into parts of which none asks what the other does: the first has `first_size` examples, or
    fewer where those that ask the same don't fit. Neither is empty, unless all ask the same: then the first is."""
    groups: dict[int, list[dspy.Example]] = {}
    for example, place in zip(examples, first_alike(examples), strict=True):
        groups.setdefault(place, []).append(example)
    order = stratified_order(list(groups.values()), labels_of([group[0] for group in groups.values()]), seed)
    first: list[list[dspy.Example]] = []
    rest: list[list[dspy.Example]] = []
    count = 0
    for group in order:
        fits = count + len(group) <= first_size
        (first if fits else rest).append(group)
        count += len(group) * fits
    if first and not rest:
        rest.append(first.pop())
    if not first and first_size and len(rest) > 1:
        first.append(rest.pop(min(range(len(rest)), key=lambda number: len(rest[number]))))
    return list(itertools.chain(*first)), list(itertools.chain(*rest))
