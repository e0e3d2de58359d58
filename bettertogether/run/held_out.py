"""Which examples are learned from, and which are held out to score rounds on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import dspy

from ..errors import DataError
from ..programs.content import example_content
from ..rollouts.examples import check_examples
from ..rollouts.labels import stratified_split

FEW_EXAMPLES = 20
"""With fewer valset examples than this, a warning says how coarse the scores are."""


def split_valset(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, ratio: float, seed: int
) -> tuple[list[dspy.Example], list[dspy.Example], list[str]]:
    """Trainset, valset and warnings. Without a valset, one is drawn from the trainset at random by `seed`, stratified
    where labels repeat, `ratio` of it rounded up; examples of the same inputs stay together. Raises DataError."""
    train = check_examples(trainset, "trainset")
    if not train:
        raise DataError("trainset cannot be empty: give the examples to learn from.")
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise DataError(f"valset_ratio must be in range [0, 1), got {ratio!r}. Give 0 for no valset.")
    held_out = check_examples(valset, "valset") if valset is not None else []
    warnings = _overlap(train, held_out)
    if not held_out:
        held_out, train = _apart(train, ratio, seed)
    if not held_out:
        return train, [], ["There is no valset: rounds are not scored, and the latest is returned."]
    if len(held_out) < FEW_EXAMPLES:
        warnings.append(
            f"The valset has {len(held_out)} examples, so one of them is {100 / len(held_out):.0f}% of the score: "
            "give a larger valset, or a higher valset_ratio."
        )
    return train, held_out, warnings


def _apart(examples: list[dspy.Example], ratio: float, seed: int) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """The examples to hold out and the others."""
    alike: dict[object, list[dspy.Example]] = {}
    for example in examples:
        alike.setdefault(_inputs_key(example), []).append(example)
    if ratio == 0 or len(alike) < 2:
        return [], examples
    groups = {id(group[0]): group for group in alike.values()}
    firsts = [group[0] for group in groups.values()]
    parts = stratified_split(firsts, min(math.ceil(ratio * len(firsts)), len(firsts) - 1), seed)
    held_out, rest = ([each for first in part for each in groups[id(first)]] for part in parts)
    return held_out, rest


def _inputs_key(example: dspy.Example) -> object:
    """The same for examples that ask the same, as far as can be told."""
    content, all_seen = example_content(example.inputs())
    return content if all_seen else id(example)


def _overlap(train: Sequence[dspy.Example], held_out: Sequence[dspy.Example]) -> list[str]:
    known = {_inputs_key(example) for example in train} if held_out else ()
    shared = sum(_inputs_key(example) in known for example in held_out)
    if not shared:
        return []
    return [
        f"{shared} of the valset's {len(held_out)} examples are in the trainset too: scores on them say little about "
        "new ones."
    ]
