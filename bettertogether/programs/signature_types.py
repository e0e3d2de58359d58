"""The classes that a signature's annotations mention: what its demos may be made of."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Iterator
from typing import Any

import dspy
import pydantic


def full_name(kind: type) -> str:
    """ "module:Class"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def is_named_tuple(kind: type) -> bool:
    """Whether a class is a `typing.NamedTuple` or a `collections.namedtuple`."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and hasattr(kind, "_make")


def classes_of(signature: type[dspy.Signature]) -> dict[str, type]:
    """Name to class, of the enums, pydantic models, dataclasses and named tuples in a signature's annotations and in
    the fields of those. DSPy's own types (images, tools, ...) are not among them: adapters write them as text."""
    found: dict[str, type] = {}
    waiting = [field.annotation for field in signature.fields.values()]
    seen: set[int] = set()
    while waiting:
        annotation = waiting.pop()
        if id(annotation) in seen:
            continue
        seen.add(id(annotation))
        waiting.extend([*typing.get_args(annotation), getattr(annotation, "__value__", None)])
        if isinstance(annotation, enum.Enum):
            # Of a Literal.
            waiting.append(type(annotation))
        if isinstance(annotation, type) and not issubclass(annotation, dspy.Type):
            if _is_made_of_fields(annotation):
                found[full_name(annotation)] = annotation
            waiting.extend(_inner(annotation))
    return found


def _is_made_of_fields(kind: type) -> bool:
    known = issubclass(kind, enum.Enum | pydantic.BaseModel) and kind not in (enum.Enum, pydantic.BaseModel)
    return known or dataclasses.is_dataclass(kind) or is_named_tuple(kind)


def _inner(kind: type) -> Iterator[Any]:
    """Annotations of a class's own fields."""
    if issubclass(kind, pydantic.BaseModel):
        yield from (field.annotation for field in kind.model_fields.values())
    else:
        yield from _hints(kind).values()


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError):
        # A name that exists for the type checker alone.
        return {}
