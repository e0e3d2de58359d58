"""Which examples are learned from, and which are held out to score rounds on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import dspy

from ..errors import DataError
from ..rollouts.examples import check_examples, example_key
from ..rollouts.labels import stratified_split

FEW_EXAMPLES = 20
"""With fewer valset examples than this, a warning says how coarse the scores are."""


def split_valset(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, ratio: float, seed: int
) -> tuple[list[dspy.Example], list[dspy.Example], list[str]]:
    """Trainset, valset and warnings. Without a valset, one is drawn from the trainset at random by `seed`, stratified
    where labels repeat, `ratio` of it rounded up. Raises DataError."""
    train = check_examples(trainset, "trainset")
    if not train:
        raise DataError("trainset cannot be empty: give the examples to learn from.")
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise DataError(f"valset_ratio must be in range [0, 1), got {ratio!r}. Give 0 for no valset.")
    held_out = check_examples(valset, "valset") if valset is not None else []
    if not held_out:
        if ratio == 0 or len(train) < 2:
            return train, [], ["There is no valset: rounds are not scored, and the latest is returned."]
        held_out, train = stratified_split(train, min(math.ceil(ratio * len(train)), len(train) - 1), seed)
    warnings = _overlap(train, held_out)
    if len(held_out) < FEW_EXAMPLES:
        warnings.append(
            f"The valset has {len(held_out)} examples, so one of them is {100 / len(held_out):.0f}% of the score: "
            "give a larger valset, or a higher valset_ratio."
        )
    return train, held_out, warnings


def _overlap(train: Sequence[dspy.Example], held_out: Sequence[dspy.Example]) -> list[str]:
    known = {example_key(example) for example in train}
    shared = sum(example_key(example) in known for example in held_out)
    if not shared:
        return []
    return [
        f"{shared} of the valset's {len(held_out)} examples are in the trainset too: scores on them say little about "
        "new ones."
    ]
