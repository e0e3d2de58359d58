"""A predictor's prompt and answer as text, made by the very code that makes them at inference.

A prompt is obtained by making the predictor's call with the engine swapped for one that takes down the request:
whatever adapter, field types, tools or history are in play, it is what the engine will receive.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.decision import DecisionAdapter, resolve_adapter
from dspy.lm15 import Request

from ..engines.protocol import ChatMessage, FieldSpan, LocalEngine
from ..errors import DataError
from ..printable import NOT_UNICODE, is_unicode
from ..rollouts.rescue import admits_none
from .schema_fit import by_field, fits

UNREADABLE = "can't read back the answer it wrote"
OTHERWISE = "reads the answer back as something else"
"""What is said of an adapter whose own rows would teach another answer than the one that passed."""

PLACEHOLDER = "value-of-the-field"
"""Stands for a value while it is looked where an adapter writes that."""


class RequestTaken(BaseException):
    """Carries a request out of DSPy instead of an answer; not an Exception, so that nothing handles it as a failure."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request


class _RequestTaker:
    """Declares what the real engine declares, and raises each request instead of answering."""

    def __init__(self, engine: LocalEngine) -> None:
        self.supported_params = engine.supported_params
        self.supports_response_schema = engine.supports_response_schema
        self.supports_function_calling = engine.supports_function_calling
        self.supports_reasoning = engine.supports_reasoning

    def complete(self, request: Request) -> Any:
        raise RequestTaken(request)


def take_request(
    predictor: dspy.Predict,
    inputs: Mapping[str, Any],
    demos: Sequence[Any],
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Any = None,
) -> Request:
    """The request that the predictor's LM would be sent for these inputs and demos; `adapter` None takes the one in
    use."""
    taker = copy.copy(predictor)
    taker.lm = predictor.lm.copy(engine=_RequestTaker(predictor.lm.engine), cache=False, callbacks=[])
    taker.demos = list(demos)
    taker.callbacks = []
    # Of a predictor that is a program by itself, an optimizer may have replaced it.
    taker.__dict__.pop("forward", None)
    # What is wrong with inputs is said where the program is run with them.
    quiet = {"callbacks": [], "trace": [], "disable_history": True, "send_stream": None, "warn_on_type_mismatch": False}
    try:
        with dspy.context(adapter=adapter or dspy.settings.adapter, **quiet):
            taker(**inputs, **({"config": dict(config)} if config else {}))
    except RequestTaken as taken:
        return taken.request
    raise DataError(f"a {type(predictor).__name__} answers without calling its LM, so it has no prompt")


def render_prompt(
    predictor: dspy.Predict,
    engine: LocalEngine,
    inputs: Mapping[str, Any],
    demos: Sequence[Any],
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Any = None,
) -> tuple[ChatMessage, ...]:
    """The chat messages that `engine` receives when the predictor is called."""
    return engine.messages(take_request(predictor, inputs, demos, config=config, adapter=adapter))


def render_completion(
    predictor: dspy.Predict,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    adapter: Any = None,
    text: str | None = None,
    schema: Mapping[str, Any] | None = None,
) -> str:
    """The answer as the adapter in use writes it, with pydantic models field by field where only that fits the `schema`
    of its request; where that does not fit, is not read back as the same outputs, or the adapter can't write one,
    `text`, which is how the LM wrote it. Of those that are read back the first, where none fits. Raises DataError when
    none is read back."""
    adapter, processed = _writer(predictor, inputs, adapter)
    missing = [
        name
        for name, info in processed.output_fields.items()
        if outputs.get(name) is None and not admits_none(info.annotation)
    ]
    if missing:
        raise DataError(f"output fields missing: {missing}")
    ways = [lambda: _written(adapter, processed, outputs)]
    if schema is not None:
        ways.append(lambda: _written(adapter, processed, by_field(dict(outputs))))
    if text is not None:
        ways.append(lambda: text)
    read, failed = list[str](), DataError("no answer")
    for write in ways:
        try:
            completion = _checked(adapter, processed, outputs, write())
        except DataError as error:
            failed = error
            continue
        if schema is None or fits(completion, schema):
            return completion
        read.append(completion)
    if not read:
        raise failed
    return read[0]


def field_spans(
    predictor: dspy.Predict,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    completion: str,
    *,
    adapter: Any = None,
) -> tuple[FieldSpan, ...]:
    """Where the values of the output fields stand in an answer that `render_completion` gave, with the quotes that an
    adapter writes around one. A field that is empty or can't be located has none: it is found by writing the answer
    with another value in its place."""
    adapter, processed = _writer(predictor, inputs, adapter)
    forms = (outputs, by_field(dict(outputs)))
    found = [
        next(filter(None, (_span(adapter, processed, form, completion, name) for form in forms)), None)
        for name in processed.output_fields
    ]
    return tuple(filter(None, found))


def _span(
    adapter: Any, signature: type[dspy.Signature], outputs: Mapping[str, Any], completion: str, name: str
) -> FieldSpan | None:
    try:
        other = _written(adapter, signature, {**outputs, name: PLACEHOLDER})
    except Exception:  # an adapter of the user's may take values of the field's type alone
        return None
    head, found, tail = other.partition(PLACEHOLDER)
    if head[-1:] == tail[:1] == '"':
        head, tail = head[:-1], tail[1:]
    # XMLAdapter writes text on lines of its own, and what has parts on that of its tags.
    for before, after in ((head, tail), (head.rstrip(), tail.lstrip())):
        start, end = len(before), len(completion) - len(after)
        matches = found and completion.startswith(before) and completion.endswith(after)
        if matches and completion[start:end].strip():
            return FieldSpan(name, start, end)
    return None


def makes_decision(predictor: dspy.Predict) -> bool:
    """Whether an output is a decision of DSPy's (`Noul`, `Choice`, `Score`): the LM answers with probabilities."""
    return isinstance(_resolved(predictor, dspy.settings.adapter), DecisionAdapter)


def _resolved(predictor: dspy.Predict, adapter: Any) -> Any:
    signature = predictor.signature
    return resolve_adapter(predictor.lm, adapter or ChatAdapter(), signature, predictor.fields, signature)


def _writer(predictor: dspy.Predict, inputs: Mapping[str, Any], adapter: Any) -> tuple[Any, type[dspy.Signature]]:
    """The adapter that reads and writes the predictor's answers, and the signature as it does."""
    adapter = _resolved(predictor, adapter or dspy.settings.adapter)
    return adapter, adapter._call_preprocess(predictor.lm, {}, predictor.signature, dict(inputs))


def _written(adapter: Any, signature: type[dspy.Signature], outputs: Mapping[str, Any]) -> str:
    try:
        return str(adapter.format_assistant_message_content(signature, dict(outputs)))
    except NotImplementedError as error:
        raise DataError(
            f"{type(adapter).__name__} can't write an answer: define its format_assistant_message_content"
        ) from error


def _checked(adapter: Any, signature: type[dspy.Signature], outputs: Mapping[str, Any], completion: str) -> str:
    if not is_unicode(completion):
        raise DataError(f"the answer is {NOT_UNICODE}")
    if isinstance(adapter, dspy.TwoStepAdapter):
        # It would ask an LM to read it.
        return completion
    try:
        parsed = adapter.parse(signature, completion)
    except Exception as error:
        raise DataError(f"{type(adapter).__name__} {UNREADABLE}") from error
    if not all(_is_same(parsed[name], outputs[name]) for name in signature.output_fields):
        raise DataError(f"{type(adapter).__name__} {OTHERWISE}")
    return completion


def _is_same(read: Any, written: Any) -> bool:
    """White space around a text aside; equal sets may be told in another order."""
    if str(read).strip() == str(written).strip():
        return True
    try:
        return type(read) is type(written) and bool(read == written)
    except Exception:  # Arrays, and what holds them, have no one answer.
        return False
