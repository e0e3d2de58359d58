"""What a program, a metric or an optimizer does, as a hash: its code, what it holds, and the models it asks.

Code is what runs (bytecode, constants, defaults, values closed over), of the classes and functions that the user
wrote and of those that they name in their own modules. Installed packages count by name: their versions are noted
elsewhere.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import types
from collections.abc import Mapping
from typing import Any

import dspy
import pydantic
from dspy.clients.base_lm import BaseLM
from typing_extensions import Format, get_annotations

from ..redaction import is_secret, without_secrets
from .code import ACCESSOR, OURS, accessors, is_own, named_values
from .content import Walk, by_name, cell_content, combined, name_of
from .copies import own_attributes
from .program import modules_of

PACE = frozenset(
    {
        "adapters", "cache_bytes", "cache_folder", "command", "concurrency", "device", "max_adapters", "max_batch_size",
        "mixed_batches", "model", "number", "request_timeout_s", "startup_timeout_s", "stop_while_training", "url",
    }
)  # fmt: skip
"""Options of an engine that say where and how fast it runs; which model it runs is in the model's name."""

PATIENCE = frozenset({"max_retries", "request_timeout", "timeout"})
"""Options of an LM that say how long it is waited for."""

NOISE = frozenset({"_compiled", "callbacks", "history"})
"""Attributes of modules and LMs that say nothing about their answers."""
NOISE_OF_PREDICT = NOISE | {"stage", "traces", "train"}
"""Those of a `dspy.Predict`."""


class BehaviourWalk(Walk):
    """A walk that looks into code, programs and LMs.

    `lasting`: for another process, where what holds no content (a lock, a client of a service) counts by its type;
    else for this process, where it counts as itself.
    """

    def __init__(self, *, lasting: bool) -> None:
        super().__init__()
        self._lasting = lasting

    def type_hashed(self, value: type) -> bytes:
        """A class of the user's: its code and that of its own bases; another: its name."""
        parts = [name_of(value).encode()]
        if issubclass(value, dspy.Signature) and value is not dspy.Signature:
            return combined("signature", [self.hashed(signature_parts(value))])
        if issubclass(value, pydantic.BaseModel) and is_own(value):
            parts.append(self.hashed(_schema(value)))
        for base in value.__mro__:
            if is_own(base):
                parts += [self.hashed(list(part)) for part in class_parts(base).items()]
        return combined("class", parts)

    def function_hashed(self, value: types.FunctionType) -> bytes:
        """A function, with what it names in modules of the user's."""
        if not is_own(value):
            held = [self.hashed(cell_content(cell)) for cell in value.__closure__ or ()]
            return combined("function", [f"{value.__module__}.{value.__qualname__}".encode(), *held])
        named = [self.hashed(list(part)) for part in named_values(value)]
        return combined("own", [super().function_hashed(value), *named])

    def object_hashed(self, value: Any) -> bytes:
        """An object: what it holds, and the code of its class where that is the user's."""
        if isinstance(value, dspy.Module):
            return combined("module", [self.hashed(type(value)), self.hashed(by_name(answering_attributes(value)))])
        if isinstance(value, BaseLM):
            # Of this process's engines one may be asked where another of its model's name fails.
            engine = "" if self._lasting else str(id(getattr(value, "engine", None)))
            return combined("lm", [self.hashed(type(value)), self.hashed(by_name(lm_parts(value))), engine.encode()])
        if hasattr(value, "dump_state") and hasattr(value, "complete"):
            return combined("engine", [self.hashed(type(value)), self.hashed(engine_parts(value))])
        if isinstance(value, functools.partial):
            return combined("partial", [self.hashed([value.func, list(value.args), by_name(value.keywords)])])
        if isinstance(value, ACCESSOR):
            return combined(type(value).__name__, [self.hashed(part) for part in accessors(value)])
        if callable(getattr(value, "__wrapped__", None)):
            return combined(name_of(type(value)), [self.hashed(value.__wrapped__)])
        if self._lasting and not _has_content(type(value)):
            return self.nothing_seen(value)
        return combined("object", [self.hashed(type(value)), super().object_hashed(value)])

    def held(self, attributes: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """What an object holds, but secrets: another key for the same service changes no answer."""
        kept = {name: value for name, value in attributes.items() if not is_secret(name, value)}
        return {name: without_secrets(kept[name]) if str(name).endswith("kwargs") else kept[name] for name in kept}

    def nothing_seen(self, value: Any) -> bytes:
        """What has no content to see: its type for another process, itself in this one."""
        seen = super().nothing_seen(value)
        return seen if self._lasting else combined("itself", [seen, str(id(value)).encode()])


def program_key(program: dspy.Module) -> str | None:
    """A hash of what decides a program's answers in this process: its classes, what its modules hold (prompts and LMs
    with their options, frozen sub-modules too), the adapter in use. None for a program with a patched `forward`, of
    which nothing can be said."""
    if any({"forward", "aforward"} & vars(module).keys() for _, module in modules_of(program)):
        return None
    return BehaviourWalk(lasting=False).of([program, dspy.settings.adapter])


def answering_attributes(module: dspy.Module) -> dict[str, Any]:
    """The attributes of a module that say something about its answers."""
    noise = NOISE_OF_PREDICT if isinstance(module, dspy.Predict) else NOISE
    return {name: value for name, value in own_attributes(module).items() if name not in noise}


def lm_parts(lm: BaseLM) -> dict[str, Any]:
    """What decides an LM's answers besides its weights, which its model's name stands for. No secrets."""
    options = {name: value for name, value in lm.kwargs.items() if name not in PATIENCE}
    parts = {"model": lm.model, "model_type": lm.model_type, **_options(options)}
    if getattr(lm, "use_developer_role", False):
        parts["use_developer_role"] = True
    engine = getattr(lm, "engine", None)
    if hasattr(engine, "dump_state"):
        parts |= {f"engine.{name}": value for name, value in engine_parts(engine)[1:]}
    if is_own(type(lm)):
        left_out = {*NOISE_OF_PREDICT, "cache", "kwargs", "model", "model_type", "num_retries"}
        held = {name: value for name, value in vars(lm).items() if name not in left_out and not name.startswith("_")}
        parts |= {f"attribute.{name}": value for name, value in _options(held).items()}
    return parts


def engine_parts(engine: Any) -> list[list[Any]]:
    """The base model of an engine and the options that change its answers."""
    state = {name: value for name, value in engine.dump_state().items() if name not in PACE}
    return [["base", getattr(engine, "base_name", None)], *by_name(_options(state))]


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = without_secrets(options)
    return {name: value for name, value in kept.items() if value is not None}


def signature_parts(signature: Any) -> list[Any]:
    """Instructions and fields with their types and texts."""
    fields = [
        [
            name,
            field.annotation,
            repr(field.default),
            list(map(repr, field.metadata)),
            by_name(field.json_schema_extra or {}),
        ]
        for name, field in signature.fields.items()
    ]
    return [signature.instructions, fields]


def class_parts(kind: type) -> dict[str, Any]:
    """What the user wrote in a class body, by name: functions, properties, constants, types of fields."""
    if issubclass(kind, enum.Enum):
        return {name: member.value for name, member in kind.__members__.items()}
    parts = {name: value for name, value in sorted(vars(kind).items()) if _is_written(name, value)}
    return {**parts, "annotations": by_name(get_annotations(kind, format=Format.FORWARDREF))}


_ANNOTATING = ("__annotate__", "__annotate_func__")
"""Functions that Python 3.14 makes of annotations. They close over all that the class body holds."""
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


def _is_written(name: str, value: Any) -> bool:
    if isinstance(value, types.FunctionType | ACCESSOR):
        return name not in _ANNOTATING
    generated = name.startswith(("__", "_abc_", "model_", "_pydantic")) or isinstance(value, _DESCRIPTORS)
    return not generated


def _schema(kind: type[pydantic.BaseModel]) -> Any:
    try:
        return kind.model_json_schema()
    except pydantic.PydanticUserError:
        # Of types that JSON lacks.
        return repr(kind.__annotations__)


_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
_RANDOM = ("random.", "numpy.random.", "torch._C.Generator")


def _has_content(kind: type) -> bool:
    """Whether what an object holds says the same in another process. Of an installed package's classes those that say
    how they are pickled; the others may be clients, pools, handles. A random state is never the same."""
    if name_of(kind).startswith(_RANDOM):
        return False
    if is_own(kind) or kind.__module__.partition(".")[0] in OURS - {"builtins"}:
        return True
    if dataclasses.is_dataclass(kind) or issubclass(kind, pydantic.BaseModel) or kind in copyreg.dispatch_table:
        return True
    return any(name in vars(base) for base in kind.__mro__[:-1] for name in _PICKLING)
