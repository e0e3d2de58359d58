"""What a call of `compile` asked for: all that decides its result, as names and texts that a user can compare.

Code, values and data that are too long to be shown are named by a hash of their content. Noted are the code of the
program, of the teachers and of the metric, with what they call and hold; the models with their options; the optimizers
with theirs; the data; and the settings of DSPy that change an answer. Not noted is what only changes the pace
(threads, batch sizes, the device), who watches, and what has no content that lasts from one process to the next: locks,
open files, clients of services, random states count by their type. No secret is noted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import platform
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.base_lm import BaseLM
from dspy.teleprompt.teleprompt import Teleprompter

from ..printable import get_logger
from ..programs.behaviour import (
    NOISE,
    BehaviourWalk,
    answering_attributes,
    class_parts,
    lm_parts,
    signature_parts,
)
from ..programs.code import is_own, named_values
from ..programs.content import cell_content, dataset_hash
from ..programs.program import model_names, modules_of, predictors_of
from ..redaction import is_secret, is_secret_name, masked_forms, split_secrets
from ..versions import versions
from .any_optimizer import METRICS, in_turn
from .plan import Plan
from .same_call import WHOLE

logger = get_logger(__name__)

FORM = 2
"""Of what is noted here. Other forms can't be compared."""

_SHORT = 100
"""Characters of a value that is shown as it is."""

_PACE = frozenset({"num_threads", "folder", "log_dir", "verbose", "last"})
"""Attributes of optimizers that are no setting which decides a result, and the result that ours keep."""

Noted = dict[str, Any]

_OF_OPTIMIZERS = ("optimizers",)

_CHANGED: dict[tuple[str, ...], dict[str, Any]] = {}
"""What runs of this process changed of metrics and programs: by its names, what was noted after a run, as JSON, to what
was noted before it. By names, as a program made anew may hold what an earlier one held."""
_WORKED: dict[int, tuple[Noted, Noted]] = {}
"""By the id of an optimizer, what was noted of it before its first step in this process, and after its latest."""


@contextlib.contextmanager
def asking(plan: Plan) -> Iterator[Noted]:
    """What a call asks for. What a run itself changes (a memo of the metric, what an optimizer keeps of its work) makes
    the next call of this process no other one, wherever its directory is: it is noted as it was before the run."""
    note = _Notes()
    asked: Noted = _as_before(_asked_but_optimizers(plan, note)) | {"optimizers": {}}
    for key, optimizer in plan.optimizers.items():
        with in_turn(optimizer):
            asked["optimizers"][key] = _at_first(optimizer, note)
    try:
        yield asked
    finally:
        with _told():
            note = _Notes()
            _remember(asked, _asked_but_optimizers(plan, note))
            for key, optimizer in plan.optimizers.items():
                before, after = asked["optimizers"][key], note.optimizer(optimizer)
                for name in METRICS & after.keys():
                    _remember(before.get(name), after[name], (*_OF_OPTIMIZERS, name))


@contextlib.contextmanager
def at_work(optimizer: Teleprompter) -> Iterator[None]:
    """Have what an optimizer keeps of its work in this block be no setting of it for the calls to come."""
    before: Noted | None = None
    with _told():
        before = _at_first(optimizer, _Notes())
    try:
        yield
    finally:
        if before is not None:
            with _told():
                after = _Notes().optimizer(optimizer)
                if id(optimizer) not in _WORKED:
                    weakref.finalize(optimizer, _WORKED.pop, id(optimizer), None)
                _WORKED[id(optimizer)] = before, after


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning(
            "What the run changed in the metric, the program or the optimizers can't be told (%s: %s). If the same "
            "call is refused in its directory, make it in a new process.",
            type(error).__name__,
            error,
        )


def _at_first(optimizer: Teleprompter, note: _Notes) -> Noted:
    """What is noted of an optimizer now, with what its steps and its metric's calls changed as it was before them."""
    noted = _as_before(note.optimizer(optimizer), _OF_OPTIMIZERS)
    return _undone(noted, *_WORKED.get(id(optimizer), ({}, {})))


def _remember(before: Any, after: Any, names: tuple[str, ...] = ()) -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in after.items():
            _remember(before.get(name), value, (*names, name))
    elif before != after:
        _CHANGED.setdefault(names, {})[json.dumps(after)] = before


def _as_before(now: Any, names: tuple[str, ...] = ()) -> Any:
    """What is noted now, with what is as a run of this process left it as it was before that run."""
    changed = _CHANGED.get(names, {})
    if changed and (left := json.dumps(now)) in changed:
        return changed[left]
    if not isinstance(now, dict):
        return now
    kept = {name: _as_before(value, (*names, name)) for name, value in now.items()}
    return {name: value for name, value in kept.items() if value is not None}


def _undone(now: Any, before: Any, after: Any) -> Any:
    """What is noted now, with what is as it was noted `after` some work as it was `before` that."""
    if not (isinstance(now, dict) and isinstance(after, dict) and isinstance(before, dict)):
        return before if now == after else now
    merged = {name: _undone(now.get(name), before.get(name), after.get(name)) for name in [*now, *before]}
    return {name: value for name, value in merged.items() if value is not None}


def _asked_but_optimizers(plan: Plan, note: _Notes) -> Noted:
    """What a checked call asks for, as JSON."""
    return {
        "form": FORM,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "strategy": plan.strategy,
        "seed": plan.settings.seed,
        "max_rounds": plan.max_rounds,
        "shuffle": plan.shuffle,
        "two_by_two": plan.two_by_two,
        "student": note.program(plan.student),
        "teachers": {str(number): note.program(each) for number, each in enumerate(plan.teachers, 1)},
        "adapter": note.holder(dspy.settings.adapter or dspy.ChatAdapter()),
        "settings": {name: note.text(dspy.settings.get(name)) for name in ("lm", "rm")},
        "trainset": note.examples(plan.trainset),
        "valset": note.examples(plan.valset),
        "metric": note.callable(plan.metric),
        "compile_args": {key: note.arguments(given) for key, given in plan.compile_args.items()},
        "versions": versions(),
        "machine": machine(),
    }


class _Notes:
    """Texts for values; what is met twice is walked once."""

    def __init__(self) -> None:
        self._walk = BehaviourWalk(lasting=True)

    def text(self, value: Any) -> str:
        """A value as text: itself where it is short and plain, else its kind and a hash of its content."""
        if _is_plain(value) and len(shown := repr(value)) <= _SHORT and not split_secrets(value)[1]:
            return masked_forms(shown)
        return self._named_by_hash(value)

    def _named_by_hash(self, value: Any) -> str:
        digest = self._walk.of(value)[:16]
        if isinstance(value, types.FunctionType):
            return f"{value.__qualname__} {digest}"
        size = f" of {len(value)}" if isinstance(value, list | tuple | dict | set | str) else ""
        return f"{type(value).__qualname__}{size} {digest}"

    def entries(self, values: Mapping[Any, Any]) -> Noted:
        """Names with texts, in order, without secrets; what has the name of one is never shown."""
        return self._entries(values, self._entry)

    def _entries(self, values: Mapping[Any, Any], note: Callable[[Any], Any]) -> Noted:
        named = {str(name): value for name, value in values.items() if not is_secret(name, value)}
        return {
            name: self._named_by_hash(named[name]) if is_secret_name(name) else note(named[name])
            for name in sorted(named)
        }

    def _entry(self, value: Any) -> str | Noted:
        """A value's text; of a dataclass those of its fields, too."""
        if isinstance(value, type) or not is_dataclass(value):
            return self.text(value)
        held = {each.name: getattr(value, each.name, None) for each in fields(value)}
        return {WHOLE: self.text(value), **self._entries(held, self.text)}

    def examples(self, examples: Sequence[dspy.Example]) -> str:
        """A data set."""
        return f"{len(examples)} examples {dataset_hash(examples)[:16]}"

    def program(self, program: dspy.Module) -> Noted:
        """A program: its classes' code, what its modules hold, its prompts, its LMs."""
        predictors = predictors_of(program)
        modules = dict(modules_of(program))
        return {
            "class": type(program).__qualname__,
            "code": self.code(*map(type, modules.values())),
            "attributes": {name: held for name, module in modules.items() if (held := self._held(module))},
            "prompts": {name: self._prompt(predictor) for name, predictor in predictors.items()},
            "models": model_names(program),
            "lms": {name: self.entries(lm_parts(p.lm)) for name, p in predictors.items() if isinstance(p.lm, BaseLM)},
        }

    def _held(self, module: dspy.Module) -> Noted:
        left_out = {"lm", "signature", "demos"} if isinstance(module, dspy.Predict) else set()
        attributes = answering_attributes(module).items()
        held = {k: v for k, v in attributes if k not in left_out and not isinstance(v, dspy.Module)}
        return self.entries(held)

    def _prompt(self, predictor: dspy.Predict) -> Noted:
        instructions, fields = signature_parts(predictor.signature)
        return {
            "instructions": self.text(instructions),
            "fields": {field[0]: self.text(field[1:]) for field in fields},
            "demos": self.text(list(predictor.demos)),
        }

    def code(self, *kinds: type) -> Noted:
        """The user's code of classes, by method."""
        noted: Noted = {}
        for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__ if is_own(base)):
            for name, value in class_parts(base).items():
                key = f"{base.__qualname__}.{name}"
                while key in noted:
                    # A class of the same name, such as one made by the same function.
                    key += "'"
                noted[key] = self.text(value)
        return noted

    def holder(self, value: Any, *, left_out: frozenset[str] = NOISE) -> Noted:
        """An object with settings: its class with the user's code, its attributes."""
        held = {name: each for name, each in getattr(value, "__dict__", {}).items() if name not in left_out}
        code = self.code(type(value))
        return {"class": type(value).__qualname__, **({"code": code} if code else {}), **self.entries(held)}

    def optimizer(self, optimizer: Teleprompter) -> Noted:
        """An optimizer: its class, its settings. What begins with "_" is its own affair."""
        private = {name for name in vars(optimizer) if name.startswith("_")}
        return self.holder(optimizer, left_out=_PACE | private)

    def arguments(self, given: Mapping[str, Any]) -> Noted:
        """Arguments of an optimizer's `compile`; of a file of rows, what is in it."""
        held = {name: value for name, value in given.items() if name not in _PACE}
        return self.entries({n: _content_of(value) if n == "rows" else value for n, value in held.items()})

    def callable(self, function: Any) -> Noted:
        """A metric: a function, a partial, a method, or an object that can be called."""
        if isinstance(function, functools.partial):
            given = {"args": self.text(list(function.args)), "keywords": self.entries(function.keywords)}
            return {"partial": self.callable(function.func), **given}
        if isinstance(function, types.MethodType):
            return {"method": self.callable(function.__func__), "of": self.holder(function.__self__)}
        if not isinstance(function, types.FunctionType):
            return {**self.holder(function), "content": self.text(function)}
        names = function.__code__.co_freevars
        cells = dict(zip(names, map(cell_content, function.__closure__ or ()), strict=True))
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
        return {
            "name": function.__qualname__,
            "code": self.text(function.__code__),
            "defaults": self.entries(defaults),
            "closure": self.entries(cells),
            "uses": self.entries(dict(named_values(function))) if is_own(function) else {},
        }


def _content_of(rows: Any) -> Any:
    file = Path(rows).expanduser() if isinstance(rows, str | Path) else None
    return file.read_bytes() if file is not None and file.is_file() else rows


def _is_plain(value: Any, deep: int = _SHORT) -> bool:
    """Whether this is made of Python's own values, and neither too long nor too `deep` to be shown."""
    if isinstance(value, list | tuple | dict):
        if type(value) not in (list, tuple, dict) or len(value) > _SHORT or not deep:
            return False
        names, held = (value.keys(), value.values()) if isinstance(value, dict) else ((), value)
        return all(isinstance(name, str) for name in names) and all(_is_plain(each, deep - 1) for each in held)
    return value is None or type(value) in (bool, int, float, str)


def machine() -> dict[str, str]:
    """What this runs on."""
    found = {"platform": platform.platform(), "python": platform.python_version(), "cpus": str(os.cpu_count())}
    return found | ({"processor": name} if (name := processor()) else {})


def accelerator() -> dict[str, str]:
    """The GPU that this process has used, if any: nothing is started or imported to learn it."""
    torch: Any = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_initialized()
    return {"accelerator": torch.cuda.get_device_name()} if used else {}


@functools.cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model; its architecture where no more is known."""
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()
