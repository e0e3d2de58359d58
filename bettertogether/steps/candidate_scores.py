"""Scores of a prompt step's candidates, what they cost, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import dspy

from ..callbacks import events
from ..records import Ledger
from ..rollouts.evaluation import Evaluation, Evaluator
from ..rollouts.failures import count_failures, failure_warning
from ..rollouts.metrics import Metric, full_mark, reaches
from ..rollouts.settings import RunSettings
from .demo_sets import Candidate


class CandidateScores:
    """Called by the race with the candidates still running and the positions of the examples to score them on."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        validation: Sequence[dspy.Example],
        metric: Metric,
        settings: RunSettings,
    ) -> None:
        self._candidates = [*candidates]
        self._validation = validation
        self._evaluator = Evaluator(metric, settings)
        self.ledger = Ledger()
        """What the scores cost so far."""
        self.warnings: list[str] = []
        """That most runs failed; said already."""

    def add(self, candidates: Sequence[Candidate]) -> None:
        """Expect these to be scored, too."""
        self._candidates += candidates

    def __call__(self, running: Sequence[Candidate], positions: Sequence[int]) -> list[tuple[float, ...]]:
        """The scores of each."""
        total = len(self._candidates)
        results = self._evaluator.evaluate(
            [candidate.program for candidate in running],
            [self._validation[position] for position in positions],
            f"{len(running)} of {total} candidates, to {positions[-1] + 1} of {len(self._validation)}",
            "eval_minibatch",
        )
        means = [fmean([*each.scores.values(), *result.scores]) for each, result in zip(running, results, strict=True)]
        least = min(len(each.scores) for each in running) + len(positions)
        others = [each.mean for each in self._candidates if each not in running and len(each.scores) >= least]
        best = max([*means, *others])
        for candidate, result, mean in zip(running, results, means, strict=True):
            self.ledger += result.ledger
            number = self._candidates.index(candidate) + 1
            events.emit("candidate", {"number": number, "total": total, "score": mean, "best_score": best})
        self._check(results)
        return [result.scores for result in results]

    def _check(self, results: Sequence[Evaluation]) -> None:
        traces = [trace for result in results for trace in result.traces]
        warning = failure_warning(count_failures(traces), len(traces), "candidates", "runs")
        if warning and not self.warnings:
            self.warnings.append(warning)
            events.warn(warning)


def all_equal(candidates: Sequence[Candidate], threshold: float | None) -> str | None:
    """A warning where the scores say nothing, though there is something to gain."""
    scores = [score for candidate in candidates for score in candidate.scores.values()]
    if not len(scores) > len(candidates) > 1 or len(set(scores)) > 1 or reaches(scores[0], full_mark(threshold)):
        return None
    return (
        f"candidates: each of the {len(candidates)} scores {scores[0]:g} on each example, so the scores don't say "
        "which is best, and the one with the fewest demos is taken. Check the metric."
    )
