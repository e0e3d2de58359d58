"""Score candidates on validation examples, slice by slice, and stop those that can't win.

After each slice a candidate leaves the race when the upper confidence bound of its mean paired difference to the
leader, over ALL validation examples, is below zero. The bound is normal, with a finite-population correction (the
examples not yet seen are fewer each time) and a standard deviation that is never taken below that of one example
more for and one more against. The confidence is that of one stop, not of the whole race: what full scoring would
choose is lost about as rarely, since few candidates come near it, and the loss is small then
(tests/benchmarks/race.py).

A candidate also leaves when a simpler one got the very same scores so far, on `ALIKE` examples at least: weights that
were trained on the prompts of the race answer alike under most of them. Scores that are nearly all the same say so only
where the simpler one has the full mark on all of the examples.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import NormalDist

import dspy

from ..records import RaceResult
from ..rollouts.metrics import FULL_MARK, passes, reaches
from .demo_sets import Candidate

CONFIDENCE = 0.95
SLICES = 8
"""Looks at the candidates, at most."""
SMALLEST_SLICE = 8
"""Validation examples of a slice, at least."""
ALIKE = 16
"""Examples with equal scores from which two candidates are held to answer alike."""
TELLING = 2
"""Of these, how many are not the commonest score, at least. Good candidates are right on 16 in a row by chance."""

RACES = 20
"""Made-up races of which `expected_calls` is the mean."""

ScoreFunction = Callable[[Sequence[Candidate], Sequence[int]], Sequence[Sequence[float] | None]]


def slices(size: int, race: bool) -> list[range]:
    """Positions of each slice: an eighth (8 at least) each."""
    step = max(SMALLEST_SLICE, -(-size // SLICES)) if race else size
    return [range(start, min(size, start + step)) for start in range(0, size, step)]


def run_race(
    candidates: Sequence[Candidate],
    size: int,
    score: ScoreFunction,
    *,
    race: bool = True,
    full_mark: float = FULL_MARK,
) -> RaceResult:
    """Fill the candidates' scores. `score(running, positions)` gives the scores of each of these candidates at these
    validation positions, or None where it leaves the race. A candidate that was fully scored before takes part with
    the scores it has. One that has the `full_mark` everywhere can at best be equalled."""
    new = [candidate for candidate in candidates if len(candidate.scores) < size]
    calls = 0
    for part in slices(size, race):
        running = [candidate for candidate in new if not candidate.stopped]
        if not running:
            break
        for candidate, scores in zip(running, score(running, part), strict=True):
            candidate.stopped = scores is None
            if scores is not None:
                candidate.scores.update(zip(part, scores, strict=True))
        calls += len(part) * len(running)
        running = [candidate for candidate in running if not candidate.stopped]
        if part.stop < size:
            rivals = [candidate for candidate in candidates if candidate not in new or not candidate.stopped]
            _stop_losers(running, rivals, range(part.stop), size)
            _stop_alike(running, rivals, range(part.stop), size, full_mark)
    return RaceResult(calls, len(new) * size - calls, CONFIDENCE)


def expected_calls(count: int, size: int, contest: tuple[float, float], *, race: bool = True) -> float:
    """The mean number of scores that a race of so many candidates takes, where the first has one mean score and all
    others another."""
    rng, totals = random.Random(0), []
    for _ in range(RACES):
        candidates = [Candidate(str(number), dspy.Module()) for number in range(count)]

        def score(running: Sequence[Candidate], part: Sequence[int]) -> list[list[float]]:
            means = [contest[candidate.name != "0"] for candidate in running]
            return [[float(rng.random() < mean) for _ in part] for mean in means]

        totals.append(run_race(candidates, size, score, race=race).calls_made)
    return sum(totals) / len(totals)


def choose(candidates: Sequence[Candidate], size: int) -> Candidate:
    """The best mean of those fully scored; of equals the one with fewer demos, then the earlier."""
    finished = [candidate for candidate in candidates if len(candidate.scores) == size]
    best = max(candidate.mean for candidate in finished)
    tied = [candidate for candidate in finished if reaches(candidate.mean, best)]
    return min(tied, key=lambda candidate: candidate.demos)


def _stop_losers(running: Sequence[Candidate], rivals: Sequence[Candidate], seen: range, size: int) -> None:
    leader = max(rivals, key=lambda candidate: sum(candidate.scores[i] for i in seen))
    for candidate in running:
        differences = [candidate.scores[i] - leader.scores[i] for i in seen]
        candidate.stopped = candidate is not leader and upper_bound(differences, size, 1 - CONFIDENCE) < 0


def _stop_alike(
    running: Sequence[Candidate], rivals: Sequence[Candidate], seen: range, size: int, full_mark: float
) -> None:
    """Of candidates with the very same scores, go on with the one that `choose` would take."""
    if len(seen) < ALIKE:
        return
    simpler: dict[tuple[float, ...], list[Candidate]] = defaultdict(list)
    for candidate in sorted(rivals, key=lambda each: each.demos):
        scores = tuple(candidate.scores[i] for i in seen)
        others = simpler[scores]
        telling = len(scores) - max(Counter(scores).values()) >= TELLING
        if candidate in running and others and (telling or any(solves_all(each, size, full_mark) for each in others)):
            candidate.stopped = True
        others.append(candidate)


def solves_all(candidate: Candidate, size: int, full_mark: float = FULL_MARK) -> bool:
    """Whether it has the full mark on every example."""
    return len(candidate.scores) == size and all(passes(score, full_mark) for score in candidate.scores.values())


def upper_bound(differences: Sequence[float], population: int, alpha: float) -> float:
    """One-sided upper bound, at confidence 1 - alpha, of the mean difference over `population` examples of which
    these are a random sample."""
    n = len(differences)
    scale = max(map(abs, differences))
    padded = [*differences, scale, -scale]
    mean = sum(differences) / n
    center = sum(padded) / len(padded)
    variance = sum((d - center) ** 2 for d in padded) / (len(padded) - 1)
    correction = math.sqrt((population - n) / (population - 1))
    return mean + NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance / n) * correction
