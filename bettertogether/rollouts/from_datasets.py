"""Examples from a `datasets.Dataset`, as the hub has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from ..errors import DataError


def examples_from(
    dataset: Any, inputs: Sequence[str], *, columns: Mapping[str, str] | None = None, split: str | None = None
) -> list[dspy.Example]:
    """One example for each row of a `datasets.Dataset`, in order, with a field for each column.

    Args:
        dataset: A `datasets.Dataset`, or a `datasets.DatasetDict` with `split=`.
        inputs: Fields that the program is given; the others are labels. Leave columns out that are neither with
            `dataset.select_columns([...])`: labels are what a failed example is shown as a hint.
        columns: Fields that have another name than their column, field to column: `{"question": "query"}`.
        split: Which split of a `DatasetDict`.

    Class labels (`datasets.ClassLabel`, also in lists and structs) give their names, not their numbers; None where
    there is none.

    Raises DataError for what is no dataset, a split or column that is not there, a name that two columns would have,
    and one that `dspy.Example` has for a method of its own.

    Example:
        >>> gsm8k = datasets.load_dataset("openai/gsm8k", "main")
        >>> trainset = bettertogether.examples_from(gsm8k, inputs=["question"], split="train")
    """
    rows = _one_split(dataset, split)
    source = _columns_of_fields(rows.column_names, columns)
    inputs = _checked_inputs(inputs, source)
    return [
        dspy.Example(
            {field: _named(row[column], rows.features[column]) for field, column in source.items()}
        ).with_inputs(*inputs)
        for row in rows.with_format(None)
    ]


def _named(value: Any, feature: Any) -> Any:
    """A value with the names of its class labels."""
    if names := getattr(feature, "names", None):
        return names[value] if value is not None and value >= 0 else None
    if isinstance(value, list) and (of_each := getattr(feature, "feature", None)):
        return [_named(each, of_each) for each in value]
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {key: _named(each, feature[key]) for key, each in value.items()}
    return value


def _one_split(dataset: Any, split: str | None) -> Any:
    # Here, as the package takes a second to load.
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"split={split!r} is not in the dataset: give one of {list(dataset)}.")
        return dataset[split]
    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            f"dataset is a {type(dataset).__name__}, which may have no end: take rows of one split of it, "
            "datasets.Dataset.from_list(list(stream.take(1000)))."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"dataset is a {type(dataset).__name__}: give a datasets.Dataset, or a DatasetDict and split=.")
    if split is not None:
        raise DataError(f"split={split!r} was given, but the dataset is one split already: leave split= out.")
    return dataset


def _columns_of_fields(found: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """Field to column, in the order of the columns."""
    asked = {} if columns is None else columns
    if not isinstance(asked, Mapping):
        raise DataError(f"columns={columns!r} is not allowed: give a dict from a field to its column.")
    for field, column in asked.items():
        if column not in found:
            raise DataError(f"columns={{{field!r}: {column!r}}}: there is no such column, the dataset has {found}.")
        if field in found and field not in asked.values():
            raise DataError(
                f"Field {field!r} would be column {column!r}, but there is a column {field!r} too: leave that out with "
                f"dataset.remove_columns({field!r})."
            )
    renamed = set(asked.values())
    source = {**asked, **{column: column for column in found if column not in renamed}}
    for field, column in source.items():
        if hasattr(dspy.Example(), str(field)):
            raise DataError(
                f"Field {field!r} is not allowed: dspy.Example has an attribute of that name, so "
                f"example.{field} would not be the column. Give another name with "
                f"columns={{{field + '_'!r}: {column!r}}}."
            )
    return dict(sorted(source.items(), key=lambda pair: found.index(pair[1])))


def _checked_inputs(inputs: Sequence[str], source: Mapping[str, str]) -> Sequence[str]:
    if isinstance(inputs, str) or not isinstance(inputs, Sequence) or not inputs:
        raise DataError(f'inputs={inputs!r} is not allowed: give a list of field names, such as ["question"].')
    missing = [field for field in inputs if field not in source]
    if missing:
        raise DataError(
            f"inputs={list(inputs)}: there is no column {missing[0]!r}, the dataset has {sorted(source.values())}. "
            f"Where it has another name, give columns={{{str(missing[0])!r}: its name}}."
        )
    return inputs
