"""Reading records and reports back, with a check, since a report may come with a foreign artifact. What is only shown
may be any plain value: whoever shows it escapes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic

from ..errors import DataError

SCHEMA = 2
"""Version of the JSON form of a report and of a record. Schema 1, whose details were a dict, is read as well."""

Count = Annotated[int, pydantic.Field(ge=0, strict=True)]
Whole = Annotated[int, pydantic.Field(strict=True)]
Number = Annotated[float, pydantic.Field(strict=True)]
Finite = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, pydantic.Field(strict=True)]
Plain = str | int | float | bool | None
SHOWN = pydantic.GetPydanticSchema(lambda _, schema_of: schema_of(Plain))
"""Marks what is only shown: an `Annotated[int, SHOWN]` is read back as whatever plain value it is."""


class Saved:
    """Base of the dataclasses that are read back from JSON: unknown fields are refused."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")


SavedT = TypeVar("SavedT", bound=Saved)
Fields = dict[str, Any]
_readers: dict[type[Any], pydantic.TypeAdapter[Any]] = {}


def read(kind: type[SavedT], name: str, data: Any, upgrade: Callable[[Fields], Fields]) -> SavedT:
    """The value with the JSON form `data`. Raises DataError for another schema, and for a missing, unknown or wrong
    field, of which it names the first. `upgrade` takes the fields of schema 1 to those of today."""
    fields = current_fields(name, data, upgrade)
    try:
        return _reader(kind).validate_python(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise DataError(
            f"The {name} is damaged at {place}: {first['msg']}, got {first['input']!r:.100}. Take the file as it was "
            "written."
        ) from error


def current_fields(name: str, data: Any, upgrade: Callable[[Fields], Fields]) -> Any:
    """`data` without its schema number, in the form of today. Raises DataError for another schema."""
    if not isinstance(data, Mapping):
        return data
    fields = {key: value for key, value in data.items() if key != "schema"}
    schema = data.get("schema")
    if schema == SCHEMA:
        return fields
    if schema == 1:
        return upgrade(fields)
    raise DataError(f"{name} with schema {schema!r}; this version reads schemas 1 and {SCHEMA}")


def _reader(kind: type[SavedT]) -> pydantic.TypeAdapter[SavedT]:
    if kind not in _readers:
        _readers[kind] = pydantic.TypeAdapter(kind)
    return _readers[kind]
