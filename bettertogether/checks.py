"""Checks of plain arguments: whole numbers, numbers, switches, words. Each error says what came and what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

MOST_STRENGTH = 2
"""Of an adapter, times what it was trained to be."""


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ConfigError, with what came and what is `allowed`, where an argument is not `ok`."""
    if not ok:
        raise ConfigError(f"{name}={value!r} is not allowed: give {allowed}.")


def require_whole(
    name: str, value: Any, least: int, *, most: int | None = None, optional: bool = False, meaning: str = ""
) -> None:
    """Check for a whole number in bounds (or None, where that is allowed). Raises ConfigError."""
    if value is None and optional:
        return
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    ok = is_whole and value >= least and (most is None or value <= most)
    bounds = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    require(ok, name, value, f"{meaning or bounds}{', or None' if optional else ''}")


def plain(value: Any) -> Any:
    """numpy's numbers as Python's own, the only ones that JSON, seeds and most libraries take; all else as it is."""
    if isinstance(value, tuple):
        return tuple(map(plain, value)) if type(value) is tuple else value
    return value.item() if type(value).__module__ == "numpy" and is_number(value) else value


def with_plain_numbers(options: object) -> None:
    """Make the fields of a frozen dataclass `plain`."""
    for name, value in vars(options).items():
        object.__setattr__(options, name, plain(value))


def is_number(value: Any) -> bool:
    """Whether this is a finite number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_strength(name: str, value: Any) -> None:
    """Check for the strength of an adapter. Raises ConfigError."""
    allowed = f"a number above 0, {MOST_STRENGTH} at most (1: the adapter as it is)"
    require(is_number(value) and 0 < value <= MOST_STRENGTH, name, value, allowed)


def require_switch(name: str, value: Any, *, optional: bool = False) -> None:
    """Check for True or False (or None, where that is allowed). Raises ConfigError."""
    require(isinstance(value, bool) or (value is None and optional), name, value, "True or False")


def require_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check for one of a few texts. Raises ConfigError."""
    listed = " or ".join(json.dumps(each) for each in allowed)
    require(isinstance(value, str) and value in allowed, name, value, listed)


def require_pass_options(num_threads: Any, max_errors: Any, seed: Any) -> None:
    """Check what every pass over examples takes. Raises ConfigError."""
    require_whole("num_threads", num_threads, 1, optional=True)
    require_whole("max_errors", max_errors, 0, optional=True)
    require_whole("seed", seed, 0, optional=True)


def require_threshold(threshold: Any) -> None:
    """Check what a step or a pass takes as solved. Raises ConfigError."""
    allowed = "the score from which an example counts as solved, or None"
    require(threshold is None or is_number(threshold), "threshold", threshold, allowed)
