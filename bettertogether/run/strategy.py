"""A strategy such as "p -> w -> p" as steps, and every error a strategy can have."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..errors import StrategyError
from ..records import ARROW

AUTO = "auto"

_DEFAULTS = {"p": "BootstrapFewShotRS(metric)", "w": "LoRAFinetune(metric)"}

Steps = tuple[str, ...]


def parse(strategy: str | Sequence[str], keys: Collection[str]) -> tuple[Steps, ...]:
    """The strategies asked for, each a tuple of step keys; white space around arrows does not matter.

    `strategy` is one string or a list of them; `keys` are the optimizers there are.
    Raises StrategyError for an empty strategy, an empty step or an unknown key.
    """
    texts = (list(strategy) or [""]) if isinstance(strategy, list | tuple) else [strategy]
    return tuple(dict.fromkeys(_parse_one(text, keys) for text in texts))


def _parse_one(text: object, keys: Collection[str]) -> Steps:
    if not isinstance(text, str):
        raise StrategyError(f'strategy must be text such as "p -> w -> p" or a list of such texts, got {text!r}.')
    if not text.strip():
        raise StrategyError('strategy cannot be empty: give one such as "p -> w -> p".')
    steps = tuple(step.strip() for step in re.split(r"->|→", text))
    invalid = list(dict.fromkeys(step for step in steps if step not in keys))
    if invalid:
        missing = " and ".join(f"{key}={made}" for key, made in _DEFAULTS.items() if key in invalid)
        add = f" Optimizers that are given replace the defaults: add {missing}, or name these keys." if missing else ""
        raise StrategyError(
            f"Strategy contains invalid optimizer keys: {invalid}. Valid keys are: {list(keys)}, "
            f'joined by "->", as in {ARROW.join(list(keys)[:2])!r}.{add}'
        )
    return steps


def join(steps: Steps) -> str:
    """The strategy as text; "" for no steps, the untouched program."""
    return ARROW.join(steps)


def prefixes(strategies: Sequence[Steps]) -> list[Steps]:
    """Every distinct non-empty prefix, in an order in which a prefix comes after its own prefixes."""
    seen: dict[Steps, None] = {}
    for steps in strategies:
        for length in range(1, len(steps) + 1):
            seen.setdefault(steps[:length])
    return list(seen)
