"""Which examples are learned from, and which are held out to score rounds on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import dspy

from ..errors import DataError
from ..records import count_text
from ..rollouts.examples import check_examples, question_key
from ..rollouts.labels import split_apart

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
    warnings, given = _overlap(train, held_out), bool(held_out)
    if not held_out and ratio:
        held_out, train = split_apart(train, math.ceil(ratio * len(train)), seed)
    if not held_out:
        return train, [], ["There is no valset: rounds are not scored, and the latest is returned."]
    if len(held_out) < FEW_EXAMPLES:
        size, one = count_text(len(held_out), "example"), "it" if len(held_out) == 1 else "one of them"
        warnings.append(
            f"The valset has {size}, so {one} is {100 / len(held_out):.0f}% of the score: "
            f"give a larger valset{'' if given else ', or a higher valset_ratio'}."
        )
    return train, held_out, warnings


def _overlap(train: Sequence[dspy.Example], held_out: Sequence[dspy.Example]) -> list[str]:
    known = {question_key(example) for example in train} if held_out else ()
    shared = sum(question_key(example) in known for example in held_out)
    if not shared:
        return []
    size, verb = count_text(len(held_out), "example"), "is" if shared == 1 else "are"
    return [f"{shared} of the valset's {size} {verb} in the trainset too: scores on them say little about new ones."]
