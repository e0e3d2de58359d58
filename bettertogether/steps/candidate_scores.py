"""Scores of a prompt step's candidates, what they cost, and what is wrong with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import dspy

from ..callbacks import events
from ..errors import TooManyErrors
from ..records import Ledger
from ..rollouts.evaluation import Evaluation, Evaluator
from ..rollouts.failures import count_failures, failure_warning
from ..rollouts.metrics import Metric, full_mark, passes, require_from_zero
from ..rollouts.settings import RunSettings
from ..rollouts.traces import Trace, too_many
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
        self._most_errors = settings.most_errors
        # So that what one candidate raises doesn't end the pass of all.
        self._evaluator = Evaluator(metric, replace(settings, max_errors=len(validation)))
        self._failed: dict[str, dict[int, Trace]] = defaultdict(dict)
        """By candidate and position."""
        self.ledger = Ledger()
        """What the scores cost so far."""
        self.warnings: list[str] = []
        """That most runs failed; said already."""
        self.broken: list[str] = []
        """Which candidates left since they raise; said already."""

    def add(self, candidates: Sequence[Candidate]) -> None:
        """Expect these to be scored, too."""
        self._candidates += candidates

    def __call__(self, running: Sequence[Candidate], positions: Sequence[int]) -> list[tuple[float, ...] | None]:
        """The scores of each; None of one that raises on too many examples. Raises TooManyErrors where that is the
        first candidate, or no other is left, and ConfigError for a score below 0."""
        total = len(self._candidates)
        results = self._evaluator.evaluate(
            [candidate.program for candidate in running],
            [self._validation[position] for position in positions],
            f"{len(running)} of {total} candidates, to {positions[-1] + 1} of {len(self._validation)}",
            "eval_minibatch",
        )
        self.ledger += Ledger.total(result.ledger for result in results)
        require_from_zero(score for result in results for score in result.scores)
        errors = [self._error(each, result, positions) for each, result in zip(running, results, strict=True)]
        self._leave(running, errors)
        scores = [None if error else result.scores for result, error in zip(results, errors, strict=True)]
        means = [(each, fmean([*each.scores.values(), *new])) for each, new in zip(running, scores, strict=True) if new]
        least = min(len(each.scores) for each in running) + len(positions)
        others = [each.mean for each in self._candidates if each not in running and len(each.scores) >= least]
        best = max([*(mean for _, mean in means), *others])
        for candidate, mean in means:
            number = self._candidates.index(candidate) + 1
            events.emit("candidate", {"number": number, "total": total, "score": mean, "best_score": best})
        self._check(results)
        return scores

    def _error(self, candidate: Candidate, result: Evaluation, positions: Sequence[int]) -> str | None:
        """That a candidate raised on too many examples, those of its earlier scores too."""
        failed = self._failed[candidate.name]
        failed.update({positions[trace.index]: trace for trace in result.traces if trace.failed})
        if self._most_errors is None or len(failed) <= self._most_errors:
            return None
        return too_many(failed, len(candidate.scores) + len(positions), self._most_errors)

    def _leave(self, running: Sequence[Candidate], errors: Sequence[str | None]) -> None:
        """Say which candidates leave with an error, where the prompts given aren't among them and others are left."""
        broken = {candidate.name: error for candidate, error in zip(running, errors, strict=True) if error is not None}
        left = [each for each in self._candidates if not each.stopped and each.name not in broken]
        if broken and (self._candidates[0].name in broken or not left):
            raise TooManyErrors(next(iter(broken.values())))
        for name, error in broken.items():
            self.broken.append(f"candidates: {name!r} leaves the race: {error}")
            events.warn(self.broken[-1])

    def _check(self, results: Sequence[Evaluation]) -> None:
        traces = [trace for result in results for trace in result.traces]
        warning = failure_warning(count_failures(traces), len(traces), "candidates", "run")
        if not self.warnings:
            self.warnings += events.told(warning)


def all_equal(candidates: Sequence[Candidate], threshold: float | None) -> str | None:
    """A warning where the scores say nothing, though there is something to gain."""
    scores = [score for candidate in candidates for score in candidate.scores.values()]
    if not len(scores) > len(candidates) > 1 or len(set(scores)) > 1 or passes(scores[0], full_mark(threshold)):
        return None
    return (
        f"candidates: each of the {len(candidates)} scores {scores[0]:g} on each example, so the scores don't say "
        "which is best, and the one with the fewest demos is taken. Check the metric."
    )
