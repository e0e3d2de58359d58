"""What racing saves and what it costs: simulated candidates whose full scores are known.

    python tests/benchmarks/race.py [--candidates 8] [--races 2000]

Each race has candidates of different accuracy on examples of different difficulty (a logistic model), as on real
validation sets. A second table has candidates that answer alike but for one example in twenty, as after training.
Prints, by number of examples and by confidence of a stop, the share of program calls made, how often the candidate that
full scoring would choose was lost, and the mean score lost by it. A few seconds, no model.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable

import dspy

from bettertogether.steps import race as racing
from bettertogether.steps.demo_sets import Candidate
from bettertogether.steps.race import choose

Table = list[list[float]]
"""Right or wrong, by candidate and example."""


def different(candidates: int, size: int, rng: random.Random) -> Table:
    """Each candidate has a skill of its own."""
    skills = [rng.gauss(0.5, 0.8) for _ in range(candidates)]
    ease = [rng.gauss(0, 1.5) for _ in range(size)]
    return [[float(rng.random() < 1 / (1 + math.exp(-skill - e))) for e in ease] for skill in skills]


def alike(candidates: int, size: int, rng: random.Random) -> Table:
    """All answer as one does, but for one example in twenty, where they are right or wrong by chance."""
    [common] = different(1, size, rng)
    return [[float(rng.random() < 0.5) if rng.random() < 0.05 else s for s in common] for _ in range(candidates)]


def race(scores: Table, size: int) -> tuple[int, float]:
    """Calls made, and the score lost against scoring everything."""
    candidates = [Candidate(str(number), dspy.Module()) for number in range(len(scores))]
    result = racing.run_race(
        candidates, size, lambda running, part: [[scores[int(c.name)][i] for i in part] for c in running]
    )
    chosen = scores[int(choose(candidates, size).name)]
    return result.calls_made, max(map(statistics.mean, scores)) - statistics.mean(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--races", type=int, default=2000)
    options = parser.parse_args()
    for make in (different, alike):
        print(f"{options.candidates} {make.__name__} candidates, {options.races} races")
        print_table(make, options.candidates, options.races)


def print_table(make: Callable[[int, int, random.Random], Table], candidates: int, races: int) -> None:
    """One line for each number of examples and each confidence."""
    print("examples  confidence  calls made  best lost  loss")
    for size in (24, 60, 250):
        for confidence in (0.8, 0.9, 0.95, 0.99):
            racing.CONFIDENCE = confidence
            rng = random.Random(0)
            results = [race(make(candidates, size, rng), size) for _ in range(races)]
            calls = statistics.mean(calls for calls, _ in results) / (candidates * size)
            lost = statistics.mean(loss > 0 for _, loss in results)
            print(
                f"{size:8}  {confidence:10}  {calls:10.0%}  {lost:9.1%}  {statistics.mean(x for _, x in results):.4f}"
            )


if __name__ == "__main__":
    main()
