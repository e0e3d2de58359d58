from __future__ import annotations

import math
from typing import Any

import dspy
import pytest
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether.errors import TooManyErrors
from bettertogether.evaluation import Evaluation, compare, evaluate, evaluate_many
from bettertogether.records import Ledger
from bettertogether.runs import RunStore
from bettertogether.testing import FakeEngine


def test_an_evaluation_has_a_score_of_every_example_in_order() -> None:
    result = evaluate(parity_program(parity_engine(lambda _, n: n != 1)), numbers(4), parity_match)
    assert result.scores == (1.0, 0.0, 1.0, 1.0)
    assert result.mean == 0.75


def test_every_example_is_run_and_scored_once() -> None:
    engine = parity_engine(lambda *_: True)
    result = evaluate(parity_program(engine), numbers(20), parity_match)
    assert len(engine.requests) == result.ledger.metric_calls == result.ledger.lm_calls == 20


def test_the_metric_is_given_no_trace() -> None:
    seen: list[Any] = []
    program = parity_program(parity_engine(lambda *_: True))
    evaluate(program, numbers(2), lambda e, p, trace="?": seen.append(trace) or 1)
    assert seen == [None, None]


@pytest.mark.parametrize("score", [85.0, -3.0, 0.25])
def test_scores_keep_the_metrics_unit(score: float) -> None:
    result = evaluate(parity_program(parity_engine(lambda *_: True)), numbers(2), lambda e, p, trace=None: score)
    assert result.scores == (score, score)


def test_a_prediction_with_score_and_feedback_is_a_score() -> None:
    metric = lambda e, p, trace=None: dspy.Prediction(score=0.5, feedback="half")  # noqa: E731
    result = evaluate(parity_program(parity_engine(lambda *_: True)), numbers(1), metric)
    assert result.scores == (0.5,)
    assert result.traces[0].verdict.feedback == "half"


def test_a_parse_failure_a_nan_and_a_raising_metric_score_zero() -> None:
    assert evaluate(parity_program(FakeEngine(lambda _: "no")), numbers(2), parity_match).scores == (0.0, 0.0)
    program = parity_program(parity_engine(lambda *_: True))
    assert evaluate(program, numbers(1), lambda e, p, trace=None: math.nan).scores == (0.0,)
    assert evaluate(program, numbers(1), lambda e, p, trace=None: 1 / 0).scores == (0.0,)


def test_more_errors_than_allowed_are_an_error_and_not_a_score() -> None:
    with pytest.raises(TooManyErrors, match="ZeroDivisionError"):
        evaluate(
            parity_program(parity_engine(lambda *_: True)), numbers(3), lambda e, p, trace=None: 1 / 0, max_errors=1
        )


def test_no_examples_have_no_mean() -> None:
    result = evaluate(parity_program(parity_engine(lambda *_: True)), [], parity_match)
    assert result.scores == ()
    assert math.isnan(result.mean)


def test_runs_of_the_store_are_used_again() -> None:
    engine, store = parity_engine(lambda *_: True), RunStore()
    for _ in range(2):
        result = evaluate(parity_program(engine), numbers(3), parity_match, store=store)
    assert len(engine.requests) == 3
    assert (result.ledger.lm_calls, result.ledger.metric_calls) == (0, 3)


def test_several_programs_are_evaluated_one_after_the_other() -> None:
    programs = [parity_program(parity_engine(lambda _, n, k=k: n < k)) for k in (1, 2)]
    assert [result.mean for result in evaluate_many(programs, numbers(2), parity_match)] == [0.5, 1.0]


def test_a_comparison_shows_means_intervals_and_paired_gains() -> None:
    text = compare({"base": Evaluation((0.0, 1.0, 0.0, 1.0), Ledger()), "new": Evaluation((1.0,) * 4, Ledger())})
    first, second = text.splitlines()
    assert first.startswith("base  0.500 [")
    assert second.startswith("new   1.000 [1.000, 1.000]   gain +0.500 [")
