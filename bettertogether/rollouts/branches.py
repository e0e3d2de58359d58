"""Runs of a program in which one call alone is answered anew: which predictor a failure comes from.

A run is taken as it was up to one of its calls; that call is sampled, on the very inputs that it had; and the program
goes on from there as it does. Where the metric accepts what comes out, that call alone was at fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dspy

from ..records import Blame
from .replay import Branch
from .rollout import Attempt, Call

if TYPE_CHECKING:
    from .traces import ExamplePass, Trace

MOST_CALLS = 3
"""Calls of one predictor in one run that are answered anew, spread over the run: a loop may make many."""


@dataclass(frozen=True)
class BranchPoint:
    """A call of a run, and the runs in which it alone was answered anew."""

    run: Trace
    call: Call
    branches: tuple[Trace, ...]

    @property
    def answered(self) -> tuple[Trace, ...]:
        """Those that came to the call: a program may ask something else when it is run again."""
        return tuple(branch for branch in self.branches if not branch.strayed)

    def answers(self) -> Iterator[tuple[Trace, Call | None, bool]]:
        """What was answered to the call: the run and those that came to it, each with its own call there (None: not to
        be seen) and whether that could be read."""
        for trace in (self.run, *self.answered):
            found = (each for each in trace.every_call() if each[0].anew or each[0] is self.call)
            yield trace, *next(found, (None, False))


def branch_points(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    runs: Sequence[Trace],
    options: ExamplePass,
    temperatures: Sequence[float],
    labels: Sequence[str | None] = (),
    *,
    first: int = 1,
    after: float | None = None,
) -> list[BranchPoint]:
    """Answer calls of these runs of the program anew, once at each of the temperatures; attempts are numbered from
    `first`, and calls after that one are answered at the temperature `after`, None: the LM's own. Tools are called
    again, and calls that can't be seen are made anew. Raises TooManyErrors."""
    calls = [(run, call) for run in runs for call in _spread((*run.calls, *run.unread))]
    jobs = [
        (run.index, Attempt("branch", number, after, branch=Branch(run.answers[: place + 1], temperature)))
        for run, call in calls
        if (place := call.place) is not None
        for number, temperature in enumerate(temperatures, first)
    ]
    branches = iter(options.over(program, examples, jobs, labels))
    return [BranchPoint(run, call, tuple(next(branches) for _ in temperatures)) for run, call in calls]


def _spread(calls: Sequence[Call]) -> list[Call]:
    """Those that can be answered anew, at most `MOST_CALLS` of each predictor, the first and the last among them."""
    by_predictor: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.place is not None:
            by_predictor[call.predictor].append(call)
    chosen = []
    for own in by_predictor.values():
        count = min(len(own), MOST_CALLS)
        places = [0] if count == 1 else [position * (len(own) - 1) // (count - 1) for position in range(count)]
        chosen += [own[place] for place in places]
    return chosen


def branch_runs(runs: Sequence[Trace]) -> dict[str, float]:
    """By predictor, how many runs of the program it takes to answer its calls of one of these runs anew, once, on
    average: those before a call are not made again."""
    found: dict[str, float] = defaultdict(float)
    for run in runs:
        for call in _spread((*run.calls, *run.unread)):
            found[call.predictor] += (1 - (call.place or 0) / len(run.answers)) / len(runs)
    return dict(found)


def blame(points: Collection[BranchPoint]) -> dict[str, Blame]:
    """By predictor, how many of the failed runs are repaired by answering its calls alone anew."""
    calls: Counter[str] = Counter()
    repaired: dict[str, dict[int, bool]] = defaultdict(dict)
    for point in points:
        if not point.run.passed and point.answered:
            calls[point.call.predictor] += 1
            runs = repaired[point.call.predictor]
            runs[point.run.index] = runs.get(point.run.index, False) or any(each.passed for each in point.answered)
    return {name: Blame(calls[name], len(runs), sum(runs.values())) for name, runs in repaired.items()}
