"""Checks of plain arguments: whole numbers, numbers, switches. Each error says what came and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError


def require_whole(name: str, value: Any, least: int, *, optional: bool = False, meaning: str = "") -> None:
    """Check for a whole number that is large enough (or None, where that is allowed). Raises ConfigError."""
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        allowed = meaning or f"a whole number, {least} or more"
        raise ConfigError(f"{name}={value!r} is not allowed: give {allowed}{', or None' if optional else ''}.")


def is_number(value: Any) -> bool:
    """Whether this is a finite number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_number(name: str, value: Any, allowed: str, *, optional: bool = False) -> None:
    """Check for a finite number (or None, where that is allowed). Raises ConfigError, which says what is `allowed`."""
    if not (is_number(value) or (value is None and optional)):
        raise ConfigError(f"{name}={value!r} is not allowed: give {allowed}.")


def require_switch(name: str, value: Any) -> None:
    """Check for True or False. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not allowed: give True or False.")


def require_pass_options(num_threads: Any, max_errors: Any, seed: Any, threshold: Any = None) -> None:
    """Check what every pass over examples takes. Raises ConfigError."""
    require_whole("num_threads", num_threads, 1, optional=True)
    require_whole("max_errors", max_errors, 0, optional=True)
    require_whole("seed", seed, 0, optional=True)
    require_number("threshold", threshold, "the score from which an example counts as solved, or None", optional=True)


def require_metric(metric: Any) -> None:
    """Check for something that can be called, or None. Raises ConfigError."""
    if metric is not None and not callable(metric):
        raise ConfigError(
            f"metric={metric!r} is not allowed: give a function (example, prediction, trace=None) to a score."
        )
