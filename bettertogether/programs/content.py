"""What a value holds, as a hash: the same in every process for the same content, another for any other content.

Values are walked as pickle walks them, so that numpy arrays, data frames, images, models and objects of one's own are
told apart by all that they hold, whatever their `repr` says. The order of a dict's entries counts (it shows in a
prompt), that of a set's and of an object's attributes doesn't.
"""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import enum
import hashlib
import marshal
import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import dspy

from ..errors import DataError

_PROTOCOL = 4
"""Of `__reduce_ex__`: the newest that puts the content itself into what it returns."""


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's content. What has none that lasts (a lock, a socket, a generator) counts by its type.

    Raises DataError for what is nested too deep to be walked.
    """
    return Walk().of(value)


def example_content(example: dspy.Example) -> tuple[str, bool]:
    """Hash of an example's fields and of which of them are inputs; and whether all of its content could be seen."""
    walk = Walk()
    return walk.of(_fields(example)), not walk.unseen


def dataset_hash(examples: Iterable[dspy.Example]) -> str:
    """SHA-256 (hex) of a list of examples: their fields, which of them are inputs, and their order."""
    return fingerprint([_fields(example) for example in examples])


def _fields(example: dspy.Example) -> tuple[list[Any], list[Any]]:
    fields, inputs = dict(example.items()), getattr(example, "_input_keys", None)  # Predictions have none.
    return [[name, fields[name]] for name in sorted(fields, key=str)], sorted(inputs or (), key=str)


class Walk:
    """One walk over values; what it meets twice it hashes once."""

    def __init__(self) -> None:
        self.unseen: list[str] = []
        """Types of what was met whose content can't be seen."""
        self._known: dict[int, tuple[Any, bytes]] = {}
        self._path: list[int] = []

    def of(self, value: Any) -> str:
        """The hash of a value, hex. Raises DataError for what is nested too deep."""
        try:
            return self.hashed(value).hex()
        except RecursionError as error:
            raise DataError(f"A {type(value).__name__} is nested too deep to tell its content: flatten it.") from error

    def hashed(self, value: Any) -> bytes:
        """The hash of a value."""
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return combined(type(value).__name__, [plain(value)])
        if _holds_scalars(value):
            # All at once, since an index may have millions; version 2 writes nothing but the content.
            return combined("scalars", [marshal.dumps(value, 2)])
        # What is kept here stays alive with its id; the temporary parts of an object would give theirs away.
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if id(value) in self._path:
            return combined("cycle", [str(len(self._path) - self._path.index(id(value))).encode()])
        self._path.append(id(value))
        try:
            digest = self._walked(value)
        finally:
            self._path.pop()
        self._known[id(value)] = (value, digest)
        return digest

    def _walked(self, value: Any) -> bytes:
        kind = type(value)
        if kind is list or kind is tuple:
            return combined(kind.__name__, map(self.hashed, value))
        if kind is dict or kind is types.MappingProxyType:
            return combined("dict", (self.hashed(part) for item in value.items() for part in item))
        if kind is set or kind is frozenset:
            return combined(kind.__name__, sorted(map(self.hashed, value)))
        if isinstance(value, enum.Enum):
            return combined("enum", [name_of(kind).encode(), str(value.name).encode(), self.hashed(value.value)])
        if isinstance(value, type):
            return self.type_hashed(value)
        if isinstance(value, types.ModuleType):
            return combined("module", [value.__name__.encode()])
        if isinstance(value, types.FunctionType):
            return self.function_hashed(value)
        if isinstance(value, types.MethodType):
            return combined("method", [self.hashed(value.__func__), self.hashed(value.__self__)])
        if isinstance(value, types.CodeType):
            return self._code_hashed(value)
        if kind.__name__ == "TypeAliasType":
            return combined("alias", [repr(value).encode(), self.hashed(_aliased(value))])
        if isinstance(value, types.GenericAlias | types.UnionType) or kind.__module__ in ("typing", "annotationlib"):
            arguments = typing.get_args(value)
            name = str(typing.get_origin(value)) if arguments else repr(value)
            return combined("annotation", [name.encode(), *map(self.hashed, arguments)])
        return self.object_hashed(value)

    def type_hashed(self, value: type) -> bytes:
        """A class counts by its name."""
        return combined("type", [name_of(value).encode()])

    def function_hashed(self, value: types.FunctionType) -> bytes:
        """A function: its code, defaults, attributes, and what it closes over."""
        cells = [cell_content(cell) for cell in value.__closure__ or ()]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, cells, by_name(value.__dict__)]
        return combined("function", [value.__qualname__.encode(), *map(self.hashed, parts)])

    def _code_hashed(self, code: types.CodeType) -> bytes:
        # Not its place in a file: other lines above it change nothing.
        body = _class_body(code) if "__firstlineno__" in code.co_names else (code.co_code, code.co_consts)
        parts = (*body, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        return combined("code", map(self.hashed, parts))

    def object_hashed(self, value: Any) -> bytes:
        """Any other object, by what pickle would keep of it."""
        if isinstance(value, dspy.Example):
            return combined(name_of(type(value)), [self.hashed(_fields(value))])
        if hasattr(type(value), "__pydantic_fields__"):
            # Not which fields were given and which are defaults, which pickle keeps as well.
            state = [value.__dict__, value.__pydantic_extra__, value.__pydantic_private__]
            return combined(name_of(type(value)), [self.hashed(by_name(part or {})) for part in state])
        try:
            reduced = _reduce(value)
        except Exception:
            return self.nothing_seen(value)
        if isinstance(reduced, str):
            return combined("global", [name_of(type(value)).encode(), reduced.encode()])
        function, arguments, state, items, entries = (*reduced, *[None] * 5)[:5]
        state = by_name(self.held(state)) if isinstance(state, dict) else state
        parts = [list(arguments), state, list(items or ()), [list(entry) for entry in entries or ()]]
        return combined(name_of(type(value)), [_name_of_function(function).encode(), *map(self.hashed, parts)])

    def held(self, attributes: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The attributes of an object that count."""
        return attributes

    def nothing_seen(self, value: Any) -> bytes:
        """What has no content to see counts by its type."""
        self.unseen.append(name_of(type(value)))
        return combined("unseen", [name_of(type(value)).encode()])


def _aliased(alias: Any) -> Any:
    try:
        return alias.__value__
    except NameError:
        # A name that exists for the type checker alone.
        return None


def _class_body(code: types.CodeType) -> list[tuple[str, Any]]:
    """The instructions of a class body, but the one that loads its line in the file (Python 3.13 and later)."""
    listed = [(each.opname, each.argval) for each in dis.get_instructions(code)]
    return [each for each, following in pairwise(listed) if following[1] != "__firstlineno__"]


def combined(kind: str, parts: Iterable[bytes]) -> bytes:
    """One hash of several, for a kind of value."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()


_PLAIN: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: hex(value).encode(),
    float: lambda value: b"nan" if value != value else struct.pack("<d", value),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: bytes,
    memoryview: memoryview.tobytes,
}


SCALARS = frozenset({bool, int, float, str, bytes, type(None)})


def _holds_scalars(value: Any, depth: int = 3) -> bool:
    """Whether this is a list, tuple or dict of nothing but plain values, or of such (empty, it is walked)."""
    if type(value) is dict:
        return bool(value) and SCALARS.issuperset(map(type, value)) and _holds_scalars(list(value.values()), depth)
    if type(value) not in (list, tuple) or not value:
        return False
    if SCALARS.issuperset(map(type, value)):
        return True
    return depth > 1 and all(type(each) in SCALARS or _holds_scalars(each, depth - 1) for each in value)


def name_of(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _name_of_function(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def by_name(state: Mapping[Any, Any]) -> list[list[Any]]:
    """Names with values, in the order of the names."""
    return [[str(name), state[name]] for name in sorted(state, key=str)]


def cell_content(cell: types.CellType) -> Any:
    """What a function closes over."""
    try:
        return cell.cell_contents
    except ValueError:
        # A name that is not bound yet.
        return "<empty cell>"


def _reduce(value: Any) -> Any:
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        return type(value), (str(value.dtype), _array(value)), None
    if dataclasses.is_dataclass(value):
        # Its fields, whatever a state of its own leaves out, and what else was set on it.
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        more = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in names}}
        return type(value), (), more
    registered = copyreg.dispatch_table.get(type(value))
    return registered(value) if registered is not None else value.__reduce_ex__(_PROTOCOL)


def _array(tensor: Any) -> Any:
    """A tensor's numbers; pickled, it would differ from one process to the next."""
    try:
        return tensor.numpy(force=True)
    except TypeError:
        # bfloat16, which numpy lacks.
        return tensor.double().numpy(force=True)
