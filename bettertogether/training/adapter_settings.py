"""The check of an adapter_config.json before anything is done with it: types, and patterns that can't hang a match.
No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError

CONFIG_FILE = "adapter_config.json"
MOST_PATTERNS = 2000
MOST_WAYS = 100_000
"""Ways in which one pattern may match a layer's name, about: each is tried where the match fails at the end."""

_LITERAL = r"[\w-](?![*+?{])|\\[.\-_/](?![*+?{])|\.(?![*+?{])"
_RUN = r"(?:\.|\\d|\[[\w-]+\])[*+]\??"
_ONE = r"\\d(?![*+?{])|\[[\w-]+\](?![*+?{])"
_GROUP = rf"\((?:\?:)?(?:{_LITERAL}|{_ONE}|\|)+\)(?![*+?{{])"
_BOUNDED = re.compile(rf"\^?(?:{_LITERAL}|{_RUN}|{_ONE}|{_GROUP}|\|)*\$?")


def is_bounded(pattern: str) -> bool:
    """Whether a regular expression is one of those for names of layers that no text keeps busy: names, `\\d+`, `.*`,
    `[a-z]`, alternatives `(a|b)`, no repeated group, and few ways to match."""
    if len(pattern) > 2000 or _BOUNDED.fullmatch(pattern) is None:
        return False
    runs = (3 if run.startswith(r"\d") else 40 for run in re.findall(_RUN, pattern))
    choices = (group.count("|") + 1 for group in re.findall(_GROUP, pattern))
    return math.prod(runs) * math.prod(choices) <= MOST_WAYS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | None)


def _is_names(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_layers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, int | None) and not isinstance(item, bool) for item in values)


def _is_values_by_pattern(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(_is_number(item) for item in value.values()))


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (_is_switch, "true or false"),
    "fan_in_fan_out": (_is_switch, "true or false"),
    "target_modules": (_is_names, "names of layers"),
    "exclude_modules": (_is_names, "names of layers"),
    "layers_pattern": (_is_names, "names of layers"),
    "layers_to_transform": (_is_layers, "whole numbers"),
    "rank_pattern": (_is_values_by_pattern, "layers to ranks"),
    "alpha_pattern": (_is_values_by_pattern, "layers to numbers"),
}


def check_settings(path: Path, config: Any) -> None:
    """Raise ModelError, naming the file, for settings of a wrong type and for patterns that could hang a match."""
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: a mapping is needed, it holds {type(config).__name__}.")
    for name, (check, needed) in _CHECKS.items():
        if name in config or name in ("r", "lora_alpha"):
            value = config.get(name)
            if not check(value):
                raise ModelError(f"{path} is damaged: {name} must be {needed}, it is {value!r:.100}.")
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    layers = config.get("layers_pattern") or []
    patterns += [layers] if isinstance(layers, str) else layers
    patterns += [value for name in ("target_modules", "exclude_modules") if isinstance(value := config.get(name), str)]
    if len(patterns) > MOST_PATTERNS:
        raise ModelError(f"{path} holds {len(patterns)} patterns, allowed are {MOST_PATTERNS}.")
    for pattern in patterns:
        if not is_bounded(pattern):
            raise ModelError(
                f"{path} holds the pattern {pattern!r:.100}, which is not taken: matching it could take for ever. "
                "Allowed are names of layers with a few of `\\d+`, `.*`, `[a-z]` and `(a|b)`."
            )
