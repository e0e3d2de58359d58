"""Which round is returned. The rule is here and nowhere else.

It is the round with the highest mean score on the valset, the untouched student included, so that the result is never
worse on it than the student. Of rounds with equal means, the latest whose own step gave evidence of a gain on other
data (`StepRecord.step_gain` above zero: a prompt step's validation score rose, a weight step's held-out error fell
below that of the weights before), or, where a later one goes on from it with fewer demos, that one: the same weights
with shorter prompts. Where none did, the earliest, since it is the simplest. Noise is no tie: of rounds that differ by
less than it, the higher mean is still the better guess. A round in which every example failed has no say unless all are
so: its zeros are no scores. Without a valset nothing can be compared, and the latest complete round is returned, as in
`dspy.BetterTogether`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records import ARROW, StepRecord
from ..rollouts.failures import all_failed
from ..rollouts.metrics import EQUAL, reaches


def select(records: Sequence[StepRecord]) -> int:
    """Position of the round to return."""
    complete = _complete(records)
    scored = {i: records[i].score for i in complete if records[i].score is not None}
    if not scored:
        return complete[-1]
    scored = {i: score for i, score in scored.items() if not all_failed(records[i])} or scored
    best = max(score for score in scored.values() if score is not None)
    tied = [i for i, score in scored.items() if score is not None and reaches(score, best)]
    evident = [i for i in tied if (records[i].step_gain or 0.0) > EQUAL]
    return _simplest(records, evident[-1], tied) if evident else tied[0]


def _simplest(records: Sequence[StepRecord], evident: int, tied: Sequence[int]) -> int:
    """That round, or the one of the tied that goes on from it with the fewest demos."""
    before = records[evident].strategy + ARROW
    later = [i for i in tied if records[i].strategy.startswith(before)]
    return min((evident, *later), key=lambda i: _demos(records[i]))


def _demos(record: StepRecord) -> float:
    """Demos in the round's prompts; unknown is more than any."""
    if record.program is None:
        return math.inf
    return sum(len(predictor["demos"]) for predictor in record.program.values())


def rank(records: Sequence[StepRecord], selected: int) -> list[int]:
    """Positions of the complete rounds, best first, the selected one at the head of its equals."""
    complete = _complete(records)
    return sorted(complete, key=lambda i: (i != selected, -_number(records[i].score), i))


def _complete(records: Sequence[StepRecord]) -> list[int]:
    """Where not even the scoring of the untouched student came to an end, there is still the student."""
    return [i for i, record in enumerate(records) if record.status == "complete"] or [0]


def _number(score: float | None) -> float:
    return -math.inf if score is None else score
