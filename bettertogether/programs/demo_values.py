"""Demos as JSON and back, so that a restored prompt is byte for byte the one that was scored.

Plain JSON values stand for themselves. Anything else is `{"$type": name, "value": ...}`, where the name is one of the
fixed tables here, or a class that the predictor's own signature mentions: reading imports nothing, calls no
constructor, validator or function that the text names, and makes objects of no other class.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import dspy
import pydantic
from dspy.adapters.utils import format_field_value, serialize_for_json

from ..errors import ArtifactError
from .signature_types import classes_of, full_name, is_named_tuple

_TAG = "$type"
_INPUTS = "$inputs"
"""Key of a demo for the names of its input fields (`Example.with_inputs`)."""

T = TypeVar("T", bound="set[Any] | frozenset[Any]")


class _Unknown(Exception):
    """A value of a type that neither a table nor the signature has."""


@dataclass(frozen=True)
class _Kind:
    """How values of exactly one type are taken apart and put together."""

    type: Any
    parts: Callable[[Any], Any]
    build: Callable[[Any], Any]


class _Ordered:
    """A set that iterates as it did where it was written: the order shows in the prompt, and depends on the process."""

    order: tuple[Any, ...]

    def __iter__(self) -> Iterator[Any]:
        yield from (item for item in self.order if item in self)
        yield from (item for item in super().__iter__() if item not in self.order)  # type: ignore[misc]

    def __repr__(self) -> str:
        items = f"{{{', '.join(map(repr, self))}}}"
        return items if isinstance(self, set) else f"frozenset({items})"

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> Any:
        any_schema = pydantic.TypeAdapter(Any).core_schema
        return {**any_schema, "serialization": {"type": "function-plain", "function": list}}


class _OrderedSet(_Ordered, set[Any]): ...


class _OrderedFrozenSet(_Ordered, frozenset[Any]): ...


def _set_builder(plain: Callable[[Any], T], ordered: Callable[[Any], Any]) -> Callable[[Any], T]:
    def build(items: list[Any]) -> T:
        made = plain(items)
        if list(made) == items:
            return made
        made = ordered(items)
        made.order = tuple(items)
        return made

    return build


def _timedelta_parts(value: datetime.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _defaultdict_parts(value: defaultdict[Any, Any]) -> list[Any]:
    for name, factory in _FACTORIES.items():
        if factory is value.default_factory:
            return [name, dict(value)]
    raise _Unknown(f"its values begin with {value.default_factory!r}, not one of {list(_FACTORIES)}")


_FACTORIES: dict[str, Any] = {
    "None": None, "list": list, "dict": dict, "set": set, "tuple": tuple, "int": int, "float": float, "bool": bool,
    "str": str,
}  # fmt: skip
"""What a value of a `defaultdict` begins with."""
_KINDS: dict[str, _Kind] = {
    "tuple": _Kind(tuple, list, tuple),
    "set": _Kind(set, list, _set_builder(set, _OrderedSet)),
    "frozenset": _Kind(frozenset, list, _set_builder(frozenset, _OrderedFrozenSet)),
    "dict": _Kind(dict, lambda value: [[key, item] for key, item in value.items()], dict),
    "defaultdict": _Kind(defaultdict, _defaultdict_parts, lambda parts: defaultdict(_FACTORIES[parts[0]], parts[1])),
    "float": _Kind(float, str, float),
    "complex": _Kind(complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "bytes": _Kind(bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "date": _Kind(datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "datetime": _Kind(datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "time": _Kind(datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": _Kind(datetime.timedelta, _timedelta_parts, lambda parts: datetime.timedelta(*parts)),
    "Decimal": _Kind(decimal.Decimal, str, decimal.Decimal),
    "UUID": _Kind(uuid.UUID, str, uuid.UUID),
    "Path": _Kind(type(pathlib.Path()), str, pathlib.Path),
    "PurePosixPath": _Kind(pathlib.PurePosixPath, str, pathlib.PurePosixPath),
    "PureWindowsPath": _Kind(pathlib.PureWindowsPath, str, pathlib.PureWindowsPath),
    "AnyUrl": _Kind(pydantic.AnyUrl, str, pydantic.AnyUrl),
    "AnyHttpUrl": _Kind(pydantic.AnyHttpUrl, str, pydantic.AnyHttpUrl),
    "HttpUrl": _Kind(pydantic.HttpUrl, str, pydantic.HttpUrl),
    "FileUrl": _Kind(pydantic.FileUrl, str, pydantic.FileUrl),
}
_OF_TYPE = {kind.type: name for name, kind in _KINDS.items()}
_ARRAY_KINDS = "biufcSUMm"
_MOST_FLOAT_BYTES = {"f": 8, "c": 16}
"""Sizes of numpy's numbers that Python's own hold exactly."""


def encode_demos(predictor: dspy.Predict, name: str) -> list[dict[str, Any]]:
    """A predictor's demos as JSON. Raises ArtifactError, naming field and type, for one that can't be restored."""
    codec = _Codec(predictor.signature)
    return [codec.encode_demo(demo, name) for demo in predictor.demos]


def encode_demo(predictor: dspy.Predict, demo: Any, name: str) -> dict[str, Any]:
    """One demo of a predictor as JSON. Raises ArtifactError as `encode_demos` does."""
    return _Codec(predictor.signature).encode_demo(demo, name)


def decode_demos(predictor: dspy.Predict, saved: Any, name: str) -> list[dspy.Example]:
    """Inverse of `encode_demos`, for a predictor of the same signature. Raises ArtifactError."""
    codec = _Codec(predictor.signature)
    if not isinstance(saved, list):
        raise ArtifactError(f"The demos of {name!r} are damaged: a list was saved, not {saved!r:.80}.")
    return [codec.decode_demo(demo, name) for demo in saved]


class _Codec:
    """Values of one signature to JSON and back."""

    def __init__(self, signature: type[dspy.Signature]) -> None:
        self._signature = signature

    @cached_property
    def _classes(self) -> dict[str, type]:
        return classes_of(self._signature)

    def encode_demo(self, demo: Any, predictor: str) -> dict[str, Any]:
        """JSON form of a demo: a `dspy.Example`, or a dict."""
        encoded = {}
        for field, value in demo.items():
            try:
                encoded[field] = self._encode_field(field, value)
            except Exception as error:
                raise ArtifactError(
                    f"The demos of {predictor!r} can't be saved: field {field!r} holds a {full_name(type(value))} "
                    f"({error}). Give the field a type that pydantic can write as JSON, or leave such demos out."
                ) from error
        inputs = getattr(demo, "_input_keys", None)
        return encoded if inputs is None else {**encoded, _INPUTS: sorted(inputs)}

    def decode_demo(self, saved: Any, predictor: str) -> dspy.Example:
        """The demo of its JSON form."""
        try:
            fields = dict(saved)
            inputs = fields.pop(_INPUTS, None)
            demo = dspy.Example({field: self._decode(value) for field, value in fields.items()})
        except Exception as error:
            raise ArtifactError(
                f"A demo of {predictor!r} is damaged, or was saved by another version ({error!r:.200}): save the "
                "program again."
            ) from error
        return demo if inputs is None else demo.with_inputs(*inputs)

    def _encode_field(self, field: str, value: Any) -> Any:
        """Exactly where the types are known; else as the text or JSON that adapters write for it."""
        info = self._signature.fields.get(field)
        try:
            encoded = self._encode(value)
        except _Unknown:
            encoded = self._encode(serialize_for_json(value))
        if info is None or _is_plain(value):
            return encoded
        shown, restored = _shown(info, value), _shown(info, self._decode(encoded))
        if shown != restored:
            raise _Unknown("a prompt would show it otherwise after restoring")
        if any(" at 0x" in text for text in shown):
            raise _Unknown("a prompt shows its address in memory, not its content")
        return encoded

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is list:
            return [self._encode(item) for item in value]
        if kind is dict and _TAG not in value and all(type(key) is str for key in value):
            return {key: self._encode(item) for key, item in value.items()}
        name, parts = self._taken_apart(value)
        return {_TAG: name, "value": self._encode(parts)}

    def _taken_apart(self, value: Any) -> tuple[str, Any]:
        kind = type(value)
        if kind in _OF_TYPE:
            return _OF_TYPE[kind], _KINDS[_OF_TYPE[kind]].parts(value)
        if isinstance(value, _Ordered):
            return "set" if isinstance(value, set) else "frozenset", list(value)
        if kind.__module__ == "numpy":
            return _array_parts(value)
        if kind.__module__.partition(".")[0] == "pandas" and kind.__name__ in ("Timestamp", "Timedelta"):
            return f"pandas.{kind.__name__}", value.isoformat()
        name = full_name(kind)
        if self._classes.get(name) is kind:
            return name, _object_parts(value)
        raise _Unknown(f"{name} is not a type of the signature")

    def _decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self._decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        if _TAG not in data:
            return {key: self._decode(item) for key, item in data.items()}
        name, parts = data[_TAG], self._decode(data["value"])
        if name in _KINDS:
            return _KINDS[name].build(parts)
        if name in ("numpy.ndarray", "numpy.generic"):
            return _array_of(name, *parts)
        if name in ("pandas.Timestamp", "pandas.Timedelta"):
            return _pandas_value(name, parts)
        return _object_of(self._class_named(name), parts)

    def _class_named(self, name: str) -> type:
        """A class of the signature. That of another module counts where there is no other of its name: what a script
        defines is in `__main__` only while the script runs."""
        short = name.rpartition(":")[2]
        alike = [kind for known, kind in self._classes.items() if known.rpartition(":")[2] == short]
        if name in self._classes:
            return self._classes[name]
        if len(alike) != 1:
            raise ValueError(f"{name} is no type of the signature, which has {sorted(self._classes)}")
        return alike[0]


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _shown(info: Any, value: Any) -> tuple[str, ...]:
    """A value as DSPy's adapters write it: by itself, and as a part of a JSON object."""
    return str(format_field_value(info, value)), json.dumps(serialize_for_json({"value": value}))


def _array_parts(value: Any) -> tuple[str, Any]:
    import numpy as np

    dtype = getattr(value, "dtype", None)
    exact = type(value) is np.ndarray or isinstance(value, np.generic)
    if not exact or dtype is None or dtype.kind not in _ARRAY_KINDS:
        raise _Unknown(f"{full_name(type(value))} of {dtype}")
    if dtype.itemsize > _MOST_FLOAT_BYTES.get(dtype.kind, dtype.itemsize):
        raise _Unknown(f"{dtype} is longer than a Python number")
    flat = np.asarray(value).reshape(-1)
    items = flat.astype("i8").tolist() if dtype.kind in "Mm" else flat.tolist()
    name = "numpy.ndarray" if isinstance(value, np.ndarray) else "numpy.generic"
    return name, [dtype.str, list(np.shape(value)), items]


def _array_of(name: str, dtype: str, shape: list[int], items: list[Any]) -> Any:
    import numpy as np

    kind = np.dtype(dtype)
    if kind.kind not in _ARRAY_KINDS:
        raise ValueError(f"arrays of {dtype!r} are not read")
    array = np.array(items, "i8").astype(kind) if kind.kind in "Mm" else np.array(items, kind)
    return array.reshape(shape) if name == "numpy.ndarray" else array[0]


def _pandas_value(name: str, text: str) -> Any:
    import pandas as pd

    return pd.Timestamp(text) if name == "pandas.Timestamp" else pd.Timedelta(text)


def _object_parts(value: Any) -> Any:
    """What makes up an object of one of the signature's classes."""
    if isinstance(value, enum.Enum):
        if value.name not in type(value).__members__:
            raise _Unknown(f"{value!r} has no name")
        return value.name
    if isinstance(value, pydantic.BaseModel):
        fields = {name: part for name, part in value.__dict__.items() if name in type(value).model_fields}
        return {**fields, **(value.model_extra or {})}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return list(value)


def _object_of(kind: type, parts: Any) -> Any:
    """Inverse of `_object_parts`. Nothing is validated again, which might change it, or read the file of an image."""
    if issubclass(kind, enum.Enum):
        return kind[parts]
    if issubclass(kind, pydantic.BaseModel):
        return kind.model_construct(**parts)
    if is_named_tuple(kind):
        return kind._make(parts)  # type: ignore[attr-defined]
    made = object.__new__(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(parts, Mapping) or names != parts.keys():
        raise ValueError(f"{full_name(kind)} has the fields {sorted(names)}, not {parts!r:.80}")
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    return made
