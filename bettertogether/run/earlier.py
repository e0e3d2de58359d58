"""What the rounds before a step found, as programs whose prompts it may look at again.

Taken from their records alone, so that a resumed run sees the same as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import dspy

from ..programs.program import load_prompts, predictors_of
from ..records import PromptDetails, StepRecord


def earlier_programs(program: dspy.Module, rounds: Sequence[StepRecord]) -> list[dspy.Module]:
    """Copies of `program`, which the last of the rounds gave, with the prompts of all of them, each once: the best few
    candidates of their prompt steps, best first, then the rounds' own; the latest round first."""
    names = predictors_of(program).keys()
    states: list[Mapping[str, Any]] = []
    for state in _prompts(rounds):
        if state.keys() == names and state not in states:
            states.append(state)
    return [load_prompts(program, state) for state in states]


def _prompts(rounds: Sequence[StepRecord]) -> Iterator[Mapping[str, Any]]:
    # Where a round's prompts are not all there is to its program, those before it are another program's.
    saved = list(takewhile(lambda record: record.program is not None, reversed(rounds)))
    for record in saved:
        if isinstance(record.details, PromptDetails):
            yield from record.details.best
    for record in saved:
        yield record.program or {}
