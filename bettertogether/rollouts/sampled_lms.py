"""LMs that sample: each try with a seed of its own, so that the same try gives the same answer again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

APART = 1_000
"""Between the seeds of calls that ask the same; rollouts have those between."""


class Drawn(NamedTuple):
    """How the LM of a try draws its answers."""

    seed: int | None
    """None: it takes none."""
    rollout: int | None
    at_own_temperature: bool
    """Whether the try has a temperature of its own, whatever the program asks for."""


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
    """An LM for the try with this number; a `temperature` of None leaves its own, and so do models that have no other.
    `always`: with the seed even where that is 0."""
    changes: dict[str, Any] = {}
    fixed = has_fixed_temperature(lm)
    at_own = temperature is not None and not fixed
    if at_own:
        changes["temperature"] = temperature
    if number > 0 and (fixed or changes.get("temperature", lm.kwargs.get("temperature"))):
        changes["rollout_id"] = number
    if (always or fixed or samples({**lm.kwargs, **changes})) and "seed" in lm.supported_params:
        changes["seed"] = seed
    sampled = lm.copy(**changes) if changes else lm
    if changes:
        sampled.drawn = Drawn(changes.get("seed"), sampled.kwargs.get("rollout_id"), at_own)
    return sampled


def has_fixed_temperature(lm: Any) -> bool:
    """Whether a service refuses any temperature but 1, as OpenAI's for its reasoning models, to which DSPy gives
    `max_completion_tokens` in place of `max_tokens`."""
    return "max_completion_tokens" in lm.kwargs and "max_tokens" not in lm.kwargs


def draw_anew(lm: Any, arguments: dict[str, Any], earlier: Callable[[], int]) -> None:
    """Have a call answered as its try draws: at the try's temperature, where it has one, whatever the call's config
    says; and where the run gave the LM a seed, each rollout that the program asks for with another: with the same seed
    every rollout would be the same answer. It asks by a copy of the LM (`dspy.BestOfN`), in the call's config or, where
    no cache repeats an answer, by asking the same again; `earlier` counts how often it did."""
    drawn: Drawn | None = getattr(lm, "drawn", None)
    if drawn is None:
        return
    given = arguments.get("config") or {}
    config, apart = dict(given), given.get("rollout_id") or 0
    if drawn.at_own_temperature:
        config.pop("temperature", None)
    if drawn.seed is not None and lm.kwargs.get("seed") == drawn.seed:
        if drawn.at_own_temperature:
            apart += config.pop("seed", None) or 0
        if lm.kwargs.get("rollout_id") != drawn.rollout:
            lm.kwargs["seed"] = _seed_of(drawn.seed, lm.kwargs.get("rollout_id"))
        own = _seed_of(lm.kwargs["seed"], apart)
        if not getattr(lm, "cache", True) and "seed" not in config:
            own = _seed_of(own, APART * earlier())
        if own != lm.kwargs["seed"]:
            config.setdefault("seed", own)
    if config != given:
        arguments["config"] = config


def _seed_of(seed: int, rollout: int | None) -> int:
    return (seed + (rollout or 0)) % 2**31
