"""Rescue (STaR's rationalization, arXiv 2203.14465): one more try with the label as a hint that no row shows.

Where other predictors come before those that answer the label, they alone are given the hint at first: what they write
is worth learning when it leads the others, who don't know the label, to it. Only then is the label given to those that
answer it, whatever came before.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import dspy
import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from ..printable import is_unicode
from ..programs.program import predictors_of
from .labels import label_value


def hint_for(program: dspy.Module, example: dspy.Example, labels: Collection[str]) -> dict[str, Any]:
    """The labels that an example has; None is one where the program may answer it."""
    values = {name: label_value(example, name) for name in labels if name in example}
    if not any(value is None for value in values.values()):
        return values
    fields = {name: info for p in predictors_of(program).values() for name, info in p.signature.output_fields.items()}
    return {
        name: value
        for name, value in values.items()
        if value is not None or (name in fields and admits_none(fields[name].annotation))
    }


def answering(predictors: Mapping[str, dspy.Predict], labels: Collection[str]) -> set[str]:
    """The predictors that answer one of the label fields."""
    return {name for name, p in predictors.items() if set(labels) & p.signature.output_fields.keys()}


def has_leads(program: dspy.Module, labels: Collection[str]) -> bool:
    """Whether predictors come before those that answer the label, which are given a hint first."""
    predictors = predictors_of(program)
    return 0 < len(answering(predictors, labels)) < len(predictors)


def hint_before_the_answer(predictors: Mapping[str, dspy.Predict], labels: Mapping[str, Any]) -> None:
    """Give the label as a hint to all of a program's predictors but those that answer it."""
    hit = answering(predictors, labels)
    for name, predictor in predictors.items():
        if name not in hit:
            predictor.signature = _with_hint(predictor.signature, labels)


def _with_hint(signature: Any, labels: Mapping[str, Any]) -> Any:
    return signature.with_instructions(f"{signature.instructions}\n\n{hint_of(labels)}")


def narrow_signatures(predictors: Mapping[str, dspy.Predict], labels: Mapping[str, Any]) -> None:
    """Let the answer fields of a program's predictors accept the label alone, and say so in the prompt.

    An engine that constrains its output to the schema can then write nothing else; any other model reads the hint.
    Predictors without one of the label fields get the hint as text when no predictor has one.
    """
    hit = answering(predictors, labels)
    # To make a signature takes longer than to run a program, and most labels come again.
    made = _narrowed if all(type(label) in _PLAIN for label in labels.values()) else _narrowed.__wrapped__
    # Their types, too: 1 and True are one key.
    typed = tuple((name, type(label), label) for name, label in labels.items())
    for name, predictor in predictors.items():
        if not hit or name in hit:
            predictor.signature = made(predictor.signature, typed)


_PLAIN = (str, int, bool)


@functools.lru_cache(maxsize=100)
def _narrowed(signature: Any, labels: tuple[tuple[str, type, Any], ...]) -> Any:
    known = {name: label for name, _, label in labels}
    for label_field in known.keys() & signature.output_fields.keys():
        annotation, label = signature.output_fields[label_field].annotation, known[label_field]
        known[label_field] = value = as_field(label, annotation)
        # A Literal of another type, or of half an emoji, has no schema, or is not read back as a value of the field's.
        if type(value) in _PLAIN and _is_of_type(value, annotation) and is_unicode(f"{value}{label}"):
            signature = signature.with_updated_fields(label_field, type_=_only(value, label))
    return _with_hint(signature, known)


def _only(value: Any, label: Any) -> Any:
    """The type of one value, in the label's spelling too, for an LM that copies what it is judged by."""
    return Literal[value, label] if isinstance(label, str) and isinstance(value, str) else Literal[value]


HINT = "The right final result is known: "
TALK_OF_A_HINT = ("right final result is known", "write what leads to it", "the hint", "given hint")
"""In lower case, what an answer to a prompt with a hint has where it makes no sense without it."""


def hint_of(labels: Mapping[str, Any]) -> str:
    """The sentence that gives the label away."""
    listed = ", ".join(f"`{name}` = {_shown(value)!r}" for name, value in labels.items())
    return f"{HINT}{listed}. Write what leads to it."


def _shown(label: Any) -> Any:
    if isinstance(label, np.generic):
        return label.item()
    return label.value if isinstance(label, enum.Enum) else label


def talks_about_hint(answers: Iterable[Any]) -> bool:
    """Whether answers to prompts with a hint tell of it."""
    text = " ".join(str(answer).lower() for answer in answers)
    return any(words in text for words in TALK_OF_A_HINT)


def as_field(label: Any, annotation: Any) -> Any:
    """A label as a value of an output field's type: 3.0 for 3 where the field is a float, "positive" for "Positive"
    where that is the legal value. The label as it is where the type has no such value."""
    kinds = _kinds(annotation)
    if type(label) in kinds:
        return label
    legal = [value for kind in kinds for value in _legal_values(kind)]
    spelt = _text_of(label).strip().casefold()
    for value in [*(value for value in legal if type(value) is type(label) and value == label), *legal]:
        names = [value.value, value.name] if isinstance(value, enum.Enum) else [value]
        if spelt in {str(name).casefold() for name in names}:
            return value
    if str in kinds:
        return _text_of(label)
    found, value = _validated(label, annotation)
    return value if found else label


def admits_none(annotation: Any) -> bool:
    """Whether None is a value of a type: of an Optional, of a Literal that names it."""
    return _validated(None, annotation) == (True, None)


def _is_of_type(value: Any, annotation: Any) -> bool:
    found, same = _validated(value, annotation)
    return found and type(same) is type(value)


def _validated(value: Any, annotation: Any) -> tuple[bool, Any]:
    try:
        return True, TypeAdapter(annotation).validate_python(value)
    except (ValidationError, PydanticUserError):
        return False, None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type, also of one that a `type` statement names."""
    annotation = getattr(annotation, "__value__", annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(kind for each in get_args(annotation) for kind in _kinds(each))


def _legal_values(kind: Any) -> list[Any]:
    if isinstance(kind, enum.EnumMeta):
        return list(kind)
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _text_of(label: Any) -> str:
    return str(label.value if isinstance(label, enum.Enum) else label)
