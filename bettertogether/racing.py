"""Score candidates on validation examples, slice by slice, and stop those that can't win.

After each slice a candidate leaves the race when the upper confidence bound of its mean paired difference to the
leader, over ALL validation examples, is below zero. The bound is normal, with a finite-population correction (the
examples not yet seen are fewer each time) and a standard deviation that is never taken below that of one example
more for and one more against; the confidence is split over the candidates (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from .demos import Candidate

CONFIDENCE = 0.95
FIRST_SLICE = 12
"""Validation examples of the first slice, at least; or a quarter of them."""


@dataclass(frozen=True)
class RaceResult:
    """What a race cost and spared."""

    calls_made: int
    calls_saved: int
    """Program calls that scoring every candidate fully would have taken on top."""
    confidence: float


ScoreFunction = Callable[[Candidate, Sequence[int]], Sequence[float]]


def slices(size: int, race: bool) -> list[range]:
    """Positions of each slice: a quarter (12 at least), then doubling."""
    if not race:
        return [range(size)]
    ends = [min(size, max(FIRST_SLICE, size // 4))]
    while ends[-1] < size:
        ends.append(min(size, 2 * ends[-1]))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def run_race(candidates: Sequence[Candidate], size: int, score: ScoreFunction, *, race: bool = True) -> RaceResult:
    """Fill the candidates' scores. `score(candidate, positions)` gives the scores at these validation positions."""
    calls = 0
    for part in slices(size, race):
        for candidate in candidates:
            if not candidate.stopped:
                candidate.scores.update(zip(part, score(candidate, part), strict=True))
                calls += len(part)
        if part.stop < size:
            _stop_losers(candidates, size)
    return RaceResult(calls, len(candidates) * size - calls, CONFIDENCE)


def _stop_losers(candidates: Sequence[Candidate], size: int) -> None:
    running = [candidate for candidate in candidates if not candidate.stopped]
    leader = max(running, key=lambda candidate: candidate.mean)
    alpha = (1 - CONFIDENCE) / max(1, len(candidates) - 1)
    for candidate in running:
        differences = [candidate.scores[i] - leader.scores[i] for i in candidate.scores]
        candidate.stopped = candidate is not leader and upper_bound(differences, size, alpha) < 0


def upper_bound(differences: Sequence[float], population: int, alpha: float) -> float:
    """One-sided upper bound, at confidence 1 - alpha, of the mean difference over `population` examples of which
    these are a random sample."""
    n = len(differences)
    scale = max((abs(d) for d in differences), default=0.0) or 1.0
    padded = [*differences, scale, -scale]
    mean = sum(differences) / n
    center = sum(padded) / len(padded)
    variance = sum((d - center) ** 2 for d in padded) / (len(padded) - 1)
    correction = math.sqrt(max(0.0, (population - n) / max(1, population - 1)))
    return mean + NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance / n) * correction
