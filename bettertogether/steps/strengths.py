"""The strength of a program's adapters, as one more dimension of the prompt step's race."""

from __future__ import annotations

from collections.abc import Sequence

import dspy

from ..checks import require, require_strength
from ..lm import local_engine
from ..programs.program import copy_for_step
from .demo_sets import Candidate
from .tried_adapters import TriedAdapters


def checked_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths to try, as a tuple. Raises ConfigError."""
    are_several = isinstance(strengths, Sequence) and not isinstance(strengths, str)
    require(are_several, "strengths", strengths, "numbers such as (0.5, 0.75), or ()")
    for strength in strengths:
        require_strength("strengths", strength)
    return tuple(strengths)


def at_strengths(candidate: Candidate, strengths: Sequence[float], tried: TriedAdapters) -> list[Candidate]:
    """The same prompts with each of the program's adapters at each of the strengths; none where it has no adapter."""
    if not any(_has_adapter(predictor.lm) for predictor in candidate.program.predictors()):
        return []
    return [
        Candidate(
            f"{candidate.name}, strength {strength:g}",
            scaled_program(candidate.program, strength, tried),
            strength=strength,
        )
        for strength in dict.fromkeys(strengths)
        if strength != 1
    ]


def scaled_program(program: dspy.Module, strength: float, tried: TriedAdapters) -> dspy.Module:
    """A copy whose local LMs run their adapters at another strength; LMs without one stay."""
    copied = copy_for_step(program)
    lms: dict[int, dspy.LM] = {}
    for predictor in copied.predictors():
        lm = predictor.lm
        if _has_adapter(lm):
            if id(lm) not in lms:
                lms[id(lm)] = lm.copy(model=tried.scaled(lm, strength))
            predictor.lm = lms[id(lm)]
    return copied


def _has_adapter(lm: dspy.LM) -> bool:
    engine = local_engine(lm)
    return engine is not None and engine.adapter_folder(lm.model) is not None
