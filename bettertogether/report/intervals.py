"""How sure a score or a gain is: bootstrap intervals over examples, and the split of a gain into its causes.

All functions are deterministic given their arguments. An interval that can't be known (fewer than two examples) is
(nan, nan), with which every comparison is False.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ..checks import is_number, require, require_whole
from ..errors import DataError
from ..records import CELLS

if TYPE_CHECKING:
    import numpy as np

Interval = tuple[float, float]
"""Lower and upper end, in the metric's own unit."""

UNKNOWN: Interval = (math.nan, math.nan)

_CHUNK = 4_000_000


def within_one(scores: Iterable[Iterable[float]]) -> bool:
    """Whether all these scores are from 0 to 1, and so, as far as is known, what else their metric gives."""
    return all(0 <= score <= 1 for each in scores for score in each)


def mean_interval(
    scores: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    ends_at_one: bool = True,
) -> Interval:
    """Bootstrap interval of the mean of per-example scores. See `paired_interval`. Where all are 0 or all are 1 of a
    metric from 0 to 1 (`ends_at_one`) it is Clopper and Pearson's: [0.735, 1] of twelve."""
    lowest = 0.0 if ends_at_one else None
    return _bootstrap(_vector(scores, "scores"), lowest, confidence=confidence, seed=seed, resamples=resamples)


def paired_interval(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    *,
    confidence: float = 0.95,
    ends_at_one: bool = True,
) -> Interval:
    """Bootstrap interval of the mean gain over a baseline on the same examples, in the same order.

    Examples are resampled, each with its own difference, so what makes an example hard for both programs cancels
    out. Where all gain 1 or all lose 1, of a metric from 0 to 1 (`ends_at_one`), it says how many others there may be
    of which none shows; any other difference that all have gives an interval without width, and fewer than two
    examples give (nan, nan).
    Raises DataError when the lengths differ or a score is not finite.
    """
    new, old = _vector(scores, "scores"), _vector(baseline_scores, "baseline_scores")
    if len(new) != len(old):
        raise DataError(
            f"paired_interval got {len(new)} scores and {len(old)} baseline scores: give the scores of both programs "
            "on the same examples, in the same order."
        )
    lowest = -1.0 if ends_at_one and within_one((new, old)) else None
    return _bootstrap(new - old, lowest, confidence=confidence)


def share_interval(count: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share, such as of failures that were mended: one that none or all of few show is not
    certain, as a bootstrap of them would have it. (nan, nan) of none."""
    if not total:
        return UNKNOWN
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), count / total
    middle, width = share + z * z / (2 * total), z * math.sqrt((share * (1 - share) + z * z / (4 * total)) / total)
    return max(0.0, (middle - width) / (1 + z * z / total)), min(1.0, (middle + width) / (1 + z * z / total))


@dataclass(frozen=True)
class Effect:
    """A mean gain per example with its interval, in the metric's own unit."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Attribution:
    """Where a gain comes from. `weights`, `prompts` and `interaction` add up to `total`."""

    weights: Effect
    """Tuned weights with the student's prompts, over the student."""
    prompts: Effect
    """New prompts with the base weights, over the student."""
    interaction: Effect
    """What the two give together beyond the sum of each alone."""
    total: Effect
    """Tuned weights with new prompts, over the student."""


def attribution(two_by_two: Mapping[str, Sequence[float]], *, ends_at_one: bool = True) -> Attribution:
    """Split the gain of a program into weights, prompts and their interaction, from per-example scores of the 2x2.

    `two_by_two` has the keys of `CELLS`, each with one score per example, on the same examples in the same order;
    `ends_at_one` as in `paired_interval`. Raises DataError for a missing cell or unequal lengths.
    """
    missing = [cell for cell in CELLS if cell not in two_by_two]
    if missing:
        raise DataError(f"two_by_two lacks {missing}: give per-example scores for each of {list(CELLS)}.")
    base_old, base_new, tuned_old, tuned_new = (_vector(two_by_two[cell], cell) for cell in CELLS)
    lengths = {len(base_old), len(base_new), len(tuned_old), len(tuned_new)}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(
            f"two_by_two has cells of {sorted(lengths)} scores: score all four programs on the same examples."
        )
    lowest = -1.0 if ends_at_one and within_one((base_old, base_new, tuned_old, tuned_new)) else None

    def effect(differences: np.ndarray[Any, Any]) -> Effect:
        return Effect(float(differences.mean()), *_bootstrap(differences, lowest))

    return Attribution(
        weights=effect(tuned_old - base_old),
        prompts=effect(base_new - base_old),
        interaction=effect(tuned_new - tuned_old - base_new + base_old),
        total=effect(tuned_new - base_old),
    )


def _vector(scores: Sequence[float], name: str) -> np.ndarray[Any, Any]:
    import numpy as np

    try:
        values = np.asarray(scores, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}={scores!r:.100} is not allowed: give a list of numbers.") from error
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{name}[{bad[0]}] is {values[bad[0]]}: an interval needs finite scores; score a failed example 0."
        )
    return values


def _bootstrap(
    values: np.ndarray[Any, Any],
    lowest: float | None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap of the mean, widened as Student's t is over the normal ("expanded percentile interval",
    Hesterberg 2015, arXiv:1411.5279, section 5.3), without which intervals over few examples are too narrow. `lowest`
    is the least value of a metric whose greatest is 1; None of another."""
    import numpy as np

    is_share = is_number(confidence) and 0 < confidence < 1
    require(is_share, "confidence", confidence, "a number between 0 and 1, such as 0.95")
    require_whole("resamples", resamples, 1, meaning="a whole number above 0, such as 2000")
    require_whole("seed", seed, 0)
    count = len(values)
    if count < 2:
        return UNKNOWN
    if np.all(values == values[0]):
        return _of_equal_values(float(values[0]), count, confidence, lowest)
    tail = _expanded_tail((1 - confidence) / 2, count)
    low, high = np.quantile(_resampled_means(values, seed, resamples), (tail, 1 - tail))
    return float(low), float(high)


def _of_equal_values(value: float, count: int, confidence: float, lowest: float | None) -> Interval:
    """A bootstrap would be certain of them. Where all are the least or the greatest that there is, the share of others
    may be so large that none shows among `count` (Clopper and Pearson). Gains of 0 stay: one program may be the
    other."""
    if lowest is None or value not in (lowest, 1.0):
        return value, value
    others = (1 - lowest) * (1 - ((1 - confidence) / 2) ** (1 / count))
    return (value - others, value) if value == 1 else (value, value + others)


def _expanded_tail(tail: float, count: int) -> float:
    """Tail probability to cut off, for a nominal one of `tail`, with `count` values."""
    quantile = _t_quantile(tail, count - 1) * math.sqrt(count / (count - 1))
    return NormalDist().cdf(quantile)


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t quantile, by the expansion in 1 / freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _resampled_means(values: np.ndarray[Any, Any], seed: int, resamples: int) -> np.ndarray[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(seed)
    count = len(values)
    # In parts, so that a large valset does not need resamples x count numbers at once.
    rows = max(1, _CHUNK // count)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([values[generator.integers(0, count, size=(size, count))].mean(axis=1) for size in sizes])
