"""What a metric may return, and which score passes."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import dspy
import numpy as np
import pytest

from bettertogether.errors import ConfigError
from bettertogether.rollouts.metrics import Verdict, judge, require_metric, score_of, with_trace

EXAMPLE, PREDICTION = dspy.Example(a=1).with_inputs("a"), dspy.Prediction(b=2)


def verdict(value: Any, threshold: float | None = None) -> Verdict:
    return judge(lambda example, prediction, trace=None: value, EXAMPLE, PREDICTION, [], threshold)


@pytest.mark.parametrize("value", [True, 1, 1.0, dspy.Prediction(score=1.0), {"score": 1}, {"score": True}])
def test_the_full_mark_passes_without_a_threshold(value: Any) -> None:
    assert verdict(value) == Verdict(1.0, True)


@pytest.mark.parametrize("value", [False, 0, 0.3, 1e-9, 0.999998, -1.0, dspy.Prediction(score=0.0), {"score": 0.5}])
def test_less_than_the_full_mark_does_not_pass(value: Any) -> None:
    got = verdict(value)
    assert (got.passed, got.reason) == (False, "score below threshold")


@pytest.mark.parametrize(("value", "passed"), [(0.7, True), (0.5, True), (0.49, False), (True, True), (-2.0, False)])
def test_a_threshold_passes_scores_from_it_on(value: Any, passed: bool) -> None:
    assert verdict(value, 0.5).passed is passed


def test_the_parts_of_a_full_mark_need_not_sum_to_it_exactly() -> None:
    score = 0.6 + 0.3 + 0.1
    assert score < 1
    assert verdict(score) == Verdict(score, True)
    assert verdict(100 * score, 100) == Verdict(100 * score, True)


def test_a_full_mark_in_32_bits_may_be_above_one_or_below() -> None:
    a = np.array([0.3, 0.5, 0.7], dtype=np.float32)
    unit = a / np.linalg.norm(a)
    cosine = float(unit @ unit)
    assert cosine > 1
    assert verdict(cosine) == Verdict(cosine, True)
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    assert verdict(below) == Verdict(below, True)
    with pytest.raises(ConfigError, match="give threshold="):
        verdict(1.00001)


def test_a_negative_threshold_is_a_threshold() -> None:
    assert verdict(-1.0, -2.0) == Verdict(-1.0, True)


def test_a_threshold_of_zero_is_a_threshold() -> None:
    assert verdict(0.0, 0.0).passed is True


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 80.0, None])
def test_a_bool_passes_or_not_whatever_the_threshold(threshold: float | None) -> None:
    for true in (True, np.bool_(True), {"score": True}, dspy.Prediction(score=np.bool_(True))):
        assert verdict(true, threshold) == Verdict(1.0, True)
    for false in (False, np.bool_(False), {"score": False}, dspy.Prediction(score=np.bool_(False))):
        assert verdict(false, threshold) == Verdict(0.0, False, "score below threshold")


def test_nan_scores_zero_and_says_so() -> None:
    assert verdict(math.nan, -1.0) == Verdict(0.0, False, "metric returned NaN")


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_score_does_not_pass(value: float) -> None:
    got = verdict(value, 0.5)
    assert (got.score, got.passed) == (0.0, False)
    assert got.reason == f"metric returned {value}"


@pytest.mark.parametrize(
    "value",
    [None, "1.0", dspy.Prediction(score="1"), dspy.Prediction(feedback="x"), {}, {"accuracy": 1.0}, (1.0, "good"), 1j],
)
def test_what_is_no_score_is_a_type_error_that_shows_what_was_returned(value: Any) -> None:
    expected = f"the metric must return a bool, a number or Prediction(score=...), it returned {value!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        verdict(value)


def test_no_score_is_minus_zero() -> None:
    assert math.copysign(1, verdict(-1.0 * False).score) == 1


async def waits(example: Any, prediction: Any, trace: Any = None) -> float:
    return 1.0


class Waits:
    async def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0


@pytest.mark.parametrize("metric", [waits, functools.partial(waits, trace=None), Waits(), Waits().__call__])
def test_an_async_metric_is_an_error_before_any_work(metric: Any) -> None:
    with pytest.raises(ConfigError, match=r"is async.* give a plain function"):
        require_metric(metric)


def test_feedback_beside_a_score_changes_nothing() -> None:
    assert verdict(dspy.Prediction(score=0.2, feedback="too short")) == verdict(0.2)
    assert verdict({"score": 1.0, "feedback": 7}) == verdict(1.0)


def test_a_score_above_one_without_a_threshold_is_an_error_that_asks_for_one() -> None:
    with pytest.raises(ConfigError, match=r"returned 85.*give threshold="):
        verdict(85.0)


def test_a_score_above_one_with_a_threshold_is_judged_by_it() -> None:
    assert verdict(85.0, 80) == Verdict(85.0, True)


def test_no_metric_accepts_everything() -> None:
    assert judge(None, EXAMPLE, PREDICTION, None) == Verdict(1.0, True)


def test_a_metric_of_two_arguments_is_not_given_the_trace() -> None:
    assert with_trace(lambda example, prediction: (example, prediction))(EXAMPLE, PREDICTION, [1]) == (
        EXAMPLE,
        PREDICTION,
    )


def test_a_metric_of_three_arguments_is_given_the_trace() -> None:
    assert with_trace(lambda e, p, trace=None: trace)(EXAMPLE, PREDICTION, [1]) == [1]


def test_options_of_a_metric_keep_their_defaults() -> None:
    def metric(example: Any, pred: Any, trace: Any = None, tolerance: float = 0.1, strict: bool = True) -> Any:
        return trace, tolerance, strict

    assert with_trace(metric)(EXAMPLE, PREDICTION, "trace") == ("trace", 0.1, True)


def test_gepas_five_arguments_are_given_trace_and_two_nones() -> None:
    def metric(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
        return gold, pred, trace, pred_name, pred_trace

    assert with_trace(metric)(EXAMPLE, PREDICTION, [1]) == (EXAMPLE, PREDICTION, [1], None, None)


def test_keyword_only_extras_do_not_count_as_arguments() -> None:
    assert with_trace(lambda e, p, *, strict=False: strict)(EXAMPLE, PREDICTION, None) is False


def test_a_metric_with_star_args_is_given_three_arguments() -> None:
    assert len(with_trace(lambda *arguments: arguments)(EXAMPLE, PREDICTION, None)) == 3


def test_a_callable_object_and_a_bound_method_are_metrics() -> None:
    class Metric:
        def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
            return 0.5

        def method(self, example: Any, prediction: Any) -> float:
            return 0.25

    assert with_trace(Metric())(EXAMPLE, PREDICTION, None) == 0.5
    assert with_trace(Metric().method)(EXAMPLE, PREDICTION, None) == 0.25


class OfTwo(dspy.Module):
    def forward(self, example: Any, pred: Any) -> Any:
        return example, pred


class OfThree(dspy.Module):
    def forward(self, example: Any, pred: Any, trace: Any = None) -> Any:
        return example, pred, trace


def handed_on(metric: Any) -> Any:
    @functools.wraps(metric)
    def given(*arguments: Any) -> Any:
        return metric(*arguments)

    return given


@pytest.mark.parametrize("around", [lambda metric: metric, functools.partial, lambda metric: metric.forward])
def test_a_module_is_given_as_many_arguments_as_its_forward_takes(around: Any) -> None:
    assert with_trace(around(OfTwo()))(EXAMPLE, PREDICTION, [1]) == (EXAMPLE, PREDICTION)
    assert with_trace(around(OfThree()))(EXAMPLE, PREDICTION, [1]) == (EXAMPLE, PREDICTION, [1])


def test_a_decorated_or_partial_metric_is_given_what_the_one_inside_takes() -> None:
    assert with_trace(handed_on(lambda e, p: (e, p)))(EXAMPLE, PREDICTION, [1]) == (EXAMPLE, PREDICTION)
    of_one = functools.partial(lambda unit, e, p: (unit, e, p), 1)
    assert with_trace(of_one)(EXAMPLE, PREDICTION, [1]) == (1, EXAMPLE, PREDICTION)


def test_star_args_after_five_arguments_get_none() -> None:
    assert with_trace(lambda a, b, c, d, e, *rest: (c, d, e, rest))(EXAMPLE, PREDICTION, 0) == (0, None, None, ())


@pytest.mark.parametrize(
    "metric",
    [lambda example: 1.0, lambda a, b, c, d, e, f: 1.0, lambda a, b, c, d, e, f, *rest: 1.0, lambda a, b, *, c: 1],
)
def test_a_metric_that_takes_too_few_or_too_many_is_an_error(metric: Any) -> None:
    with pytest.raises(ConfigError, match="metric must take"):
        with_trace(metric)


def test_score_of_numpy_and_torch_like_numbers_is_their_float() -> None:
    import numpy as np

    assert score_of(np.float32(0.5)) == 0.5
    assert score_of(np.bool_(True)) == 1.0


def test_score_of_a_prediction_with_a_score_alone_is_that_score() -> None:
    assert score_of(dspy.Prediction(score=0.75)) == 0.75
