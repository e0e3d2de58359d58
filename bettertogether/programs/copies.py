"""Copies of programs: modules, their prompts and what they keep are copied, all that they hold besides is shared.

A program may hold much that is no module: a search index, a client, a corpus. Sixty copies of it at once, one for each
thread that samples, would not fit into memory.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import copy
import gc
import threading
import types
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.predict.parameter import Parameter
from pydantic import BaseModel

from ..records.saved import Saved
from .code import held_by_code

RESULTS = (
    "candidate_programs", "mb_candidate_programs", "trial_logs", "detailed_results", "report",
    "flag_compilation_error_occurred",
)  # fmt: skip
"""Names of what optimizers hang on the program that they return: other programs and reports, no part of it."""

_PARTS = (dspy.Module, Parameter)
_LEFT_OUT = frozenset({"history", "callbacks"})
_CONTAINERS = (list, dict, set, collections.deque, defaultdict, collections.OrderedDict, collections.Counter)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type)
_RUNNING = (threading.Thread, concurrent.futures.Executor, asyncio.AbstractEventLoop, contextvars.Context)
_CODE = (types.FunctionType, types.ModuleType, types.FrameType, types.GeneratorType, types.CoroutineType)
_CLOSED = (*_ATOMS, *_RUNNING, *_CODE, dspy.BaseLM)
"""Types whose objects are shared without a look into them."""

MOST_KEPT = 1000
"""Containers and records within a container or record that are copied with it: more are a corpus."""


def copy_program(program: dspy.Module) -> dspy.Module:
    """A copy with modules, predictors and demos of its own, without `RESULTS`.

    Shared with the original are LMs, signatures, and every object that no module can be reached from. An object that
    refers to a module of the program, such as a tool that is its method, is copied and then refers to the copy; where
    it can't be copied, it is shared too. What a module keeps is copied, so that what a candidate keeps, such as
    answers, does not reach another: its lists, dicts, sets and pydantic models (`dspy.History`), and those within them
    (`MOST_KEPT` at most). Of these are shared those that something shared holds too, such as the closure of a tool.
    """
    return Copier(program).copy()


class Copier:
    """Makes copies of one program, as `copy_program` does, with one look at all that it holds. With `shares_state` the
    copies share what their modules keep, as it was at that look, as the threads of `dspy.Evaluate` do."""

    def __init__(self, program: dspy.Module, *, shares_state: bool = False) -> None:
        self._program = program
        self._graph = _Graph(program)
        self._memo = self._graph.shared()
        if shares_state and (kept := self._graph.kept()):
            self._memo |= dict(zip(map(id, kept), self._copied(kept, kept), strict=True))

    def copy(self) -> dspy.Module:
        """One more copy."""
        copied: dspy.Module = self._copied(self._program, self._graph.copied())
        drop_results(copied)
        return copied

    def _copied(self, value: Any, parts: list[Any]) -> Any:
        try:
            return copy.deepcopy(value, _with_copies(parts, self._memo))
        except Exception:
            self._memo |= _uncopyable(self._graph.copied(), self._memo)
            return copy.deepcopy(value, _with_copies(parts, self._memo))


def results_of(module: Any) -> dict[str, Any]:
    """What optimizers hung on a module, by name. A module of its own by such a name is part of it, and so is every
    `report` that is not a run's."""
    held = {name: vars(module)[name] for name in RESULTS if name in vars(module)}
    return {
        name: value
        for name, value in held.items()
        if not isinstance(value, dspy.Module) and (name != "report" or isinstance(value, Saved))
    }


def own_attributes(module: Any) -> dict[str, Any]:
    """The attributes of a module without its history and callbacks, and without what optimizers hung on it."""
    left_out = _LEFT_OUT | results_of(module).keys()
    return {name: value for name, value in list(vars(module).items()) if name not in left_out}


def has_own(module: Any, name: str) -> bool:
    """Whether a module has an attribute or a method of its own by the name of a result."""
    return hasattr(module, name) and name not in results_of(module)


def hang(program: dspy.Module, **results: Any) -> None:
    """Hang results on a program; what it has of its own by such a name stays."""
    for name, value in results.items():
        if not has_own(program, name):
            setattr(program, name, value)


def drop_results(program: dspy.Module) -> None:
    """Take what an optimizer hung on a program off it."""
    for name in results_of(program):
        del program.__dict__[name]


class _Graph:
    """The objects that a program is made of, and which of them are copied."""

    def __init__(self, program: dspy.Module) -> None:
        self._objects: dict[int, Any] = {}
        self._parents: dict[int, list[int]] = defaultdict(list)
        self._own: set[int] = set()
        """Those that are copied whatever they hold: modules, demos, what modules keep."""
        self._kept: dict[int, Any] = {}
        """What modules keep, those aside that are predictors."""
        waiting: list[Any] = [program]
        predictors = set[int]()
        while waiting:
            value = waiting.pop()
            if id(value) in self._objects:
                continue
            self._objects[id(value)] = value
            if isinstance(value, _PARTS):
                state = _state_of(value)
                self._own.update(map(id, (value, *state)))
                if isinstance(value, dspy.Predict):
                    predictors.update(map(id, state))
                else:
                    self._kept |= {id(each): each for each in state}
            for child in _children(value):
                self._parents[id(child)].append(id(value))
                # What the garbage collector does not track refers to nothing.
                if gc.is_tracked(child):
                    waiting.append(child)
        reaching = self._reaching_modules()
        self._copied = reaching | self._own
        for key in self._kept.keys() & (reaching | predictors):
            del self._kept[key]
        held = self._held_by_shared() if self._kept else set()
        self._copied -= held
        for key in held:
            del self._kept[key]

    def _held_by_shared(self) -> set[int]:
        """What modules keep that something shared refers to as well, which would not see the changes of a copy."""
        code = [value for value in self._objects.values() if isinstance(value, types.FunctionType)]
        kinds = set(map(type, self._objects.values()))
        waiting = [id(value) for value in held_by_code([*code, *kinds])]
        waiting += [key for key in self._kept if not self._copied.issuperset(self._parents[key])]
        found: set[int] = set()
        while waiting:
            key = waiting.pop()
            if key in self._kept and key not in found:
                found.add(key)
                waiting.extend(map(id, _children(self._kept[key])))
        return found

    def _reaching_modules(self) -> set[int]:
        waiting = [key for key, value in self._objects.items() if isinstance(value, _PARTS)]
        found: set[int] = set()
        while waiting:
            key = waiting.pop()
            if key not in found:
                found.add(key)
                waiting.extend(self._parents[key])
        return found

    def kept(self) -> list[Any]:
        """What modules keep that no module can be reached from."""
        return list(self._kept.values())

    def copied(self) -> list[Any]:
        """The objects that are copied."""
        return [value for key, value in self._objects.items() if key in self._copied]

    def shared(self) -> dict[int, Any]:
        """A memo for `deepcopy`, in which what is shared was copied before, as itself."""
        memo: dict[int, Any] = {}
        for value in self.copied():
            for child in (*_children(value), *_results(value)):
                if id(child) not in self._copied:
                    memo[id(child)] = child
        return memo


def _state_of(module: Any) -> list[Any]:
    kept: dict[int, Any] = {}
    for value in _children(module):
        if _is_kept(value):
            kept |= {id(value): value, **_within(value)}
    demos = getattr(module, "demos", None) if isinstance(module, dspy.Predict) else None
    return [*kept.values(), *(demo for demo in demos or () if isinstance(demo, dspy.Example | dict))]


def _within(value: Any) -> dict[int, Any]:
    """The containers and records within one; none of them where there are more than `MOST_KEPT`."""
    found: dict[int, Any] = {}
    waiting = _children(value)
    while waiting and len(found) <= MOST_KEPT:
        each = waiting.pop()
        if id(each) not in found and _is_kept(each):
            found[id(each)] = each
            waiting.extend(_children(each))
    return found if len(found) <= MOST_KEPT else {}


def _is_kept(value: Any) -> bool:
    return type(value) in _CONTAINERS or _is_record(value)


def _is_record(value: Any) -> bool:
    return isinstance(value, BaseModel) and not isinstance(value, dspy.Tool)


def _children(value: Any) -> list[Any]:
    """What an object refers to, but atoms."""
    if isinstance(value, _CLOSED):
        return []
    if isinstance(value, _PARTS):
        found = list(own_attributes(value).values())
    elif isinstance(value, dspy.Example):
        found = list(value._store.values())
    elif type(value) in _CONTAINERS:
        found = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    elif isinstance(value, BaseModel):
        found = [item for part in _parts_of(value) for item in part.values()]
    else:
        found = gc.get_referents(value)
    return [item for item in found if not isinstance(item, _ATOMS)]


def _parts_of(record: BaseModel) -> list[dict[str, Any]]:
    return [part for part in (vars(record), record.__pydantic_extra__, record.__pydantic_private__) if part]


def _results(value: Any) -> list[Any]:
    return list(results_of(value).values()) if isinstance(value, _PARTS) else []


def _with_copies(values: list[Any], memo: Mapping[int, Any]) -> dict[int, Any]:
    """A memo for `deepcopy` with copies of containers and records besides. They are made before what is in them, so
    that it may be nested to any depth."""
    apart = [value for value in values if id(value) not in memo and _is_plain(value)]
    made = {id(value): value.__copy__() if isinstance(value, BaseModel) else copy.copy(value) for value in apart}
    whole = {**memo, **made}
    for copied in made.values():
        _fill(copied, whole)
    return whole


def _is_plain(value: Any) -> bool:
    """Whether a container or record is copied as all of its kind are."""
    is_record = _is_record(value) and type(value).__deepcopy__ is BaseModel.__deepcopy__
    return type(value) in _CONTAINERS or (is_record and type(value).__copy__ is BaseModel.__copy__)


def _fill(copied: Any, memo: dict[int, Any]) -> None:
    """Put copies into a shallow copy for what it holds."""
    if isinstance(copied, BaseModel):
        for part in _parts_of(copied):
            _fill(part, memo)
    elif isinstance(copied, dict):
        items = [(copy.deepcopy(key, memo), copy.deepcopy(value, memo)) for key, value in copied.items()]
        copied.clear()
        for key, value in items:
            copied[key] = value
        if isinstance(copied, defaultdict):
            copied.default_factory = copy.deepcopy(copied.default_factory, memo)
    else:
        values = [copy.deepcopy(value, memo) for value in copied]
        copied.clear()
        (copied.update if isinstance(copied, set) else copied.extend)(values)


def _uncopyable(values: list[Any], memo: Mapping[int, Any]) -> dict[int, Any]:
    """Those of the values that can't be copied, as a memo for `deepcopy`."""
    apart = {id(value): value for value in values if not isinstance(value, _PARTS) and not _is_plain(value)}
    failing = {key: value for key, value in apart.items() if not _can_copy(value, memo)}
    # A bound method or a tool may fail only for what the program that it is bound to holds: it is copied, and bound
    # to the copy.
    return {
        key: value
        for key, value in failing.items()
        if not _can_copy(value, {**memo, **{other: failing[other] for other in failing if other != key}})
    }


def _can_copy(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True
