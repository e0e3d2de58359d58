"""Arguments of `BetterTogether.compile`, checked before any work: every wrong type and value is an error that says
what came and what is allowed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dspy.teleprompt.teleprompt import Teleprompter

from ..callbacks.events import require_callbacks
from ..checks import require, require_switch
from ..errors import ConfigError, StrategyError
from .budget import Budget


def check_watching(*, callbacks: Any, progress: object, budget: object) -> None:
    """Check who watches a run, and what bounds it. Raises ConfigError."""
    require_callbacks(callbacks)
    require_switch("progress", progress)
    limits = "bettertogether.Budget(minutes=..., metric_calls=..., tokens=..., cost=...), or None for no limit"
    require(isinstance(budget, Budget | None), "budget", budget, limits)


def check_compile_args(given: Any, optimizers: Mapping[str, Teleprompter]) -> dict[str, dict[str, Any]]:
    """`optimizer_compile_args` as dicts. Raises StrategyError and ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"optimizer_compile_args={given!r} is not allowed: give a dict from a step's key to the arguments of its "
            f"compile, such as {{{next(iter(optimizers))!r}: {{...}}}}."
        )
    for key, arguments in given.items():
        if key not in optimizers:
            raise StrategyError(f"Invalid optimizer key '{key}'. Valid keys are: {list(optimizers)}")
        if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
            raise ConfigError(f"optimizer_compile_args[{key!r}]={arguments!r} is not allowed: give a dict by name.")
        _check_accepted(key, optimizers[key], arguments)
    return {key: dict(arguments) for key, arguments in given.items()}


def _check_accepted(key: str, optimizer: Teleprompter, arguments: Mapping[str, Any]) -> None:
    if "student" in arguments:
        raise ConfigError(
            f"'student' is not allowed in optimizer_compile_args for optimizer '{key}'. "
            "The same student is used throughout compilation."
        )
    parameters = inspect.signature(optimizer.compile).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    invalid = sorted(arguments.keys() - parameters.keys())
    if invalid and not takes_any:
        raise ConfigError(
            f"Invalid compile arguments for optimizer '{key}': {invalid}. "
            f"{type(optimizer).__name__}.compile() accepts: {list(parameters)}"
        )
