"""Examples: what is asked of them, and what tells one from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dspy

from ..errors import DataError
from ..programs.content import example_content


def check_examples(examples: object, name: str) -> list[dspy.Example]:
    """A list of examples that say which fields are inputs. Raises DataError."""
    refuse_dataset(examples, name)
    if not isinstance(examples, Sequence) or isinstance(examples, str | bytes | Mapping):
        raise DataError(f"{name} must be a list of dspy.Example, got {type(examples).__name__}.")
    for position, example in enumerate(examples):
        if not isinstance(example, dspy.Example) or isinstance(example, dspy.Prediction):
            raise DataError(f"{name}[{position}] is a {type(example).__name__}: give a dspy.Example.")
        if not example._input_keys:
            raise DataError(
                f'{name}[{position}] does not say which fields are inputs: call `.with_inputs("question", ...)`.'
            )
        if not example.inputs():
            raise DataError(
                f"{name}[{position}] has no field {' or '.join(map(repr, sorted(example._input_keys)))}, which "
                f"`.with_inputs(...)` named: it has {sorted(example.keys())}."
            )
    return list(examples)


def refuse_dataset(examples: object, name: str) -> None:
    """Raise DataError for what the package `datasets` makes, which is told by its module, so that it need not be
    installed."""
    if type(examples).__module__.partition(".")[0] == "datasets":
        raise DataError(
            f"{name} is a datasets.{type(examples).__name__}, whose rows don't say which fields are inputs: give "
            'bettertogether.examples_from(dataset, inputs=["question", ...]).'
        )


def first_alike(examples: Sequence[dspy.Example]) -> list[int]:
    """For each example the position of the first that asks the same, as far as can be told."""
    first: dict[object, int] = {}
    return [first.setdefault(question_key(example), place) for place, example in enumerate(examples)]


def question_key(example: dspy.Example) -> object:
    """The same for examples of the same inputs, if all of their content can be seen."""
    return question_hash(example) or id(example)


def question_hash(example: dspy.Example) -> str | None:
    """A hash of an example's inputs; None where not all of their content can be seen."""
    content, all_seen = example_content(example.inputs())
    return content if all_seen else None


def example_key(example: dspy.Example) -> str:
    """A hash of an example's fields and of which of them are inputs."""
    return example_content(example)[0]
