"""LMs that sample: each try with a seed of its own, so that the same try gives the same answer again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

APART = 1_000
"""Between the seeds of calls that ask the same; rollouts have those between."""


def samples(options: Mapping[str, Any]) -> bool:
    """Whether LM options ask for sampled answers. For several (`n`) DSPy raises a temperature of 0 to 0.7."""
    return (options.get("temperature") or 0) > 0 or (options.get("n") or 1) > 1


def needs_seed(predictor: Any) -> bool:
    """Whether a predictor's LM samples without a seed although it could take one."""
    if predictor.lm is None:
        return False
    options = {**predictor.lm.kwargs, **predictor.config}
    return samples(options) and options.get("seed") is None and "seed" in predictor.lm.supported_params


def sampling_lm(lm: Any, number: int, temperature: float | None, seed: int | None, *, always: bool = False) -> Any:
    """An LM for the try with this number; a `temperature` of None leaves its own. `always`: with the seed even where
    that is 0."""
    changes: dict[str, Any] = {}
    if temperature is not None:
        changes["temperature"] = temperature
    if number > 0 and changes.get("temperature", lm.kwargs.get("temperature")):
        changes["rollout_id"] = number
    if (always or samples({**lm.kwargs, **changes})) and "seed" in lm.supported_params:
        changes["seed"] = seed
    sampled = lm.copy(**changes) if changes else lm
    if "seed" in changes:
        sampled.drawn = seed, sampled.kwargs.get("rollout_id")
    return sampled


def draw_anew(lm: Any, arguments: dict[str, Any], earlier: Callable[[], int]) -> None:
    """Give another rollout that a program asks for another seed, where the run gave the LM one: with the same seed
    every rollout would be the same answer. It asks by a copy of the LM (`dspy.BestOfN`), in the call's config or, where
    no cache repeats an answer, by asking the same again; `earlier` counts how often it did."""
    drawn = getattr(lm, "drawn", None)
    if not drawn or lm.kwargs.get("seed") != drawn[0]:
        return
    seed, rollout = drawn
    if lm.kwargs.get("rollout_id") != rollout:
        lm.kwargs["seed"] = _seed_of(seed, lm.kwargs.get("rollout_id"))
    config = arguments.get("config") or {}
    if "seed" in config:
        return
    own = _seed_of(lm.kwargs["seed"], config.get("rollout_id"))
    if not getattr(lm, "cache", True):
        own = _seed_of(own, APART * earlier())
    if own != lm.kwargs["seed"]:
        arguments["config"] = {**config, "seed": own}


def _seed_of(seed: int, rollout: int | None) -> int:
    return (seed + (rollout or 0)) % 2**31
