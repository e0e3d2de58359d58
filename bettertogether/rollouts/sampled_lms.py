"""LMs that sample: each try with a seed of its own, so that the same try gives the same answer again."""

from __future__ import annotations

from typing import Any


def needs_seed(lm: Any) -> bool:
    """Whether an LM samples without a seed although it could take one."""
    if lm is None or not (lm.kwargs.get("temperature") or 0) > 0 or lm.kwargs.get("seed") is not None:
        return False
    return "seed" in lm.supported_params


def sampling_lm(lm: Any, number: int, temperature: float | None, seed: int | None) -> Any:
    """An LM for the try with this number; a `temperature` of None leaves its own."""
    changes: dict[str, Any] = {}
    if temperature is not None:
        changes["temperature"] = temperature
    if number > 0 and changes.get("temperature", lm.kwargs.get("temperature")):
        changes["rollout_id"] = number
    samples = (changes.get("temperature", lm.kwargs.get("temperature")) or 0) > 0
    if samples and "seed" in lm.supported_params:
        changes["seed"] = seed
    sampled = lm.copy(**changes) if changes else lm
    if "seed" in changes:
        sampled.drawn = seed, sampled.kwargs.get("rollout_id")
    return sampled


def draw_anew(lm: Any, arguments: dict[str, Any]) -> None:
    """Give another rollout that a program asks for another seed, where the run gave the LM one: with the same seed
    every rollout would be the same answer. It asks by a copy of the LM (`dspy.BestOfN`) or in the call's config."""
    drawn = getattr(lm, "drawn", None)
    if not drawn or lm.kwargs.get("seed") != drawn[0]:
        return
    seed, rollout = drawn
    if lm.kwargs.get("rollout_id") != rollout:
        lm.kwargs["seed"] = _seed_of(seed, lm.kwargs.get("rollout_id"))
    config = arguments.get("config") or {}
    if "rollout_id" in config and "seed" not in config:
        arguments["config"] = {**config, "seed": _seed_of(lm.kwargs["seed"], config["rollout_id"])}


def _seed_of(seed: int, rollout: int | None) -> int:
    return (seed + (rollout or 0)) % 2**31
