"""Options that are not known, by the names that peft, transformers, trl and DSPy have for ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

from .errors import ConfigError

ClassT = TypeVar("ClassT", bound=type)

FINE_TUNERS: Mapping[str, str] = {
    "train_kwargs": "training=TrainingConfig(...) and lora=LoRAConfig(...)",
    "adapter": "dspy.configure(adapter=...)",
}
"""What DSPy's fine-tuners take, and ours have another way for."""

_names: dict[type, Mapping[str, str]] = {}


def knows(**names: str) -> Callable[[ClassT], ClassT]:
    """Marks a class whose options other libraries call by these `names`, each with what to give here. An option that
    it does not have is a ConfigError that says so, where Python has a TypeError."""

    def marked(cls: ClassT) -> ClassT:
        _names[cls], options = names, inspect.signature(cls).parameters
        made: Callable[..., None] = vars(cls)["__init__"]

        @functools.wraps(made)
        def init(self: Any, *args: Any, **given: Any) -> None:
            if unknown := sorted(given.keys() - options.keys()):
                hints = [
                    f" For {name} give {ours.removesuffix('...')}." for name in unknown for ours in _ours(cls, name)
                ]
                raise ConfigError(
                    f"{cls.__name__} has no option {', '.join(unknown)}.{''.join(hints)} Its options: "
                    f"{', '.join(options)}."
                )
            made(self, *args, **given)

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return marked


def _ours(cls: type, name: str) -> list[str]:
    """What to give for an option of this name: one of the class, or one of a configuration that it takes."""
    if name in _names[cls]:
        return [_names[cls][name]]
    found = []
    for option, taken in inspect.signature(cls).parameters.items():
        kind = type(taken.default)
        if is_dataclass(kind):
            ours = [f"{name}=..."] if name in inspect.signature(kind).parameters else _ours(kind, name)
            found += [f"{option}={kind.__name__}({each})" for each in ours]
    return found
