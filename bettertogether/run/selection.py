"""Which round is returned, and which examples it is judged on. The rules are here and nowhere else.

Selection: the round with the highest mean score on the valset, the untouched student included, so that the result is
never worse on it than the student. Of rounds with equal means, the latest whose own step gave evidence of a gain on
other data (`StepRecord.step_gain` above zero: a prompt step's validation score rose, a weight step's held-out loss
fell); where none did, the earliest, since it is the simplest. A round in which every example failed has no say unless
all are so: its zeros are no scores. Without a valset nothing can be compared, and the
latest complete round is returned, as in `dspy.BetterTogether`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import dspy

from ..errors import DataError
from ..records import StepRecord
from ..rollouts.failures import all_failed
from ..rollouts.labels import stratified_split
from ..rollouts.rollout import example_key

FEW_EXAMPLES = 20
"""With fewer valset examples than this, a warning says how coarse the scores are."""

EQUAL = 1e-9
"""Means closer than this are equal: sums of the same scores in another order."""


def select(records: Sequence[StepRecord]) -> int:
    """Position of the round to return."""
    complete = [i for i, record in enumerate(records) if record.status == "complete"]
    scored = {i: records[i].score for i in complete if records[i].score is not None}
    if not scored:
        return complete[-1]
    scored = {i: score for i, score in scored.items() if not all_failed(records[i])} or scored
    best = max(score for score in scored.values() if score is not None)
    tied = [i for i, score in scored.items() if score is not None and score >= best - EQUAL]
    evident = [i for i in tied if (records[i].step_gain or 0.0) > 0]
    return evident[-1] if evident else tied[0]


def rank(records: Sequence[StepRecord], selected: int) -> list[int]:
    """Positions of the complete rounds, best first, the selected one at the head of its equals."""
    complete = [i for i, record in enumerate(records) if record.status == "complete"]
    return sorted(complete, key=lambda i: (i != selected, -_number(records[i].score), i))


def _number(score: float | None) -> float:
    return -math.inf if score is None else score


def still_gaining(records: Sequence[StepRecord], cycle: int) -> bool:
    """For strategy="auto": whether one of the last `cycle` rounds beat the best of those before it by more than the
    standard error of the paired difference."""
    complete = [record for record in records if record.status == "complete" and record.scores]
    if len(complete) <= cycle:
        return True
    for position in range(len(complete) - cycle, len(complete)):
        best_before = max(complete[:position], key=lambda record: record.score or 0.0)
        if _gain_above_noise(complete[position].scores or (), best_before.scores or ()):
            return True
    return False


def _gain_above_noise(scores: Sequence[float], before: Sequence[float]) -> bool:
    differences = [a - b for a, b in zip(scores, before, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return mean > math.sqrt(variance / n)


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
