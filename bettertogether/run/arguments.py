"""Arguments of `BetterTogether.compile`, checked before any work: every wrong type and value is an error that says
what came and what is allowed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from dspy.teleprompt.teleprompt import Teleprompter

from ..callbacks.events import require_callbacks
from ..errors import ConfigError, StrategyError
from .budget import Budget
from .directory import checked_folder

LARGEST_SEED = 2**32 - 1
"""What numpy takes as a seed at most."""


def check_options(arguments: Mapping[str, Any]) -> None:
    """Check every argument that is a plain option. Raises ConfigError and RunDirectoryError."""
    _check_number(arguments, "num_threads", least=1)
    _check_number(arguments, "max_errors", least=0)
    _check_number(arguments, "seed", least=0, most=LARGEST_SEED)
    _check_number(arguments, "max_rounds", least=1, optional=False)
    for name in ("provide_traceback", "shuffle_trainset_between_steps", "progress", "two_by_two"):
        _check_switch(name, arguments[name], optional=name == "provide_traceback")
    if arguments["on_step_error"] not in ("return", "raise"):
        raise ConfigError(f'on_step_error={arguments["on_step_error"]!r}: give "return" or "raise".')
    require_callbacks(arguments["callbacks"])
    if not isinstance(arguments["budget"], Budget | None):
        raise ConfigError(
            f"budget={arguments['budget']!r} is not allowed: give bettertogether.Budget(minutes=..., metric_calls=..., "
            "tokens=...), or None for no limit."
        )
    if arguments["run_dir"] is not None:
        checked_folder(arguments["run_dir"])


def _check_number(
    arguments: Mapping[str, Any], name: str, *, least: int, most: int | None = None, optional: bool = True
) -> None:
    value = arguments[name]
    if value is None and optional:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"a whole number above {least - 1}" if most is None else f"a whole number from {least} to {most}"
        raise ConfigError(f"{name}={value!r} is not allowed: give {allowed}{', or None' if optional else ''}.")


def _check_switch(name: str, value: Any, *, optional: bool) -> None:
    if (value is None and optional) or (isinstance(value, bool | int) and value in (0, 1)):
        return
    raise ConfigError(f"{name}={value!r} is not allowed: give True or False.")


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
