"""What code of the user's names and holds: functions and classes, in the modules that they were written in."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from .content import cell_content

ACCESSOR = property | classmethod | staticmethod | functools.cached_property


def accessors(value: Any) -> list[Any]:
    """The functions of a property, a class method and the like."""
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    return [value.func if isinstance(value, functools.cached_property) else value.__func__]


def held_by_code(values: Iterable[Any]) -> Iterator[Any]:
    """What functions and classes among the values hold or name, and those that they hold or name in turn: values closed
    over, defaults, globals, attributes of classes, modules and objects of the user's. Not what `__init__` names: it has
    run."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            waiting.extend(_held_by_function(value))
        elif isinstance(value, ACCESSOR):
            waiting.extend(accessors(value))
        elif isinstance(value, type):
            parts = [part for base in value.__mro__ if is_own(base) for part in vars(base).items()]
            waiting.extend(part for name, part in parts if name != "__init__")
        else:
            yield value
            if is_own(type(value)):
                waiting += [type(value), *getattr(value, "__dict__", {}).values()]


def _held_by_function(function: types.FunctionType) -> list[Any]:
    held = [*map(cell_content, function.__closure__ or ()), *(function.__defaults__ or ())]
    named = [value for _, value in named_values(function)] if is_own(function) else []
    return [*held, *(function.__kwdefaults__ or {}).values(), *named]


def named_values(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function names in its own module, and in other modules of the user's: functions, classes, constants and
    objects; but no global that it assigns to as it runs."""
    home = function.__globals__
    read, attributes, assigned = _names(function.__code__)
    for name in sorted(read & home.keys() - assigned):
        value = home[name]
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif _module_is_own(value.__name__):
            yield from ((f"{name}.{part}", vars(value)[part]) for part in sorted(attributes & vars(value).keys()))


_READING = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Globals that code reads, attributes that it reads, globals that it assigns to."""
    steps = list(dis.get_instructions(code))
    read = {step.argval for step in steps if step.opname in _READING}
    attributes = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    assigned = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            read, attributes, assigned = read | inner[0], attributes | inner[1], assigned | inner[2]
    return frozenset(read), frozenset(attributes), frozenset(assigned)


def is_own(value: Any) -> bool:
    """Whether a class or function is the user's: of no installed package, not of Python itself."""
    return _module_is_own(getattr(value, "__module__", None) or "builtins")


OURS = frozenset({"bettertogether", "dspy", "builtins"})


@functools.lru_cache(maxsize=10_000)
def _module_is_own(name: str) -> bool:
    top = name.partition(".")[0]
    if top in OURS or (top in sys.stdlib_module_names and top != "__main__"):
        return False
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if {"site-packages", "dist-packages"} & set(file.parts):
        return False
    return not any(top in _installed(place.parent) for place in (file, *file.parents) if place.stem == top)


@functools.lru_cache(maxsize=1000)
def _installed(folder: Path) -> frozenset[str]:
    """Top-level names of what pip put into a folder of any name (`pip install --target`)."""
    records = [record.read_text(encoding="utf-8") for record in folder.glob("*.dist-info/RECORD")]
    return frozenset(PurePath(line.partition("/")[0]).stem for record in records for line in record.splitlines())
