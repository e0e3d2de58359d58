"""See what a program's predictors are asked and what they answer, in whatever thread they are called.

DSPy's trace names the predictor, its inputs and its prediction. It does not say with which signature, demos, LM and
adapter the call was made, nor whether the answer was cut; it shows inputs and predictions as the program left them
afterwards; and it misses what a program's own threads call, which do not have DSPy's context.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.clients.base_lm import record_history
from dspy.signatures.signature import ensure_signature
from dspy.utils.exceptions import AdapterParseError

from .event_loop import run_on_loop, use_shared_loop
from .replay import Answer, Replay, Reply, snapshot
from .responses import part_of, reply_of
from .sampled_lms import draw_anew
from .usage import Bill, SharedTracker


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
    given: Any = None
    """The LM that `lm` is a copy of, where it is none that the predictors have."""
    replies: list[Reply] = field(default_factory=list)
    """The answers: DSPy asks once more, in another format, where it can't read the first."""
    choices: list[Reply] = field(default_factory=list)
    """All of the last answer, where several were asked for at once (`n`)."""
    anew: bool = False
    """Whether it is the one that a branch answers anew."""
    sampled: list[Mapping[str, Any]] = field(default_factory=list)
    """Each of its answers in tokens, where the LM gives those (`SampledAnswer`)."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """As the predictor returned them."""
    prediction: Any = None
    returned: dspy.Prediction | None = None
    """The prediction as the predictor returned it."""

    @property
    def reply(self) -> Reply:
        """The answer that counts: the last."""
        return self.replies[-1] if self.replies else Reply()


_CALL_TIME = ("signature", "demos", "config", "lm")
_Watching = Callable[[dspy.Predict, Any], Any]


class RunTracker(SharedTracker):
    """The count of tokens of one run."""

    def __init__(self, is_further: bool) -> None:
        super().__init__()
        self.is_further = is_further
        """Whether the run is another try of an example."""


class Record:
    """What was seen of one run."""

    def __init__(self, lm: Any, stand_in: Any, replay: Replay | None, watched: _Watching, *, is_further: bool) -> None:
        self.replay = replay
        """The answers of an earlier run."""
        self.lm = lm
        """The watched copy of `dspy.settings.lm`, for predictors without an LM."""
        self.settings_lm = dspy.settings.lm
        self.stand_in = stand_in
        """What such predictors have in its place, in a further try."""
        self.watched = watched
        """The watched copy of another LM, for the call of a predictor."""
        self.adapter = dspy.settings.adapter
        self.keeps_history = not dspy.settings.disable_history
        self.history_size: int = dspy.settings.max_history_size if self.keeps_history else 0
        self.trace: list[Any] = []
        """DSPy's trace: (predictor, inputs, prediction) triples."""
        self.tracker = RunTracker(is_further)
        self.bill = Bill()
        """Of all LMs that the program asks."""
        self.unread: list[Seen] = []
        """Calls with answers that DSPy's adapter could not read, and that therefore are in no trace."""
        self._seen: dict[int, Seen] = {}
        self._asked: dict[str, itertools.count[int]] = {}
        self._homes: set[tuple[int, int]] = set()

    def runs_here(self) -> None:
        """Note that the program itself runs at this place."""
        self._homes.add(_place())

    def is_here(self) -> bool:
        """Whether the program itself runs at this place, which is none of its own threads and tasks."""
        return _place() in self._homes

    def earlier(self, seen: Seen) -> int:
        """How many calls before this one asked the same of the same predictor."""
        asked = repr((seen.predictor.stage, seen.inputs))
        return next(self._asked.setdefault(asked, itertools.count()))

    def finished(self, seen: Seen, prediction: Any) -> Any:
        """Keep a call by its prediction, which a trace holds too."""
        seen.prediction = prediction
        if isinstance(prediction, dspy.Prediction):
            fields = seen.signature.output_fields
            seen.returned = snapshot(prediction)
            values = seen.returned._store
            known = fields.keys() >= values.keys()
            seen.outputs = values if known else {name: value for name, value in values.items() if name in fields}
            self._seen[id(prediction)] = seen
        return prediction

    def in_order(self) -> list[tuple[Any, Seen | None]]:
        """The trace, each entry with its call, in an order that does not depend on timing: as the calls were made;
        those that other threads or tasks made between two of the program's own, by content."""
        ordered: list[tuple[Any, Seen | None]] = []
        pairs = [(entry, self._seen.get(id(entry[2]))) for entry in self.trace]
        for foreign, group in itertools.groupby(pairs, self._is_foreign):
            calls = list(group)
            ordered += sorted(calls, key=_content) if foreign else calls
        return ordered

    def _is_foreign(self, call: tuple[Any, Seen | None]) -> bool:
        _, seen = call
        return seen is not None and seen.place not in self._homes


_RECORD: ContextVar[Record | None] = ContextVar("bettertogether_record", default=None)
_CALL: ContextVar[Seen | None] = ContextVar("bettertogether_call", default=None)


class Watch:
    """Sees what the modules of a copy of a program do, one run at a time.

    The modules become objects of a class of their own, derived from theirs, so that their copies of any kind are
    watched too. One that is called without DSPy's context, as in a thread of the program's own, gets the run's trace
    for that call; in a deep copy (`dspy.BestOfN` makes one for each attempt) the trace that the copy was called with.
    """

    def __init__(self, first: Watch | None = None) -> None:
        self._first = first or self
        """The watch that this is a copy of."""
        self._record: Record | None = None
        self._trace: list[Any] | None = None

    def __deepcopy__(self, memo: Any) -> Watch:
        return Watch(self._first)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled for another process, where nothing can be seen.
        return Watch, ()

    def attach(self, modules: Iterable[dspy.Module]) -> None:
        """See what these modules do."""
        for module in modules:
            vars(module)["_bettertogether_watch"] = self
            use_shared_loop(module, run_async_part)
            module.__class__ = _watched_class(type(module))

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Take down what the modules do within the block, and in threads that they start."""
        self._record = record
        try:
            with _context(record, record.trace, record.lm):
                yield
        finally:
            self._record = None

    def within(self) -> AbstractContextManager[Record | None]:
        """The run's record, and its context where there is none; None when no run goes on."""
        if (record := _RECORD.get()) is not None:
            if self._first is not self:
                self._trace = dspy.settings.trace
            return nullcontext(record)
        if (record := self._first._record) is None:
            return nullcontext()
        lm = record.lm if dspy.settings.lm is record.settings_lm else watched_lm(dspy.settings.lm)
        return _context(record, record.trace if self._trace is None else self._trace, lm)

    @contextmanager
    def call(
        self, predictor: dspy.Predict, arguments: dict[str, Any]
    ) -> Iterator[tuple[dspy.Prediction | None, Callable[[Any], Any]]]:
        """One call of a predictor: its prediction where that is known; else give it to the function."""
        with self.within() as record:
            if record is None:
                yield None, lambda prediction: prediction
                return
            seen = _begun(predictor, arguments)
            lm = seen.lm
            if lm is record.stand_in and dspy.settings.lm is not record.lm:
                lm = dspy.settings.lm
            if lm is not seen.lm or not _is_watched(lm):
                seen.given = None if _is_watched(lm) else lm
                seen.lm = arguments["lm"] = record.watched(predictor, lm)
            draw_anew(seen.lm, arguments, lambda: record.earlier(seen))
            known = None if record.replay is None else _replayed(record.replay, seen, arguments)
            token = _CALL.set(seen)
            try:
                yield known, lambda prediction: record.finished(seen, prediction)
            except AdapterParseError:
                record.unread.append(seen)
                raise
            finally:
                _CALL.reset(token)


def _replayed(replay: Replay, seen: Seen, arguments: dict[str, Any]) -> dspy.Prediction | None:
    """The prediction of an earlier run, which then is in DSPy's trace as any other."""
    answer, seen.anew = replay.known(seen.predictor.stage, seen.inputs)
    if seen.anew:
        replay.sample(seen.lm, arguments)
    if answer is None:
        return None
    seen.replies = [answer.reply]
    prediction = snapshot(answer.prediction)
    if dspy.settings.trace is not None:
        dspy.settings.trace.append((seen.predictor, {**answer.filled, **seen.inputs}, prediction))
    return prediction


@contextmanager
def _context(record: Record, trace: list[Any], lm: Any) -> Iterator[Record]:
    token = _RECORD.set(record)
    try:
        with dspy.context(
            trace=trace,
            usage_tracker=record.tracker,
            lm=lm,
            # On for `note_response`, and for LMs that are none of the predictors', which tell the bill.
            disable_history=False,
            max_history_size=record.history_size,
            caller_modules=[record.bill],
            # The trace is read, however few calls of a run the user keeps.
            max_trace_size=sys.maxsize,
        ):
            yield record
    finally:
        _RECORD.reset(token)


def run_async_part(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine of the program's that is waited for here; it goes on at a place on the shared loop."""
    record = _RECORD.get()
    is_own = record is not None and record.is_here()

    async def moved() -> Any:
        if record is not None and is_own:
            record.runs_here()
        return await coroutine

    return run_on_loop(moved())


class _Watched:
    """A module that is watched, in any copy of it."""

    _bettertogether_watch: Watch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an object of the program's own class, which another process knows; a copy made here is watched again."""
        made: Any = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[1][:1] != (type(self),):
            return made
        return _remade, (os.getpid(), type(self).__bases__[1], made[0], *made[1][1:]), *made[2:]


def _remade(process: int, kind: type, make: Callable[..., Any], *arguments: Any) -> Any:
    return make(_watched_class(kind) if process == os.getpid() else kind, *arguments)


class _WatchedModule(_Watched):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._bettertogether_watch.within():
            return super().__call__(*arguments, **options)  # type: ignore[misc]

    async def acall(self, *arguments: Any, **options: Any) -> Any:
        with self._bettertogether_watch.within():
            return await super().acall(*arguments, **options)  # type: ignore[misc]


class _WatchedPredictor(_Watched):
    # Not `__call__`: a program may call `forward` itself.
    def forward(self, **arguments: Any) -> Any:
        with self._bettertogether_watch.call(self, arguments) as (known, finished):
            return finished(super().forward(**arguments) if known is None else known)  # type: ignore[misc]

    async def aforward(self, **arguments: Any) -> Any:
        with self._bettertogether_watch.call(self, arguments) as (known, finished):
            return finished(await super().aforward(**arguments) if known is None else known)  # type: ignore[misc]


def _watched_class(kind: type) -> type:
    if issubclass(kind, _Watched):
        return kind
    base = _WatchedPredictor if issubclass(kind, dspy.Predict) else _WatchedModule
    # Found by what Python itself keeps of a class, weakly: a reference of ours would keep all that it closes over.
    for made in type.__subclasses__(kind):
        if made.__bases__ == (base, kind):
            return made
    # Known by the name and the source of the class that it stands for, as `dspy.Refine` shows it to an LM.
    named = ("__module__", "__qualname__", "__doc__", "__firstlineno__")
    body = {name: vars(kind)[name] for name in named if name in vars(kind)}
    return types.new_class(kind.__name__, (base, kind), exec_body=lambda space: space.update(body))


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


def answer_of(entry: Any, seen: Seen) -> Answer:
    """What a call gave, for a run that is to answer it alike; `entry` is the call in DSPy's trace."""
    filled = seen.inputs if list(entry[1]) == list(seen.inputs) else {**entry[1], **seen.inputs}
    returned = seen.returned or dspy.Prediction()
    return Answer(entry[0].stage, seen.inputs, filled, returned, seen.reply)


def _place() -> tuple[int, int]:
    task = asyncio.current_task() if asyncio._get_running_loop() else None
    return threading.get_ident(), id(task) if task else 0


def _content(call: tuple[Any, Seen | None]) -> str:
    predictor, inputs, prediction = call[0]
    signature = predictor.signature
    return repr((list(signature.fields), signature.instructions, sorted(inputs.items(), key=str), prediction))


def watched_lm(lm: Any) -> Any:
    """A copy of an LM that tells the predictor's call in progress how it was answered."""
    if not isinstance(lm, dspy.BaseLM) or _is_watched(lm):
        return lm
    copied = lm.copy()
    copied.update_history = note_response
    return copied


def _is_watched(lm: Any) -> bool:
    return getattr(lm, "update_history", None) is note_response


def note_response(entry: Mapping[str, Any]) -> None:
    """What a watched LM does in place of keeping a history of more than its last answer; `dspy.inspect_history` finds
    each all the same."""
    seen = _CALL.get()
    if (record := _RECORD.get()) is not None:
        record.bill.append(entry)
        if record.keeps_history:
            given = seen.given if seen else None
            # Those of modules and of predictors' LMs would keep every prompt of a pass in memory.
            with dspy.context(max_history_size=record.history_size if given else 0, caller_modules=[]):
                record_history(given, entry)
    if seen is not None:
        # For a program that asks its LM what the last answer took.
        seen.lm.history[:] = [entry]
        seen.choices = [reply_of(entry, number) for number in range(len(entry["outputs"]))]
        seen.replies += seen.choices[:1] or [Reply()]
        if "token_ids" in (tokens := part_of(entry["response"], "provider_data") or {}):
            seen.sampled.append(tokens)
