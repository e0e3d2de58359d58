"""Examples: what is asked of them, and what tells one from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dspy

from ..errors import DataError
from ..programs.content import example_content


def check_examples(examples: object, name: str) -> list[dspy.Example]:
    """A list of examples that say which fields are inputs. Raises DataError."""
    if not isinstance(examples, Sequence) or isinstance(examples, str | bytes | Mapping):
        raise DataError(f"{name} must be a list of dspy.Example, got {type(examples).__name__}.")
    for position, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise DataError(f"{name}[{position}] is a {type(example).__name__}: give a dspy.Example.")
        if not example._input_keys:
            raise DataError(
                f'{name}[{position}] does not say which fields are inputs: call `.with_inputs("question", ...)`.'
            )
    return list(examples)


def example_key(example: dspy.Example) -> str:
    """A hash of an example's fields and of which of them are inputs."""
    return example_content(example)[0]
