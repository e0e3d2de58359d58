"""What a prompt step's race came to: the candidate to take, and what is told of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from ..errors import ArtifactError
from ..programs.copies import hang
from ..programs.program import copy_for_step, prompts_state
from ..records import CandidateScore, PromptDetails, RaceResult, TraceCounts
from ..rollouts.traces import TraceSet
from .demo_sets import Candidate, DemoSets
from .race import choose

KEPT = 3
"""Candidates whose prompts later steps try again, at most."""


class Outcome:
    """Candidates after their race over `size` validation examples; the first has the prompts that the step was
    given."""

    def __init__(self, candidates: Sequence[Candidate], size: int) -> None:
        self._candidates = candidates
        self._size = size
        self.best = choose(candidates, size)

    @property
    def _ranked(self) -> list[Candidate]:
        """The best first, then the others fully scored, then those that left the race; each by their mean."""
        return sorted(self._candidates, key=lambda c: (c is not self.best, len(c.scores) < self._size, -c.mean))

    def program(self) -> dspy.Module:
        """The best program, with all of them as its `candidate_programs`, but those whose adapters are served no
        more."""
        result = copy_for_step(self.best.program)
        result._compiled = True
        served = (c for c in self._ranked if c.strength == 1 or c is self.best)
        candidates = [{"score": c.mean, "program": c.program, "name": c.name} for c in served]
        hang(result, candidate_programs=candidates)
        return result

    def gain(self) -> float | None:
        """Mean score of the best minus that of the prompts given, on the examples that both were scored on."""
        current, best = self._candidates[0].scores, self.best.scores
        both = current.keys() & best.keys()
        return sum(best[i] - current[i] for i in both) / len(both) if both else None

    def details(self, traces: TraceSet, race: RaceResult, sets: DemoSets) -> PromptDetails:
        """What is recorded of the step."""
        return PromptDetails(
            candidates=tuple(_score(candidate) for candidate in self._candidates),
            chosen=self.best.name,
            validation_examples=self._size,
            race=race,
            traces=TraceCounts(
                examples=traces.examples,
                solved=len({trace.index for trace in traces.passing}),
                failed=traces.reasons(),
            ),
            dropped_demos=dict(sets.dropped),
            left_out=sets.problems(),
            best=self._best_prompts(),
        )

    def _best_prompts(self) -> tuple[Mapping[str, Any], ...]:
        """Prompts of the best few that show demos. What can't be saved is left out, so that a run that is resumed has
        the same ones."""
        found: list[Mapping[str, Any]] = []
        for candidate in self._ranked:
            try:
                state = prompts_state(candidate.program)
            except ArtifactError:
                continue
            if candidate.demos and state not in found:
                found.append(state)
        return tuple(found[:KEPT])


def _score(candidate: Candidate) -> CandidateScore:
    return CandidateScore(
        name=candidate.name,
        score=candidate.mean,
        scored_on=len(candidate.scores),
        stopped=candidate.stopped,
        demos=candidate.demos,
    )
