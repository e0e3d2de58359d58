"""See what a program's predictors are asked and what they answer, in whatever thread they are called.

DSPy's trace names the predictor, its inputs and its prediction. It does not say with which signature, demos, LM and
adapter the call was made, nor whether the answer was cut; it shows inputs and predictions as the program left them
afterwards; and it misses what a program's own threads call, which do not have DSPy's context.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature
from dspy.utils.callback import BaseCallback
from dspy.utils.usage_tracker import UsageTracker
from pydantic import BaseModel

from ..programs.program import modules_of
from .attribution import Attribution


@dataclass
class Seen:
    """One call of a predictor, with what was really used."""

    predictor: dspy.Predict
    inputs: dict[str, Any]
    """As they were when the call began."""
    signature: type[dspy.Signature]
    demos: list[Any]
    asked: Mapping[str, Any]
    """What the caller gave besides inputs: signature, demos, config, lm."""
    lm: Any
    adapter: Any
    """`dspy.settings.adapter` where the call was made."""
    place: tuple[int, int]
    """Thread and async task."""
    text: str | None = None
    """The answer as the LM wrote it."""
    cut: bool = False
    """Whether the answer ended at max_tokens."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """As the predictor returned them."""
    prediction: Any = None


_CALL_TIME = ("signature", "demos", "config", "lm")


class SharedTracker(UsageTracker):
    """A count of tokens that `dspy.Parallel` does not copy for each of its threads."""

    def __deepcopy__(self, memo: Any) -> SharedTracker:
        return self


class Record:
    """What was seen of one run."""

    def __init__(self) -> None:
        self.trace: list[Any] = []
        """DSPy's trace: (predictor, inputs, prediction) triples."""
        self.tracker = SharedTracker()
        self.adapter = dspy.settings.adapter
        self.open: dict[str, tuple[ExitStack, Seen | None]] = {}
        """Calls in progress, by DSPy's id."""
        self._seen: dict[int, Seen] = {}
        self._home: tuple[int, int] | None = None

    def started(self) -> None:
        """Note where the program itself runs, which is where its first module is called."""
        self._home = self._home or _place()

    def finished(self, seen: Seen, prediction: Any) -> None:
        """Keep a call by its prediction, which a trace holds too."""
        seen.prediction = prediction
        if isinstance(prediction, dspy.Prediction):
            fields = seen.signature.output_fields
            seen.outputs = {name: snapshot(value) for name, value in prediction.items() if name in fields}
            self._seen[id(prediction)] = seen

    def seen(self, prediction: Any) -> Seen | None:
        """The call that gave a prediction."""
        return self._seen.get(id(prediction))

    def in_order(self) -> list[Any]:
        """The trace in an order that does not depend on timing: as the calls were made; those that other threads or
        tasks made between two of the program's own, by content."""
        ordered: list[Any] = []
        for foreign, group in itertools.groupby(self.trace, self._is_foreign):
            entries = list(group)
            ordered += sorted(entries, key=_content) if foreign else entries
        return ordered

    def _is_foreign(self, entry: Any) -> bool:
        seen = self.seen(entry[2])
        return seen is not None and seen.place != self._home


_RECORD: ContextVar[Record | None] = ContextVar("bettertogether_record", default=None)
_CALL: ContextVar[Seen | None] = ContextVar("bettertogether_call", default=None)


class Watch(BaseCallback):
    """A callback on every module of a copy of a program, which serves one run at a time.

    A module that is called without DSPy's context, as in a thread of the program's own, gets the run's trace for that
    call.
    """

    def __init__(self, attribution: Attribution) -> None:
        self._attribution = attribution
        self._record: Record | None = None
        self._trace: list[Any] | None = None

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def attach(self, program: dspy.Module) -> None:
        """Be called by every module of a program."""
        for _, module in modules_of(program):
            module.callbacks = [*module.callbacks, self]

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Take down what the modules do within the block, and in threads that they start."""
        self._record = Record()
        try:
            with self._context(self._record, self._record.trace):
                yield self._record
        finally:
            self._record = None

    @contextmanager
    def _context(self, record: Record, trace: list[Any]) -> Iterator[None]:
        token = _RECORD.set(record)
        lm = dspy.settings.lm
        try:
            with dspy.context(
                trace=trace,
                usage_tracker=record.tracker,
                callbacks=[*dspy.settings.callbacks, self],
                lm=watched_lm(lm) if lm is not None else None,
                # Histories keep every prompt of a pass in memory. They are on only for `note_response`.
                disable_history=False,
                max_history_size=0,
            ):
                yield
        finally:
            _RECORD.reset(token)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin a call of any module."""
        stack = ExitStack()
        record = _RECORD.get()
        if record is None and self._record is not None:
            record = self._record
            stack.enter_context(self._context(record, record.trace if self._trace is None else self._trace))
        # DSPy calls a callback of both the settings and the module twice.
        if record is None or call_id in record.open:
            return
        record.started()
        self._follow(instance, record)
        seen = None
        if isinstance(instance, dspy.Predict):
            seen = _begun(instance, inputs.get("kwargs", {}))
            _draw_anew(seen.lm)
            token = _CALL.set(seen)
            stack.callback(_CALL.reset, token)
        record.open[call_id] = stack, seen

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """End a call of any module."""
        record = _RECORD.get()
        if record is None or call_id not in record.open:
            return
        stack, seen = record.open.pop(call_id)
        if seen is not None:
            record.finished(seen, outputs)
        stack.close()

    def _follow(self, instance: dspy.Module, record: Record) -> None:
        """Watch a deep copy that a program made of a part of itself: copies are made without their callbacks."""
        if any(isinstance(callback, Watch) for callback in instance.callbacks):
            return
        if any(self._attribution.is_marked(module) for _, module in modules_of(instance)):
            watch = Watch(self._attribution)
            watch._record, watch._trace = record, dspy.settings.trace
            watch.attach(instance)


def _begun(predictor: dspy.Predict, arguments: Mapping[str, Any]) -> Seen:
    asked = {name: arguments[name] for name in _CALL_TIME if name in arguments}
    signature = asked.get("signature", predictor.signature)
    return Seen(
        predictor=predictor,
        inputs={name: snapshot(value) for name, value in arguments.items() if name not in _CALL_TIME},
        signature=ensure_signature(signature),
        demos=list(asked.get("demos", predictor.demos)),
        asked=asked,
        lm=asked.get("lm", predictor.lm) or dspy.settings.lm,
        adapter=dspy.settings.adapter,
        place=_place(),
    )


def _place() -> tuple[int, int]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), id(task) if task else 0


def _content(entry: Any) -> str:
    predictor, inputs, prediction = entry
    signature = predictor.signature
    return repr((list(signature.fields), signature.instructions, sorted(inputs.items(), key=str), prediction))


def snapshot(value: Any) -> Any:
    """The value with its own lists, dicts and records, so that what a program does to it later does not show: a
    `dspy.History` that grows, an answer that is tidied up in place."""
    if isinstance(value, list | tuple | set) and type(value) in (list, tuple, set):
        return type(value)(map(snapshot, value))
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, BaseModel) and not isinstance(value, dspy.Tool):
        return value.model_copy(update={name: snapshot(getattr(value, name)) for name in type(value).model_fields})
    return value


def watched_lm(lm: Any) -> Any:
    """A copy of an LM that tells the predictor's call in progress how it was answered."""
    if not isinstance(lm, dspy.BaseLM) or lm.__dict__.get("update_history") is note_response:
        return lm
    copied = lm.copy()
    copied.update_history = note_response  # type: ignore[method-assign]
    return copied


def _draw_anew(lm: Any) -> None:
    """Give the copy of an LM that a program made for another rollout (`dspy.BestOfN`) another seed, where the run gave
    the LM one: with the same seed every rollout would be the same answer."""
    drawn = getattr(lm, "drawn", None)
    if drawn and lm.kwargs.get("seed") == drawn[0] and lm.kwargs.get("rollout_id") != drawn[1]:
        lm.kwargs["seed"] = (drawn[0] + (lm.kwargs.get("rollout_id") or 0)) % 2**31


def note_response(entry: Mapping[str, Any]) -> None:
    """What a watched LM does in place of keeping a history. The last answer of a call is the one that counts: DSPy
    asks once more, in another format, where it can't read the first."""
    if (seen := _CALL.get()) is not None:
        output = next(iter(entry["outputs"]), None)
        seen.text = output.get("text") if isinstance(output, Mapping) else output
        seen.cut = is_cut(entry["response"])


def is_cut(response: Any) -> bool:
    """Whether the first answer of an LM's response ended at max_tokens: of DSPy's engine API, or as an OpenAI client
    returns it (chat completions, responses)."""
    if isinstance(response, list | tuple):
        return bool(response) and is_cut(response[0])
    if choices := _of(response, "choices"):
        response = choices[0]
    reason = _of(response, "finish_reason") or _of(_of(response, "incomplete_details"), "reason")
    return reason in ("length", "max_output_tokens", "max_tokens")


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
