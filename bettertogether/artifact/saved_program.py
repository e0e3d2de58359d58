"""A program's prompts as JSON and back: instructions, field texts, demos, options; its structure is checked."""

from __future__ import annotations

import ast
import inspect
import json
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import dspy
from dspy.predict.parameter import Parameter

from ..errors import ArtifactError
from ..printable import get_logger
from ..programs.copies import copy_program
from ..programs.program import load_prompt, parameters_of, prompt_state
from ..programs.signature_types import full_name
from ..redaction import split_secrets

logger = get_logger(__name__)

_PLAIN = (dspy.Predict, dspy.ChainOfThought)
_PROMPT_KEYS = ("signature", "demos", "fields")
_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, bytes, list, dict, tuple, set, object)},
    **{"Any": Any, "Literal": typing.Literal, "Optional": typing.Optional, "Union": typing.Union},
}
"""The types that a plain Predict or ChainOfThought is rebuilt with."""


def dump_parameter(name: str, parameter: Parameter) -> dict[str, Any]:
    """JSON state of a predictor (without its LM) or another DSPy parameter. Raises ArtifactError."""
    if not isinstance(parameter, dspy.Predict):
        return {"state": _require_json(name, "state", _public(name, _call_dump(parameter)))}
    return {
        "state": _require_json(name, "prompt", prompt_state(parameter, name)),
        "fields": _fields(parameter),
        "config": _require_json(name, "config", _public(name, parameter.config)),
        "signature_name": parameter.signature.__name__,
    }


def _public(name: str, options: Any) -> Any:
    kept, secret = split_secrets(options)
    if secret:
        logger.warning("The predictor %r is saved without %s: give them again when it is loaded.", name, sorted(secret))
    return kept


def _call_dump(parameter: Any) -> Any:
    takes_mode = "json_mode" in inspect.signature(parameter.dump_state).parameters
    return parameter.dump_state(json_mode=True) if takes_mode else parameter.dump_state()


def _fields(predictor: dspy.Predict) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "kind": field.json_schema_extra["__dspy_field_type"],
            "type": annotation_text(field.annotation),
            "constraints": field.json_schema_extra.get("constraints"),
        }
        for name, field in predictor.signature.fields.items()
    ]


def _require_json(name: str, what: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"The {what} of {name!r} can't be saved as JSON ({error}): use text, numbers, lists, dicts or pydantic "
            "models there."
        ) from error


def annotation_text(annotation: Any) -> str:
    """A type as text that does not depend on the module where its classes are defined."""
    if annotation is None or annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(annotation_text, arguments))
    if origin is not None:
        inner = ", ".join("..." if argument is ... else annotation_text(argument) for argument in arguments)
        return f"{getattr(origin, '__qualname__', str(origin))}[{inner}]"
    return str(getattr(annotation, "__qualname__", None) or annotation)


def check_structure(program: dspy.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ArtifactError unless a program has the predictors and fields that were saved; says what differs."""
    found = parameters_of(program)
    differences = [f"{name} was saved, the program has none" for name in saved if name not in found]
    differences += [f"{name} is in the program, it was not saved" for name in found if name not in saved]
    for name in (name for name in saved if name in found):
        differences += _field_differences(name, found[name], saved[name].get("fields"))
    if differences:
        raise ArtifactError(
            f"The saved prompts don't fit {type(program).__name__}:\n  " + "\n  ".join(differences) + "\n"
            "Give load(folder, into=...) a program of the class, and with the signatures, that was saved."
        )


def _field_differences(name: str, parameter: Parameter, fields: Any) -> list[str]:
    if isinstance(parameter, dspy.Predict) != (fields is not None):
        return [f"{name} is a {type(parameter).__name__} in the program, another kind was saved"]
    if not isinstance(parameter, dspy.Predict):
        return []
    have, want = _fields_text(_fields(parameter)), _fields_text(fields)
    return [] if have == want else [f"{name} has the fields ({have}), saved were ({want})"]


def _fields_text(fields: list[dict[str, Any]]) -> str:
    return ", ".join(f"{field['kind']} {field['name']}: {field['type']}" for field in fields)


def load_parameters(program: dspy.Module, saved: Mapping[str, Mapping[str, Any]]) -> dspy.Module:
    """A copy of `program` with the saved prompts, demos and options; its LMs stay. Raises ArtifactError."""
    check_structure(program, saved)
    copied = copy_program(program)
    for name, parameter in parameters_of(copied).items():
        entry = saved[name]
        if not isinstance(parameter, dspy.Predict):
            _load_state(name, parameter.load_state, entry["state"], known=_call_dump(parameter).keys())
            continue
        _load_state(name, partial(load_prompt, parameter, name=name), entry["state"], known=_PROMPT_KEYS)
        parameter.config = dict(entry["config"])
    return copied


def _load_state(name: str, load: Callable[[Any], object], state: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(state.keys() - set(known)):
        raise ArtifactError(f"The state of {name!r} holds {unknown}, which its class does not save.")
    try:
        load(dict(state))
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"The saved state of {name!r} can't be used ({type(error).__name__}: {error}).") from error


def rebuild(path: str, saved: Mapping[str, Mapping[str, Any]]) -> dspy.Module:
    """A new program of a saved class: plain Predict and ChainOfThought from their fields, any other class by calling
    it without arguments. Raises ArtifactError when neither works."""
    for kind in _PLAIN:
        if path == full_name(kind):
            return _rebuild_plain(kind, saved)
    try:
        return _imported_class(path)()
    except Exception as error:
        raise ArtifactError(
            f"A program of class {path} can't be made without arguments here ({error}). Make it yourself and give it: "
            "load(folder, into=program)."
        ) from error


def _imported_class(path: str) -> type[dspy.Module]:
    """A program's class in a module that is imported already. Nothing is imported, no attribute computed: a file must
    not decide what code runs."""
    name, _, attributes = path.partition(":")
    found: Any = sys.modules.get(name)
    if found is None:
        raise TypeError(f"the module {name!r} is not imported, and load imports nothing that a file names")
    for attribute in attributes.split("."):
        found = vars(found).get(attribute) if isinstance(found, type | types.ModuleType) else None
    if not (isinstance(found, type) and issubclass(found, dspy.Module)):
        raise TypeError("it is not a dspy.Module")
    return found


def _rebuild_plain(kind: type[dspy.Module], saved: Mapping[str, Mapping[str, Any]]) -> dspy.Module:
    program = kind("input -> output")
    if parameters_of(program).keys() != saved.keys():
        raise ArtifactError(f"A {kind.__name__} has {sorted(parameters_of(program))}, saved were {sorted(saved)}.")
    for name, parameter in parameters_of(program).items():
        entry = saved[name]
        fields = {field["name"]: _rebuild_field(field) for field in entry["fields"]}
        instructions = entry["state"]["signature"]["instructions"]
        try:
            parameter.signature = dspy.Signature(fields, instructions, entry["signature_name"])
        except Exception as error:
            raise ArtifactError(f"The signature of {name!r} can't be made again: {error}") from error
    return program


def _rebuild_field(field: Mapping[str, Any]) -> tuple[Any, Any]:
    constructor = dspy.InputField if field["kind"] == "input" else dspy.OutputField
    try:
        if field["constraints"]:
            raise ValueError(f"constraints {field['constraints']!r}")
        return _parse_type(ast.parse(field["type"], mode="eval").body), constructor()
    except (SyntaxError, ValueError, TypeError, AttributeError, IndexError, RecursionError, MemoryError) as error:
        raise ArtifactError(
            f"Field {field['name']!r} of type {field['type']:.200} can't be made from the saved text alone ({error}). "
            "Make the program yourself and give it: load(folder, into=program)."
        ) from error


def _parse_type(node: ast.expr) -> Any:
    """The type that a text of `annotation_text` stands for; nothing is evaluated."""
    if isinstance(node, ast.Constant) and node.value in (None, ...):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return operator.or_(_parse_type(node.left), _parse_type(node.right))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return typing.Literal[tuple(ast.literal_eval(part) for part in parts)]
        return _parse_type(node.value)[tuple(map(_parse_type, parts))]
    raise ValueError(f"{ast.unparse(node)} is not a built-in type")
