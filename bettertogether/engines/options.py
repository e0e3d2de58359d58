"""What an engine is made with. Each option says once, at its field, what it may be and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ..checks import with_plain_numbers
from ..errors import ConfigError
from .rendering import DEFAULT_TEMPLATE_KWARGS


@dataclass(frozen=True)
class Rule:
    """Which values an option may have."""

    allows: Callable[[Any], bool]
    description: str


WHOLE = Rule(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
)
SECONDS = Rule(
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
    "a number of seconds above 0",
)
SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")
MAPPING = Rule(lambda value: isinstance(value, Mapping | None), "a mapping or None")
FOLDER = Rule(lambda value: isinstance(value, str | Path | None), "a folder or None")


def option(
    rule: Rule, *, changes_answers: bool = False, own_engine: bool = False, secret: bool = False
) -> dict[str, Any]:
    """What is said of an option beside its default, as the metadata of its field.

    Args:
        rule: Which values it may have.
        changes_answers: Whether another value may give other answers, so that it is part of the model's name; if not,
            it decides only where and how fast the model answers.
        own_engine: Whether each of its values has an engine of its own in a process.
        secret: Whether it is left out of what is saved and of messages.
    """
    return {"rule": rule, "changes_answers": changes_answers, "own_engine": own_engine, "secret": secret}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What engines of every kind take. Raises ConfigError for a value that an option can't have."""

    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, metadata=option(MAPPING, changes_answers=True))
    """Variables for the chat template; {"enable_thinking": False} when None."""
    cache_folder: str | Path | None = field(default=None, metadata=option(FOLDER))
    """Where trained adapters go by default; None: `adapters` in $BETTERTOGETHER_CACHE, or in
    ~/.cache/bettertogether."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        if self.chat_template_kwargs == DEFAULT_TEMPLATE_KWARGS:
            object.__setattr__(self, "chat_template_kwargs", None)
        for each in fields(self):
            value, rule = getattr(self, each.name), each.metadata["rule"]
            if not rule.allows(value):
                shown = "" if each.metadata["secret"] else f"={value!r}"
                raise ConfigError(
                    f"{each.name}{shown} is not allowed (a {type(value).__name__}): give {rule.description}."
                )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options with these values, copied. Raises ConfigError for an unknown name, with those allowed."""
        cls.check_names(given)
        return cls(**{name: as_json(value) for name, value in given.items()})

    @classmethod
    def check_names(cls, given: Mapping[str, Any], *, also: frozenset[str] = frozenset()) -> None:
        """Raises ConfigError for a name that is neither an option nor one of `also`, with those allowed."""
        allowed = cls.names() | also
        if unknown := sorted(str(name) for name in given.keys() - allowed):
            raise ConfigError(f"engine_options {unknown} are not known. Allowed: {sorted(allowed)}.")

    @classmethod
    def names(cls) -> frozenset[str]:
        """Names of all options."""
        return frozenset(each.name for each in fields(cls))

    def resolved(self) -> Self:
        """The same options, with what they come to on this machine in place of "auto"."""
        return self

    def place(self) -> dict[str, Any]:
        """The options of which each value has an engine of its own: where and in what precision the model runs."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata["own_engine"]}

    def decisive(self) -> dict[str, Any]:
        """The options that change the answers."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata["changes_answers"]}

    def traits(self) -> dict[str, Any]:
        """What decides the answers, as JSON."""
        decisive = self.decisive()
        if self.chat_template_kwargs is None:
            decisive["chat_template_kwargs"] = DEFAULT_TEMPLATE_KWARGS
        return {name: as_json(value) for name, value in decisive.items() if value is not None}

    def saved(self) -> dict[str, Any]:
        """All options that are no secret, as JSON."""
        return {each.name: as_json(getattr(self, each.name)) for each in fields(self) if not each.metadata["secret"]}


def as_json(value: Any) -> Any:
    """An option's value as JSON."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value
