"""Run a program on one example and note which predictor made which call. Failures are data."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMTimeoutError

from ..errors import PromptTooLongError
from ..programs.behaviour import program_key
from ..programs.content import by_name, example_content, fingerprint
from ..programs.copies import Copier
from ..programs.program import modules_of, predictors_of
from ..records import Ledger
from .attribution import CallAttribution
from .replay import Answer, Branch, Replay, snapshot
from .rescue import HINT, as_field, hint_before_the_answer, narrow_signatures
from .sampled_lms import needs_seed, sampling_lm
from .usage import hand_on_usage, used
from .watching import Record, Seen, Watch, answer_of, run_async_part, watched_lm

FailureKind = Literal["parse failure", "prompt too long", "timeout", "program error"]


Source = Literal["student", "teacher", "sample", "branch", "rescue"]
"""Who made a run: the student or a teacher as it is, either of them sampled, in one call alone, or told the label."""


@dataclass(frozen=True)
class Call:
    """One call of a predictor."""

    predictor: str
    """Its name in `program.named_predictors()`."""
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    """Output fields only, as the LM gave them."""
    signature: type[dspy.Signature] | None = None
    """The one that the call was given; None: the predictor's own."""
    demos: tuple[Any, ...] | None = None
    """Those that the call was given; None: the predictor's own."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """LM options that the call was given."""
    adapter: Any = field(default=None, compare=False)
    """Another adapter than the run's, where the call was made under one."""
    text: str | None = field(default=None, compare=False)
    """The answer as the LM wrote it, where that is known."""
    thoughts: str | None = field(default=None, compare=False)
    """What a reasoning LM thought before the answer, where it says so."""
    cut: bool = False
    """The answer ended at max_tokens: neither a row nor a demo may show it."""
    unfit: str | None = None
    """Why no row may be made of it, another reason than `cut`."""
    place: int | None = field(default=None, compare=False)
    """Position among the run's `answers`; None where it was not seen."""
    anew: bool = field(default=False, compare=False)
    """It is the call that a branch answers anew."""
    sampled: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    """Its answers in tokens, where the LM gives those (`engines.answers.SampledAnswer`): the last is that of `text`;
    those before it could not be read."""


@dataclass(frozen=True)
class Rollout:
    """What a program did on one example, before any metric has looked at it."""

    prediction: Any
    calls: tuple[Call, ...]
    raw_trace: tuple[Any, ...]
    """DSPy's trace: (predictor, inputs, prediction) triples, with the program's own predictors."""
    unread: tuple[Call, ...] = ()
    """Calls that raised, since their answer could not be read. They are not among `calls`; `text` is the answer to the
    predictor's own prompt."""
    strangers: int = 0
    """Calls of predictors that are none of the program's, such as one that `forward` makes."""
    failure: FailureKind | None = None
    error: BaseException | None = None
    ledger: Ledger = field(default_factory=Ledger)
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    """Of all calls that were seen, frozen sub-modules' among them, in their order; an unread one that ended the run is
    the last."""
    strayed: bool = False
    """It was to answer one call of an earlier run anew, and never came to it."""

    @property
    def outputs(self) -> list[Any]:
        """The values of all output fields of all calls."""
        return [value for call in self.calls for value in call.outputs.values()]


@dataclass(frozen=True)
class Attempt:
    """How to run: as it is, sampled, sampled in one call alone, or with the label as a hint."""

    source: Source = "student"
    number: int = 0
    """0 for the first run, 1.. for further ones."""
    temperature: float | None = None
    """None leaves the LM's own."""
    narrow: Mapping[str, Any] = field(default_factory=dict)
    """Rescue: label field to the value that the answer must have."""
    leads: bool = False
    """Rescue: the label is a hint for the predictors before those that answer it, which have to find it themselves."""
    branch: Branch | None = None
    """An earlier run, and its call to answer anew."""

    @cached_property
    def key(self) -> str:
        """What tells one attempt from another."""
        parts = [self.number, self.temperature, by_name(self.narrow), *([True] if self.leads else []), *self.of_branch]
        return fingerprint(parts)

    @property
    def of_branch(self) -> tuple[str, ...]:
        """What tells its branch from another; empty where there is none."""
        return () if self.branch is None else (self.branch.key,)


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


class RolloutStore:
    """Runs that were done before, by program, example and attempt, so that steps share them.

    As with DSPy's cache, the same request to the same model has the same answer, sampled or not.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[object, ...], Rollout] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> Rollout | None:
        """The run for a key, or None."""
        with self._lock:
            return self._runs.get(key)

    def put(self, key: tuple[object, ...], run: Rollout) -> None:
        """Keep a run, unless something raised or took too long: that is worth another try."""
        if run.failure not in ("program error", "timeout"):
            with self._lock:
                self._runs[key] = run


class Runner:
    """Runs one program on examples; safe to call from many threads.

    The program itself is left alone: each run has a copy of it to itself, so that a call is known to be of this run
    in whatever thread it is made.
    """

    def __init__(self, program: dspy.Module, *, seed: int = 0, store: RolloutStore | None = None) -> None:
        self._program = program
        self._seed = seed
        self._key = program_key(program) if store is not None else None
        self._store = store if self._key is not None else None
        self._needs_seeds = any(needs_seed(predictor.lm) for predictor in program.predictors())
        self._attribution = CallAttribution(program)
        self._lock = threading.Lock()
        self._copier: Copier | None = None
        self._spare: list[_Copy] = []
        """Copies that no thread is using; one for each run would cost more than the run of a small program."""

    def run(self, example: dspy.Example, attempt: Attempt = Attempt()) -> Rollout:
        """Run the program on one example. Never raises for what the program does; see `Rollout.failure`."""
        changed = self._is_changed(attempt)
        if self._store is None and not changed:
            return self._anew(example, attempt, None)
        content, all_seen = example_content(example)
        store = self._store if all_seen else None
        key = (self._key, content, self._seed if changed else None, attempt.key)
        if store and (known := store.get(key)):
            return replace(known, ledger=Ledger())
        run = self._anew(
            example, attempt, stable_seed(self._seed, content, attempt.number, *attempt.of_branch) if changed else None
        )
        if store:
            store.put(key, run)
        return run

    def _anew(self, example: dspy.Example, attempt: Attempt, seed: int | None) -> Rollout:
        """A run by a copy that no other thread is using."""
        try:
            copied = self._spare.pop()
        except IndexError:
            with self._lock:
                self._copier = self._copier or Copier(self._program, shares_state=True)
            copied = _Copy(self._program, self._copier.copy(), self._attribution)
        run = copied.run(example, attempt, seed)
        self._spare.append(copied)
        return run

    def _is_changed(self, attempt: Attempt) -> bool:
        """Whether an attempt needs other LMs or prompts than the program's."""
        asked = attempt.number > 0 or attempt.temperature is not None or bool(attempt.narrow)
        return asked or self._needs_seeds


def run_program(program: dspy.Module, example: dspy.Example) -> Rollout:
    """One run of a program as it is. Never raises for what the program does."""
    return Runner(program).run(example)


@dataclass(frozen=True)
class _Basis:
    """What a predictor had when a run began."""

    signature: type[dspy.Signature]
    demos: tuple[Any, ...]
    lm: Any


class _Copy:
    """A copy of a program that serves one run at a time, and is watched."""

    def __init__(self, program: dspy.Module, copied: dspy.Module, attribution: CallAttribution) -> None:
        self._attribution = attribution
        self._program = copied
        attribution.mark(self._program)
        originals = dict(modules_of(program))
        pairs = [(module, originals[name]) for name, module in modules_of(self._program)]
        for module, original in pairs:
            # A deep copy is made without them.
            module.callbacks = list(original.callbacks)
        self._watch = Watch()
        self._watch.attach(module for module, _ in pairs)
        self._by_name = predictors_of(self._program)
        self._basis: dict[str, _Basis] = {}
        self._lms: dict[int, tuple[Any, Any]] = {}
        """LMs of the program and their watched copies, by id."""
        own = {id(predictor) for predictor in self._by_name.values()}
        self._predictors = [(*pair, id(pair[0]) in own) for pair in pairs if isinstance(pair[0], dspy.Predict)]
        """Each with its original, and whether it is one of `named_predictors`."""

    def run(self, example: dspy.Example, attempt: Attempt, seed: int | None) -> Rollout:
        """One run; `seed` is None for the program's own LMs."""
        self._prepare(attempt, seed)
        prediction, failure, error = None, None, None
        lm = dspy.settings.lm
        replay = None if attempt.branch is None else Replay(attempt.branch, attempt.number, seed)
        with self._watch.recording(self._watched(lm) if lm is not None else None, replay) as record:
            record.runs_here()
            try:
                prediction = _call(self._program, dict(example.inputs()))
            except Exception as caught:
                failure, error = _kind(caught), caught
        hand_on_usage(record.tracker, prediction)
        calls, raw_trace, strangers = [], [], 0
        answers: list[Answer] = []
        for entry, seen in record.in_order():
            original, name = self._attribution.owner(entry[0])
            raw_trace.append((original, *entry[1:]))
            strangers += name is None
            if name:
                calls.append(self._call_of(entry, seen, name, record, attempt, len(answers)))
            if seen is not None:
                answers.append(answer_of(entry, seen))
        ended = record.unread[-1] if failure == "parse failure" and record.unread else None
        return Rollout(
            prediction=prediction,
            calls=tuple(calls),
            raw_trace=tuple(raw_trace),
            unread=tuple(self._unread(record, attempt, ended, len(answers))),
            strangers=strangers,
            failure=failure,
            error=error,
            ledger=used(record, len(raw_trace) - (replay.given if replay else 0)),
            answers=(*answers, *([answer_of((ended.predictor, {}), ended)] if ended else [])),
            strayed=replay is not None and not replay.came,
        )

    def _unread(self, record: Record, attempt: Attempt, ended: Seen | None, last: int) -> Iterator[Call]:
        """The calls whose answer could not be read, with the first one: DSPy asks for others by another prompt. The
        call that ended the run has the last place."""
        for seen in record.unread:
            if name := self._attribution.owner(seen.predictor)[1]:
                place = last if seen is ended else None
                call = self._call_of((seen.predictor, seen.inputs, None), seen, name, record, attempt, place)
                first = next(iter(seen.replies), seen.reply)
                yield replace(call, text=first.text, thoughts=first.thoughts, cut=first.cut)

    def _prepare(self, attempt: Attempt, seed: int | None) -> None:
        """Undo what a run before left, and give the predictors the LMs and prompts of this one."""
        # One copy of an LM for all that share it: dspy.BestOfN asks for the one LM of its module.
        lms: dict[tuple[int, bool], Any] = {}
        for predictor, original, is_own in self._predictors:
            predictor.signature, predictor.config = original.signature, original.config
            predictor.demos = list(original.demos)
            sampled = seed is not None and is_own
            lm = original.lm or (dspy.settings.lm if sampled else None)
            key = id(lm), sampled
            if lm is not None and key not in lms:
                lms[key] = (
                    watched_lm(sampling_lm(self._watched(lm), attempt.number, attempt.temperature, seed))
                    if sampled
                    else self._watched(lm)
                )
            predictor.lm = lms.get(key)
        if attempt.leads:
            hint_before_the_answer(self._program, attempt.narrow)
        elif attempt.narrow:
            narrow_signatures(self._program, attempt.narrow)
        self._basis = {n: _Basis(p.signature, tuple(p.demos), p.lm) for n, p in self._by_name.items()}

    def _watched(self, lm: Any) -> Any:
        """The watched copy of an LM, from a run before unless that one changed it."""
        own, kept = self._lms.get(id(lm), (None, None))
        if own is not lm or kept.kwargs != lm.kwargs or kept.model != lm.model:
            kept = watched_lm(lm)
            self._lms[id(lm)] = lm, kept
        return kept

    def _call_of(
        self, entry: Any, seen: Seen | None, name: str, record: Record, attempt: Attempt, place: int | None
    ) -> Call:
        predictor, inputs, prediction = entry
        if seen is None:
            fields = predictor.signature.output_fields
            return Call(name, dict(inputs), {key: value for key, value in prediction.items() if key in fields})
        basis = self._basis[name]
        own_signature = None if seen.signature is basis.signature else seen.signature
        # DSPy has filled in defaults, and a wrapped adapter (dspy.Refine's) may have put in more.
        fields = [key for key in seen.signature.input_fields if key in inputs]
        as_given = fields == list(seen.inputs)
        return Call(
            predictor=name,
            inputs=seen.inputs if as_given else {key: seen.inputs.get(key, inputs[key]) for key in fields},
            outputs=self._outputs(seen, name, attempt),
            signature=own_signature,
            demos=None if _same_demos(seen, basis) else tuple(seen.demos),
            config=snapshot(dict(seen.asked.get("config") or {})),
            adapter=_own_adapter(seen, record),
            text=seen.reply.text,
            thoughts=seen.reply.thoughts,
            cut=seen.reply.cut,
            sampled=tuple(seen.sampled),
            unfit=_unfit(seen, basis.lm or record.lm, own_signature, attempt),
            place=place,
            anew=seen.anew,
        )

    def _outputs(self, seen: Seen, name: str, attempt: Attempt) -> dict[str, Any]:
        """What the call gave, a rescued label as a value of the field's own type."""
        if not attempt.narrow:
            return seen.outputs
        fields = self._attribution.predictor(name).signature.output_fields
        rescued = attempt.narrow.keys() & fields.keys()
        return {
            field_name: as_field(value, fields[field_name].annotation) if field_name in rescued else value
            for field_name, value in seen.outputs.items()
        }


def _same_demos(seen: Seen, basis: _Basis) -> bool:
    """Whether a call had the predictor's demos, or deep copies of them."""
    if len(seen.demos) != len(basis.demos):
        return False
    return all(one is other or repr(one) == repr(other) for one, other in zip(seen.demos, basis.demos, strict=True))


def _own_adapter(seen: Seen, record: Record) -> Any:
    # That of dspy.Refine adds advice on an earlier attempt, which is no part of the predictor's own prompt.
    if seen.adapter is record.adapter or type(seen.adapter).__module__ == "dspy.predict.refine":
        return None
    return seen.adapter or dspy.ChatAdapter()


def _unfit(seen: Seen, own_lm: Any, own_signature: Any, attempt: Attempt) -> str | None:
    if seen.lm is not own_lm and _weights_of(seen.lm) != _weights_of(own_lm):
        return "made with another LM than the predictor's"
    if attempt.narrow and own_signature is not None and HINT in own_signature.instructions:
        return "its own signature shows the hint"
    return None


def _weights_of(lm: Any) -> tuple[Any, Any]:
    """What answers for an LM, whatever its options."""
    engine = getattr(lm, "engine", None)
    return engine if isinstance(engine, str) else id(engine), getattr(lm, "model", lm)


def _call(program: dspy.Module, inputs: dict[str, Any]) -> Any:
    if hasattr(type(program), "forward") or "forward" in vars(program):
        return program(**inputs)
    if hasattr(type(program), "aforward"):
        return run_async_part(program.acall(**inputs))
    raise TypeError(f"{type(program).__name__} has neither forward nor aforward: define one of them.")


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, AdapterParseError):
        return "parse failure"
    # DSPy wraps what an engine raises, unless it is one of its own errors.
    if isinstance(error, ContextWindowExceededError) or isinstance(error.__cause__, PromptTooLongError):
        return "prompt too long"
    return "timeout" if isinstance(error, TimeoutError | LMTimeoutError) else "program error"
