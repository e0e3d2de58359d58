"""What strategy="auto" runs next, and the sentence that it gives for it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.records import CELLS, DataCard, StepRecord, WeightDetails
from bettertogether.run.auto import NextStep, decide, kind_of
from bettertogether.testing import FakeEngine, FakeRequest

P, W = BootstrapFewShotRS(parity_match), LoRAFinetune(parity_match)


class Own(Teleprompter):
    """Neither a prompt step nor a weight step, as far as one can know."""

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        return student


def rounds(*passing: tuple[str, int], of: int = 10) -> list[StepRecord]:
    """A student and rounds, by step key and how many of ten examples pass: the same ones, and more."""
    return [
        StepRecord(i, key, key, "complete", score=n / of, scores=(1.0,) * n + (0.0,) * (of - n))
        for i, (key, n) in enumerate(passing)
    ]


def next_of(records: list[StepRecord], labelled: bool = True, max_rounds: int = 9, **optimizers: Teleprompter) -> str:
    return str(decide(records, optimizers or {"p": P, "w": W}, max_rounds=max_rounds, labelled=labelled))


def weights(passing: int, covered: int, rescued: int = 0, given: int = 0, **fields: Any) -> StepRecord:
    """A round of a weight step on rows of `covered` of 20 examples, one each, or on `given` rows."""
    sources = {"student": covered - rescued, "rescue": rescued, "given": given}
    card = DataCard({}, {}, sources, {}, {}, 0 if given else 20, covered, {}, {}, ())
    scores = (1.0,) * passing + (0.0,) * (10 - passing)
    details = WeightDetails(card, {}, ())
    return StepRecord(1, "w", "w", "complete", passing / 10, scores, details=details, **fields)


def test_kinds_are_known_by_class() -> None:
    class Mine(LoRAFinetune):
        pass

    kinds = {
        "weight": [W, Mine(), dspy.BootstrapFinetune()],
        "prompt": [P, dspy.LabeledFewShot(), dspy.BootstrapFewShot(), dspy.COPRO(metric=parity_match)],
        "other": [Own(), dspy.Ensemble()],
    }
    assert {kind: {kind_of(each) for each in optimizers} for kind, optimizers in kinds.items()} == {
        kind: {kind} for kind in kinds
    }


def test_a_prompt_step_is_first_where_the_student_passes_few_examples() -> None:
    expected = "p next: the untouched student passes 4 of 10 examples, few to learn from"
    assert next_of(rounds(("", 4)), w=W, p=P) == expected


def test_a_prompt_step_is_first_where_no_example_has_a_label() -> None:
    expected = "p next: no example has a label to rescue failed runs with"
    assert next_of(rounds(("", 5)), labelled=False, w=W, p=P) == expected


def test_else_the_step_that_was_given_first_is_first() -> None:
    assert next_of(rounds(("", 5)), w=W, p=P) == "w next: it was given first"
    assert next_of(rounds(("", 5)), p=P, w=W) == "p next: it was given first"


def test_a_run_passes_from_the_threshold_of_the_weight_step() -> None:
    half = [StepRecord(0, "", "", "complete", 0.5, (0.5,) * 10)]
    assert next_of(half, w=LoRAFinetune(parity_match, threshold=0.5), p=P) == "w next: it was given first"
    others: dict[str, Any] = {"v": LoRAFinetune(parity_match, threshold=0.9), "p": P}
    assert next_of(half, w=LoRAFinetune(parity_match, threshold=0.5), **others) == "w next: it was given first"
    assert next_of(half, w=W, p=P).startswith("p next: the untouched student passes 0 of 10")


def test_after_a_prompt_step_comes_a_weight_step() -> None:
    assert next_of(rounds(("", 2), ("p", 6))) == (
        "w next: p gained +0.400 [68%: +0.200, +0.600], and 6 of 10 examples pass, so there is more to learn from"
    )
    assert next_of(rounds(("", 2), ("p", 2))) == (
        "w next: p gained nothing beyond its noise (+0.000 [68%: +0.000, +0.000]), and no weights were trained on runs "
        "with these prompts yet"
    )
    assert next_of(rounds(("", 5), ("p", 6))).startswith(
        "w next: p gained nothing beyond its noise (+0.100 [68%: +0.000, "
    )
    assert next_of(rounds(("", 8), ("p", 2))).startswith("w next: p lost (-0.600 [68%: ")


def test_prompts_that_weights_were_trained_with_and_weights_that_were_searched_under_are_not_called_new() -> None:
    prompts: dict[str, Any] = {"self": {"demos": []}}
    student, w, p = (replace(each, program=prompts) for each in rounds(("", 5), ("w", 9), ("p", 9)))
    lost = "p gained nothing beyond its noise (+0.000 [68%: +0.000, +0.000])"
    assert next_of([student, w, p], v=W, w=W, p=P) == f"v next: {lost}, and a weight step's turn is next"
    new = replace(p, program={"self": {"demos": [{"number": 1}]}})
    assert next_of([student, w, new], v=W, w=W, p=P).endswith("no weights were trained on runs with these prompts yet")
    student, p, w = (replace(each, models={"self": "local/fake"}) for each in rounds(("", 2), ("p", 9), ("w", 9)))
    lost = "w gained nothing beyond its noise (+0.000 [68%: +0.000, +0.000])"
    assert next_of([student, p, w], w=W, p=P, q=P) == f"q next: {lost}, and a prompt step's turn is next"
    new = replace(w, models={"self": "local/fake@a"})
    assert next_of([student, p, new], w=W, p=P, q=P).endswith("no prompts were searched under these weights yet")


def test_gains_have_the_decimals_of_the_reports_scores() -> None:
    small = [
        replace(each, score=(each.score or 0) / 1000, scores=tuple(score / 1000 for score in each.scores or ()))
        for each in rounds(("", 2), ("w", 6))
    ]
    assert next_of(small, w=W) == "w next: w gained +0.000400 [68%: +0.000200, +0.000600]"


def test_after_a_weight_step_comes_a_prompt_step_where_the_2x2_says_that_prompts_matter() -> None:
    cells = {"base_old": (0.0,) * 10, "base_new": (1.0,) * 10, "tuned_old": (1.0,) * 10, "tuned_new": (0.0,) * 10}
    record = weights(8, covered=2, two_by_two=cells)
    assert next_of([*rounds(("", 2)), record]) == (
        "p next: under the tuned weights the prompts so far are worth -1.000 [68%: -1.000, -0.665]"
    )


def test_prompts_that_change_nothing_under_the_tuned_weights_are_no_reason_for_a_prompt_step() -> None:
    record = weights(8, covered=5, two_by_two=dict.fromkeys(CELLS, (1.0,) * 8 + (0.0,) * 2))
    assert next_of([*rounds(("", 2)), record]).startswith("w next: w gained +0.600 ")


def test_after_a_weight_step_that_gained_from_few_rows_comes_another() -> None:
    assert next_of([*rounds(("", 2)), weights(8, covered=5)]) == (
        "w next: w gained +0.600 [68%: +0.400, +0.800] from 5 of 20 examples, and 8 of 10 examples pass now, so fresh "
        "runs give more to learn from"
    )


def test_rescued_rows_are_not_the_programs_own() -> None:
    assert next_of([*rounds(("", 2)), weights(8, covered=20, rescued=15)]).startswith(
        "w next: w gained +0.600 [68%: +0.400, +0.800] from 20 of 20 examples (15 of 20 rows rescued with the label)"
    )


@pytest.mark.parametrize(
    "record",
    [weights(8, covered=10), weights(2, covered=2), weights(4, covered=8), weights(8, covered=0, given=5)],
    ids=["enough rows", "no gain", "no more pass than gave rows", "rows of the user"],
)
def test_after_any_other_weight_step_comes_a_prompt_step(record: StepRecord) -> None:
    found = next_of([*rounds(("", 2)), record])
    assert found.startswith("p next: w gained ")
    assert found.endswith("and no prompts were searched under these weights yet")


def test_auto_stops_when_every_step_had_a_turn_since_the_last_gain() -> None:
    assert next_of(rounds(("", 2), ("p", 6), ("w", 6), ("p", 6))) == (
        "stop: none of the last 2 rounds gained more than its noise"
    )
    assert next_of(rounds(("", 2), ("p", 2), ("w", 2))).startswith("stop: ")
    assert next_of(rounds(("", 2), ("p", 2), ("w", 6))).startswith("p next: ")
    assert next_of(rounds(("", 2), ("p", 2), ("w", 6), ("p", 6))).startswith("w next: ")


def test_auto_stops_where_no_score_could_be_higher() -> None:
    assert next_of(rounds(("", 2), ("p", 10))) == "stop: p has the full mark on the whole valset"
    assert next_of(rounds(("", 10))) == "stop: the untouched student has the full mark on the whole valset"
    assert next_of(rounds(("", 2), ("p", 10), ("w", 8))).startswith("stop: p has the full mark")
    rounded = StepRecord(0, "", "", "complete", 0.6 + 0.3 + 0.1, (0.6 + 0.3 + 0.1,) * 10)
    assert next_of([rounded]).startswith("stop: the untouched student has the full mark")
    assert next_of(rounds(("", 2), ("p", 9))).startswith("w next: ")


def test_the_full_mark_is_that_of_the_thresholds_and_unknown_where_a_score_is_above_one() -> None:
    engine = parity_engine(lambda request, number: True)

    def graded(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
        return 1.0 * parity_match(example, prediction)

    steps = {"p": BootstrapFewShotRS(graded, threshold=2.0), "w": LoRAFinetune(graded, threshold=2.0)}
    options: dict[str, Any] = {"trainset": numbers(20, start=40), "valset": numbers(10), "max_rounds": 1}
    report = (
        BetterTogether(graded, **steps)
        .compile(parity_program(engine), strategy="auto", progress=False, **options)
        .report
    )
    assert [record.step for record in report.rounds] == ["", "p"]
    full = rounds(("", 2), ("p", 10))
    assert decide(full, {"p": P, "w": W}, max_rounds=9, labelled=True, full_mark=math.inf).key == "w"


def test_a_gain_is_one_over_the_best_round_before_and_not_over_the_last() -> None:
    assert next_of(rounds(("", 8), ("p", 0), ("w", 8))).startswith("stop: ")


def test_auto_stops_after_max_rounds() -> None:
    assert next_of(rounds(("", 1), ("p", 4), ("w", 8)), max_rounds=2) == "stop: max_rounds=2 rounds were run"
    assert next_of(rounds(("", 1), ("p", 4)), max_rounds=2).startswith("w next: ")


def test_without_scores_every_step_has_one_turn() -> None:
    unscored = [StepRecord(i, key, key, "complete") for i, key in enumerate(("", "p", "w"))]
    assert [next_of(unscored[:count]) for count in (1, 2, 3)] == [
        "p next: it was given first",
        "w next: p is done, and no weights were trained on runs with these prompts yet",
        "stop: every step had its turn, and without a valset rounds can't be compared",
    ]


def test_a_single_step_goes_on_while_it_gains() -> None:
    assert next_of(rounds(("", 2), ("w", 6)), w=W) == "w next: w gained +0.400 [68%: +0.200, +0.600]"
    assert next_of(rounds(("", 2), ("w", 6), ("w", 6)), w=W) == "stop: the last round gained no more than its noise"


def test_steps_of_unknown_kind_take_turns() -> None:
    optimizers: dict[str, Any] = {"a": W, "b": Own(), "c": P}
    records = rounds(("", 0), ("a", 2), ("b", 4), ("c", 6))
    assert [next_of(records[:count], **optimizers)[0] for count in (1, 2, 3, 4)] == ["a", "b", "c", "a"]


def test_of_several_steps_of_a_kind_the_one_that_ran_the_longest_ago_is_next() -> None:
    optimizers: dict[str, Any] = {"p": P, "q": dspy.LabeledFewShot(), "w": W}
    records = rounds(("", 0), ("p", 2), ("w", 4), ("q", 6), ("w", 8))
    assert [next_of(records[:count], **optimizers)[0] for count in (1, 2, 3, 4, 5)] == ["p", "w", "q", "w", "p"]


def knows(request: FakeRequest, number: int) -> bool:
    """A quarter of the numbers, and a quarter more for every ten rows that the model was trained on."""
    return (number // 2) % 4 < 1 + request.trained_on // 10


def compile_(engine: FakeEngine, **options: Any) -> dspy.Module:
    p = BootstrapFewShotRS(parity_match, num_candidates=1, strengths=(), num_samples=0, rescue=False)
    w = LoRAFinetune(parity_match, num_samples=0, rescue=False)
    arguments: dict[str, Any] = {"trainset": numbers(40, start=40), "valset": numbers(24), "max_rounds": 8, **options}
    return BetterTogether(parity_match, p=p, w=w).compile(
        parity_program(engine), strategy="auto", progress=False, **arguments
    )


def test_a_run_says_why_in_its_records_its_report_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report = compile_(parity_engine(knows)).report
    assert [record.step for record in report.rounds] == ["", "p", "w", "w", "p", "w"]
    assert report.rounds[0].why == ""
    assert report.rounds[1].why == "the untouched student passes 6 of 24 examples, few to learn from"
    assert report.stopped == "p -> w -> w -> p -> w has the full mark on the whole valset"
    decisions = [NextStep(record.step, record.why) for record in report.rounds[1:]] + [NextStep(None, report.stopped)]
    logged = [line.getMessage() for line in caplog.records if line.name == "bettertogether.run.loop"]
    assert [line for line in logged if "next: " in line or "stop: " in line] == [f"{each}." for each in decisions]
    for record in report.rounds[1:]:
        assert f"{record.strategy}: {record.why[:40]}" in str(report)
    assert f"stop: {report.stopped}." in str(report)


def test_a_resumed_run_decides_the_same(tmp_path: Path) -> None:
    whole = compile_(parity_engine(knows), max_rounds=3).report
    engine, run_dir = parity_engine(knows), tmp_path / "run"
    for calls in (60, 150):
        compile_(engine, max_rounds=3, run_dir=run_dir, budget=Budget(metric_calls=calls))
    resumed = compile_(engine, max_rounds=3, run_dir=run_dir).report
    assert [(each.strategy, each.why, each.scores) for each in resumed.rounds] == [
        (each.strategy, each.why, each.scores) for each in whole.rounds
    ]
    assert resumed.stopped == whole.stopped
