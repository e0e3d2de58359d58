"""Which round is returned: the best score, then evidence, then the simplest."""

from __future__ import annotations

from typing import Any

from bettertogether.records import Failure, StepRecord
from bettertogether.run.selection import rank, select


def record(score: float | None = None, gain: float | None = None, status: Any = "complete") -> StepRecord:
    return StepRecord(0, "p", "p", status, score=score, step_gain=gain)


def test_the_highest_score_is_selected() -> None:
    assert select([record(0.5), record(0.7), record(0.6)]) == 1


def test_the_student_is_selected_when_nothing_beats_it() -> None:
    assert select([record(0.5), record(0.4), record(0.3, gain=1.0)]) == 0


def test_of_equals_the_latest_whose_step_gave_evidence_is_selected() -> None:
    assert select([record(0.5), record(0.5, gain=0.1), record(0.5, gain=0.2), record(0.5, gain=0.0)]) == 2


def with_demos(strategy: str, demos: int, gain: float | None = None) -> StepRecord:
    program: Any = {"self": {"demos": [{}] * demos}, "other": {"demos": []}}
    return StepRecord(0, "p", strategy, "complete", score=0.5, step_gain=gain, program=program)


def test_of_equals_one_that_goes_on_with_fewer_demos_is_selected() -> None:
    evident = with_demos("p -> w", 3, gain=0.1)
    fewer, more, elsewhere = with_demos("p -> w -> p", 1), with_demos("p -> w -> p", 4), with_demos("p -> w2", 0)
    unknown = StepRecord(0, "p", "p -> w -> p", "complete", score=0.5)
    assert select([evident, fewer, elsewhere]) == 1
    assert select([evident, more, elsewhere]) == select([evident, unknown, elsewhere]) == 0


def test_of_equals_without_evidence_the_simplest_is_selected() -> None:
    assert select([record(0.5), record(0.5, gain=0.0), record(0.5, gain=-1.0), record(0.5)]) == 0


def test_sums_in_another_order_are_equal() -> None:
    a, b = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1
    assert a != b
    assert select([record(b), record(a)]) == select([record(a), record(b)]) == 0
    assert select([record(0.5), record(0.5, gain=a - b)]) == 0


def test_a_round_in_which_every_example_failed_is_selected_over_none_that_has_scores() -> None:
    failures = (Failure("timeout", 2, "slow", "example 0"),)
    broken = StepRecord(0, "", "", "complete", 0.0, (0.0, 0.0), failures=failures)
    assert select([broken, record(0.0)]) == 1
    assert select([broken, broken]) == 0


def test_a_failed_or_skipped_round_is_never_selected() -> None:
    assert select([record(0.5), record(0.9, status="failed"), record(0.9, status="skipped")]) == 0


def test_where_even_the_student_was_not_scored_it_is_selected() -> None:
    assert select([record(status="skipped")]) == 0
    assert rank([record(status="skipped")], 0) == [0]


def test_without_scores_the_latest_complete_round_is_selected() -> None:
    assert select([record(), record(), record(status="failed")]) == 1


def test_negative_scores_are_compared_as_numbers() -> None:
    assert select([record(-2.0), record(-1.0), record(-3.0)]) == 1


def test_the_ranking_has_the_selected_round_first_then_by_score_then_the_earlier() -> None:
    records = [record(0.5), record(0.7), record(0.7, gain=1.0), record(0.6, status="failed"), record(0.5)]
    assert select(records) == 2
    assert rank(records, 2) == [2, 1, 0, 4]
