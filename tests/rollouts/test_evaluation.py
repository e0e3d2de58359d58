"""`evaluate` scores every example once and in order, and `compare` pairs two programs."""

from __future__ import annotations

import math
import threading
from typing import Any

import dspy
import pytest
from fakes import numbers, parity_engine, parity_match, parity_program, right, with_lm

from bettertogether.errors import ConfigError, DataError, ProgramError, TooManyErrors
from bettertogether.records import Ledger
from bettertogether.rollouts.evaluation import Evaluation, Evaluator, compare, evaluate
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.rollouts.settings import RunSettings
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

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = "?") -> float:
        seen.append(trace)
        return 1.0

    evaluate(program, numbers(2), metric)
    assert seen == [None, None]


@pytest.mark.parametrize("score", [85.0, -3.0, 0.25])
def test_scores_keep_the_metrics_unit(score: float) -> None:
    result = evaluate(parity_program(parity_engine(lambda *_: True)), numbers(2), lambda e, p, trace=None: score)
    assert result.scores == (score, score)


def test_a_prediction_with_score_and_feedback_is_a_score() -> None:
    metric = lambda e, p, trace=None: dspy.Prediction(score=0.5, feedback="half")  # noqa: E731
    result = evaluate(parity_program(parity_engine(lambda *_: True)), numbers(1), metric)
    assert result.scores == (0.5,)


def test_a_parse_failure_a_nan_and_a_raising_metric_score_zero() -> None:
    assert evaluate(parity_program(FakeEngine(lambda _: "no")), numbers(2), parity_match).scores == (0.0, 0.0)
    program = parity_program(parity_engine(lambda *_: True))
    assert evaluate(program, numbers(1), lambda e, p, trace=None: math.nan).scores == (0.0,)
    assert evaluate(program, numbers(1), lambda e, p, trace=None: 1 / 0).scores == (0.0,)


def test_code_that_a_metric_runs_may_exit() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        exec("raise SystemExit(1)" if example.number == 1 else "pass")
        return True

    result = evaluate(parity_program(parity_engine(lambda *_: True)), numbers(3), metric)
    assert (result.scores, [each.kind for each in result.failures]) == ((1.0, 0.0, 1.0), ["metric error"])


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
    engine, store = parity_engine(lambda *_: True), RolloutStore()
    for _ in range(2):
        result = evaluate(parity_program(engine), numbers(3), parity_match, store=store)
    assert len(engine.requests) == 3
    assert (result.ledger.lm_calls, result.ledger.metric_calls) == (0, 3)


def test_a_comparison_shows_means_intervals_and_paired_gains() -> None:
    text = compare({"base": Evaluation((0.0, 1.0, 0.0, 1.0), Ledger()), "new": Evaluation((1.0,) * 4, Ledger())})
    first, second = text.splitlines()
    assert first.startswith("base  0.500 [")
    assert second.startswith("new   1.000 [0.398, 1.000]   gain +0.500 [")


def test_a_comparison_takes_zeros_and_ones_for_ends_only_of_a_metric_from_0_to_1() -> None:
    percent = {"base": Evaluation((0.0,) * 12, Ledger()), "new": Evaluation((100.0,) * 12, Ledger())}
    assert compare(percent).splitlines()[0] == "base  0.0 [0.0, 0.0]"


def test_a_comparison_has_decimals_that_fit_the_largest_mean() -> None:
    text = compare({"base": Evaluation((0.0002,) * 2, Ledger()), "new": Evaluation((0.0004,) * 2, Ledger())})
    assert text.splitlines() == [
        "base  0.000200 [0.000200, 0.000200]",
        "new   0.000400 [0.000400, 0.000400]   gain +0.000200 [+0.000200, +0.000200]",
    ]
    assert repr(Evaluation((0.0002,), Ledger())) == "Evaluation(mean 0.000200 of 1 example)"


def test_programs_scored_together_have_the_scores_that_each_has_alone() -> None:
    def program(knows_multiples_of: int) -> dspy.Module:
        return parity_program(parity_engine(lambda _, number: number % knows_multiples_of == 0))

    programs = [program(1), program(2), program(3)]
    together = Evaluator(parity_match, RunSettings()).evaluate(programs, numbers(7), "score")
    assert [result.scores for result in together] == [
        evaluate(program, numbers(7), parity_match).scores for program in programs
    ]
    assert [result.ledger.metric_calls for result in together] == [7, 7, 7]


def test_programs_scored_together_are_in_flight_together() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def wait_for_the_other(*_: Any) -> bool:
        meeting.wait()
        return True

    programs = [parity_program(parity_engine(wait_for_the_other)) for _ in range(2)]
    results = Evaluator(parity_match, RunSettings(num_threads=2)).evaluate(programs, numbers(1), "score")
    assert [result.mean for result in results] == [1.0, 1.0]


def test_each_program_has_its_own_count_of_errors() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
        return 1 / example.number

    programs = [parity_program(parity_engine(lambda *_: True)) for _ in range(3)]
    results = Evaluator(metric, RunSettings(max_errors=1)).evaluate(programs, numbers(2), "score")
    assert [result.scores for result in results] == [(0.0, 1.0)] * 3


def test_no_examples_are_no_scores() -> None:
    programs = [parity_program(parity_engine(lambda *_: True))] * 2
    assert [result.scores for result in Evaluator(parity_match, RunSettings()).evaluate(programs, [], "score")] == [
        (),
        (),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"program": with_lm("openai/gpt-4o")}, ProgramError, "Predictor 'self' of the program has a str for its"),
        ({"program": 5}, ProgramError, "program=5 is not allowed: give a dspy.Module"),
        ({"program": dspy.Predict}, ProgramError, "is not allowed: give a dspy.Module"),
        ({"examples": 5}, DataError, "examples must be a list of dspy.Example, got int"),
        ({"examples": [5]}, DataError, "examples[0] is a int: give a dspy.Example"),
        ({"examples": [dspy.Prediction(a=1)]}, DataError, "examples[0] is a Prediction: give a dspy.Example"),
        ({"examples": [dspy.Example(number=1)]}, DataError, "examples[0] does not say which fields are inputs"),
        ({"metric": "exact"}, ConfigError, "metric='exact' is not allowed: give a function"),
        ({"metric": None}, ConfigError, "metric=None is not allowed: give a function"),
        ({"metric": lambda example: 1}, ConfigError, "metric must take (example, prediction)"),
        ({"num_threads": "x"}, ConfigError, "num_threads='x' is not allowed"),
        ({"num_threads": 0}, ConfigError, "num_threads=0 is not allowed"),
        ({"max_errors": -1}, ConfigError, "max_errors=-1 is not allowed"),
        ({"seed": "x"}, ConfigError, "seed='x' is not allowed"),
        (
            {"store": {}},
            ConfigError,
            "store={} is not allowed: give a bettertogether.rollouts.rollout.RolloutStore, or None",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(changed: dict[str, Any], error: Any, message: str) -> None:
    engine = parity_engine(lambda *_: True)
    arguments = {"program": parity_program(engine), "examples": numbers(2), "metric": parity_match} | changed
    with pytest.raises(error) as caught:
        evaluate(**arguments)
    assert message in str(caught.value)
    assert engine.requests == []


@pytest.mark.parametrize("evaluations", [5, {}, [], {"a": 0.5}, {1: Evaluation((1.0,), Ledger())}], ids=repr)
def test_what_is_no_dict_of_evaluations_is_refused(evaluations: Any) -> None:
    with pytest.raises(ConfigError, match="is not allowed: give a"):
        compare(evaluations)


def test_a_name_can_not_steer_the_terminal() -> None:
    assert compare({"a\x1b[2J": Evaluation((1.0,), Ledger())}).startswith(r"a\x1b[2J  1.000")


@pytest.mark.parametrize("others", [numbers(4, start=1), numbers(5), numbers(4)[::-1]])
def test_evaluations_of_other_examples_or_in_another_order_are_not_compared(others: list[dspy.Example]) -> None:
    program = parity_program(parity_engine(lambda *_: True))
    before, after = (evaluate(program, each, parity_match, progress=False) for each in (numbers(4), others))
    with pytest.raises(DataError, match=r"\['after'\] and evaluations\['before'\] are not of the same examples"):
        compare({"before": before, "after": after})


def test_what_a_metric_changes_of_its_arguments_changes_no_score_and_no_example() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        prediction.parity = prediction.parity[::-1]
        return bool(prediction.parity == example.accepted.pop()[::-1])

    examples = [dspy.Example(number=n, accepted=[right(n)]).with_inputs("number") for n in range(4)]
    program, store = parity_program(parity_engine(lambda _, n: n != 1)), RolloutStore()
    assert [evaluate(program, examples, metric, store=store).scores for _ in range(2)] == [(1.0, 0.0, 1.0, 1.0)] * 2
    assert [example.accepted for example in examples] == [["even"], ["odd"], ["even"], ["odd"]]
