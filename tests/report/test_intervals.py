"""Bootstrap intervals hold the truth as often as they say, and paired ones are narrower."""

from __future__ import annotations

import math
import random
from statistics import NormalDist
from typing import Any

import pytest

from bettertogether.errors import ConfigError, DataError
from bettertogether.records import CELLS
from bettertogether.report.intervals import (
    _expanded_tail,
    attribution,
    mean_interval,
    paired_interval,
    share_interval,
)


def uneven_scores() -> list[float]:
    generator = random.Random(3)
    return [generator.random() for _ in range(40)]


def test_the_interval_of_a_mean_encloses_the_mean_and_stays_between_the_scores() -> None:
    low, high = mean_interval([0, 1] * 50)
    assert 0 < low < 0.5 < high < 1


def test_the_same_arguments_give_the_same_interval_and_another_seed_another_one() -> None:
    scores = uneven_scores()
    assert mean_interval(scores) == mean_interval(scores)
    assert mean_interval(scores) != mean_interval(scores, seed=1)


def test_a_wider_confidence_gives_a_wider_interval() -> None:
    scores = uneven_scores()
    low_90, high_90 = mean_interval(scores, confidence=0.9)
    low_99, high_99 = mean_interval(scores, confidence=0.99)
    assert low_99 < low_90 < high_90 < high_99


def test_the_interval_agrees_with_students_t_on_many_normal_scores() -> None:
    generator = random.Random(0)
    scores = [generator.gauss(5.0, 2.0) for _ in range(400)]
    mean = sum(scores) / 400
    half = 1.966 * math.sqrt(sum((s - mean) ** 2 for s in scores) / 399 / 400)
    low, high = mean_interval(scores, resamples=20_000)
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)


def test_of_few_scores_more_is_cut_off_by_students_t_and_the_deviation_of_a_sample() -> None:
    assert _expanded_tail(0.025, 10) == pytest.approx(NormalDist().cdf(-2.262157 * (10 / 9) ** 0.5), rel=2e-3)
    # One right of ten or none is 0.0107 of the resamples: beyond that tail, and within 0.025.
    assert mean_interval([0, 1] * 5, resamples=200_000) == (0.1, 0.9)


def test_there_are_as_many_resamples_as_asked_for() -> None:
    low, high = mean_interval(uneven_scores(), resamples=1)
    assert low == high


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_fewer_than_two_examples_have_an_unknown_interval(scores: list[float]) -> None:
    low, high = mean_interval(scores)
    assert math.isnan(low)
    assert math.isnan(high)


def test_of_scores_that_are_all_right_or_all_wrong_so_many_others_may_be_unseen_as_clopper_and_pearson_say() -> None:
    assert mean_interval([1.0] * 12) == pytest.approx((0.7354, 1.0), abs=1e-4)
    assert mean_interval([0.0] * 12) == pytest.approx((0.0, 0.2646), abs=1e-4)


def test_zeros_and_ones_are_no_ends_of_another_metric() -> None:
    assert mean_interval([0.0] * 12, ends_at_one=False) == (0.0, 0.0)
    assert mean_interval([1.0] * 12, ends_at_one=False) == (1.0, 1.0)
    assert paired_interval([1] * 4, [0] * 4, ends_at_one=False) == (1.0, 1.0)
    cells = {cell: [float("tuned" in cell)] * 4 for cell in CELLS}
    weights = attribution(cells, ends_at_one=False).weights
    assert (weights.low, weights.high) == (1.0, 1.0)


def test_that_few_examples_all_gain_is_no_certain_gain() -> None:
    assert paired_interval([1] * 4, [0] * 4) == pytest.approx((1 - 2 * 0.6024, 1.0), abs=1e-4)
    assert paired_interval([0] * 40, [1] * 40) == pytest.approx((-1.0, 2 * 0.0881 - 1), abs=1e-4)


@pytest.mark.parametrize("gain", [0, 0.25, 1, 35])
def test_other_differences_that_all_have_give_an_interval_without_width(gain: float) -> None:
    assert paired_interval([50 + gain, 60 + gain, 60 + gain], [50, 60, 60]) == (gain, gain)


def test_a_paired_gain_is_surer_than_the_two_means_apart() -> None:
    baseline = [float(i % 2) for i in range(60)]
    scores = [value + (0.1 if i % 3 else 0.0) for i, value in enumerate(baseline)]
    low, high = paired_interval(scores, baseline)
    mean_low, mean_high = mean_interval(scores)
    assert 0 < low < high
    assert high - low < (mean_high - mean_low) / 3


def test_nominal_95_percent_intervals_hold_the_truth_in_about_95_percent_of_samples() -> None:
    generator = random.Random(0)
    hits = 0
    for sample in range(300):
        differences = generator.choices([-1.0, 0.0, 1.0], [0.1, 0.6, 0.3], k=25)
        low, high = mean_interval(differences, seed=sample, resamples=600)
        hits += low <= 0.2 <= high
    assert 0.92 <= hits / 300 <= 0.98


def test_scores_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="2 scores and 3 baseline scores"):
        paired_interval([1, 0], [1, 0, 1])


def test_a_score_that_is_not_finite_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"scores\[1\] is nan"):
        mean_interval([0.0, math.nan])


@pytest.mark.parametrize("options", [{"confidence": 95}, {"resamples": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        mean_interval([0, 1], **options)


def test_attribution_splits_a_gain_into_parts_that_add_up() -> None:
    split = attribution(
        {
            "base_old": [0, 0, 0, 1],
            "base_new": [1, 0, 0, 1],
            "tuned_old": [0, 1, 1, 1],
            "tuned_new": [1, 1, 1, 1],
        }
    )
    assert (split.weights.gain, split.prompts.gain, split.interaction.gain) == (0.5, 0.25, 0.0)
    assert split.total.gain == 0.75
    assert split.total.low <= 0.75 <= split.total.high


def test_attribution_names_a_missing_cell() -> None:
    with pytest.raises(DataError, match="tuned_new"):
        attribution({"base_old": [0], "base_new": [0], "tuned_old": [0]})


def test_attribution_refuses_cells_on_different_examples() -> None:
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        attribution({"base_old": [0, 1], "base_new": [0], "tuned_old": [0], "tuned_new": [0]})


@pytest.mark.parametrize("scores", ["abc", ["x"], [None, "a"], [{}], [[1.0], [1.0, 2.0]]], ids=repr)
def test_what_is_no_list_of_numbers_is_refused(scores: Any) -> None:
    with pytest.raises(DataError, match="scores"):
        mean_interval(scores)


@pytest.mark.parametrize("options", [{"confidence": "x"}, {"confidence": None}, {"resamples": 1.5}, {"seed": "x"}])
def test_options_of_a_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        mean_interval([0.0, 1.0], **options)


def test_the_interval_of_a_share_is_wilsons_and_none_of_few_is_not_certain() -> None:
    assert share_interval(6, 8) == pytest.approx((0.4093, 0.9285), abs=1e-4)  # statsmodels' proportion_confint
    assert share_interval(6, 8, confidence=0.9) == pytest.approx((0.4602, 0.9135), abs=1e-4)
    assert share_interval(0, 4) == pytest.approx((0.0, 0.4899), abs=1e-4)
    assert all(map(math.isnan, share_interval(0, 0)))
