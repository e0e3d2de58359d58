"""Programs as values: copies that share their LMs, prompts in and out, a fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import dspy

from .errors import ProgramError


def copy_program(program: dspy.Module) -> dspy.Module:
    """A deep copy that shares its LMs, and anything that can't be copied, with the original.

    `Module.deepcopy` copies LMs with their whole history, and where an attribute can't be copied it falls back to a
    copy whose bound methods still point at the original; neither happens here.
    """
    memo: dict[int, Any] = {id(lm): lm for lm in _all_lms(program)}
    try:
        return copy.deepcopy(program, dict(memo))
    except Exception:
        for value in _uncopyable(program, memo):
            memo[id(value)] = value
        return copy.deepcopy(program, memo)


def _all_lms(program: dspy.Module) -> Iterator[Any]:
    for _, module in program.named_sub_modules(dspy.Module):
        lm = module.__dict__.get("lm")
        if lm is not None:
            yield lm


def _uncopyable(program: dspy.Module, memo: Mapping[int, Any]) -> Iterator[Any]:
    for _, module in program.named_sub_modules(dspy.Module):
        for value in module.__dict__.values():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                if not isinstance(value, dspy.Module | list | tuple | dict):
                    yield value


def copy_for_step(program: dspy.Module) -> dspy.Module:
    """A copy that an optimizer accepts: not marked as compiled, its demos its own."""
    copied = copy_program(program)
    copied._compiled = False
    return copied


def predictors_of(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Name to predictor, in the program's order. Predictors of compiled sub-modules are frozen and not among them."""
    return dict(program.named_predictors())


def require_program(program: object, role: str = "student") -> dspy.Module:
    """Check that this is a program with predictors, each with an LM. Raises ProgramError."""
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"{role} must be a dspy.Module, got {type(program).__name__}.")
    predictors = predictors_of(program)
    if not predictors:
        raise ProgramError(
            f"The {role} program has no predictors to optimize. If it was compiled before, its sub-modules may be "
            "frozen: set `module._compiled = False` on those to be optimized again."
        )
    missing = [name for name, predictor in predictors.items() if predictor.lm is None]
    if missing:
        raise ProgramError(
            f"The {role} program must have a language model set on every predictor, but these have none: {missing}. "
            f"`{role}.set_lm(lm)` sets them all, for example with lm = bettertogether.local_lm(folder_or_hub_id)."
        )
    return program


def prompts_state(program: dspy.Module) -> dict[str, Any]:
    """Instructions, field texts and demos by predictor name, as JSON; LMs left out."""
    state: dict[str, Any] = {}
    for name, predictor in predictors_of(program).items():
        dumped = predictor.dump_state()
        dumped.pop("lm", None)
        state[name] = json.loads(json.dumps(dumped, default=str))
    return state


def with_prompts(program: dspy.Module, source: dspy.Module) -> dspy.Module:
    """A copy of `program` (its LMs) with the prompts of `source`: signatures, demos, per-call options."""
    copied = copy_for_step(program)
    originals = predictors_of(source)
    for name, predictor in predictors_of(copied).items():
        original = originals[name]
        predictor.signature = original.signature
        predictor.demos = list(original.demos)
    return copied


def load_prompts(program: dspy.Module, state: Mapping[str, Any]) -> dspy.Module:
    """A copy of `program` with prompts from `prompts_state`; its LMs stay."""
    copied = copy_for_step(program)
    predictors = predictors_of(copied)
    if predictors.keys() != state.keys():
        raise ProgramError(
            f"The saved prompts are for predictors {sorted(state)}, the program has {sorted(predictors)}: "
            "give the program that they were saved from."
        )
    for name, predictor in predictors.items():
        lm = predictor.lm
        predictor.load_state({**state[name], "lm": None})
        predictor.lm = lm
        predictor.demos = [dspy.Example(**demo) if isinstance(demo, dict) else demo for demo in predictor.demos]
    return copied


def model_names(program: dspy.Module) -> dict[str, str]:
    """Predictor name to the model name of its LM."""
    return {name: predictor.lm.model for name, predictor in predictors_of(program).items() if predictor.lm}


def program_key(program: dspy.Module) -> str:
    """A hash of what decides a program's answers: class, prompts, LMs with their options, the adapter in use."""
    adapter = dspy.settings.adapter
    lms = {
        name: (predictor.lm.model, sorted((key, repr(value)) for key, value in predictor.lm.kwargs.items()))
        for name, predictor in predictors_of(program).items()
        if predictor.lm is not None
    }
    parts = (type(program).__qualname__, prompts_state(program), lms, type(adapter).__qualname__ if adapter else None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
