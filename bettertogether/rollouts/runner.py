"""Run a program on one example and note which predictor made which call. Failures are data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError, LMTimeoutError

from ..errors import PromptTooLongError
from ..programs.behaviour import program_key
from ..programs.content import example_content
from ..programs.copies import Copier
from ..programs.program import modules_of, predictors_of
from ..records import Ledger
from .attribution import CallAttribution
from .failures import ENDS_ONE_RUN
from .logs import quiet_in_runs
from .replay import Answer, Replay, Reply, snapshot
from .rescue import HINT, as_field, hint_before_the_answer, narrow_signatures
from .rollout import Attempt, Call, FailureKind, Rollout, RolloutStore, stable_seed
from .sampled_lms import needs_seed, samples, sampling_lm
from .usage import hand_on_usage, used
from .watching import Record, Seen, Watch, answer_of, run_async_part, watched_lm

quiet_in_runs()

DRAWN_BY = frozenset({"temperature", "seed", "rollout_id"})
"""Options of a predictor that say how its answers are drawn; a try at another temperature has its own."""

REFINE = "dspy.predict.refine"
"""Module of what is dspy.Refine's own: its adapter, and the predictor that it makes for advice."""


class Runner:
    """Runs one program on examples; safe to call from many threads.

    The program itself is left alone: each run has a copy of it to itself, so that a call is known to be of this run
    in whatever thread it is made. What its modules keep in lists and the like, those copies share among themselves.
    """

    def __init__(self, program: dspy.Module, *, seed: int = 0, store: RolloutStore | None = None) -> None:
        self._program = program
        self._seed = seed
        self._key = program_key(program) if store is not None else None
        self._store = store if self._key is not None else None
        self._needs_seeds = any(map(needs_seed, program.predictors()))
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
        seed = stable_seed(self._seed, content, attempt.number, *attempt.of_branch) if changed else None
        run = self._anew(example, attempt, seed)
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
        before = set(threading.enumerate())
        run = copied.run(example, attempt, seed)
        # A thread that the program left behind may still call this copy: such a call is of no other run.
        if not any(_is_left(thread) for thread in threading.enumerate() if thread not in before):
            self._spare.append(copied)
        return run

    def _is_changed(self, attempt: Attempt) -> bool:
        """Whether an attempt needs other LMs or prompts than the program's."""
        asked = attempt.number > 0 or attempt.temperature is not None or bool(attempt.narrow)
        return asked or self._needs_seeds


@dataclass(frozen=True)
class _Basis:
    """What a predictor had when a run began."""

    signature: type[dspy.Signature]
    demos: tuple[Any, ...]
    lm: Any
    """Its own."""


class _Copy:
    """A copy of a program that serves one run at a time, and is watched."""

    def __init__(self, program: dspy.Module, copied: dspy.Module, attribution: CallAttribution) -> None:
        self._attribution = attribution
        self._program = copied
        attribution.mark(self._program)
        originals = dict(modules_of(program))
        # What modules keep is shared: there may be predictors that a run of another copy made, none of the program's.
        pairs = [(module, originals[name]) for name, module in modules_of(self._program) if name in originals]
        for module, original in pairs:
            # A deep copy is made without them.
            module.callbacks = list(original.callbacks)
        self._watch = Watch()
        self._watch.attach(module for module, _ in pairs)
        self._modules = [module for module, _ in pairs]
        names = predictors_of(program).keys()
        self._by_name = {name: p for name, p in predictors_of(self._program).items() if name in names}
        self._basis: dict[str, _Basis] = {}
        self._lms: dict[int, tuple[Any, Any]] = {}
        """LMs of the program and their watched copies, by id."""
        self._stand_in: Any = None
        """What predictors without an LM are given for `dspy.settings.lm`."""
        own = {id(predictor) for predictor in self._by_name.values()}
        self._predictors = [(*pair, id(pair[0]) in own) for pair in pairs if isinstance(pair[0], dspy.Predict)]
        """Each with its original, and whether it is one of `named_predictors`."""
        self._samples = any(samples(original.config) for _, original, is_own in self._predictors if is_own)

    def run(self, example: dspy.Example, attempt: Attempt, seed: int | None) -> Rollout:
        """One run; `seed` is None for the program's own LMs."""
        self._prepare(attempt, seed)
        prediction, failure, error = None, None, None
        lm = dspy.settings.lm
        replay = None if attempt.branch is None else Replay(attempt.branch, attempt.number, seed)
        watched = self._watched(lm) if lm is not None else None
        watched_for = partial(self._watched_for, attempt, seed)
        record = Record(watched, self._stand_in, replay, watched_for, is_further=attempt.number > 0)
        with self._watch.recording(record):
            record.runs_here()
            try:
                prediction = _call(self._program, snapshot(dict(example.inputs())))
            except ENDS_ONE_RUN as caught:
                failure, error = _kind(caught), caught
        hand_on_usage(record.bill, record.tracker, prediction)
        calls, raw_trace, strangers = [], [], 0
        answers: list[Answer] = []
        for entry, seen in record.in_order():
            original, name = self._attribution.owner(entry[0])
            raw_trace.append((original, *entry[1:]))
            strangers += name is None and entry[0].signature.__module__ != REFINE
            if name:
                calls.append(self._call_of(entry, seen, name, record, attempt, len(answers), prediction))
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
            ledger=used(
                record.bill,
                record.tracker,
                len(raw_trace) - (replay.given if replay else 0),
                is_told=record.history_size > 0,
            ),
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
        lms: dict[tuple[int, bool, bool], Any] = {}
        for module in self._modules:
            module.history = []
        for predictor, original, is_own in self._predictors:
            sampled = seed is not None and is_own
            predictor.signature, predictor.config = original.signature, original.config
            if sampled and attempt.temperature is not None:
                predictor.config = {k: v for k, v in original.config.items() if k not in DRAWN_BY}
            predictor.demos = list(original.demos)
            lm = original.lm or (dspy.settings.lm if sampled else None)
            key = id(lm), sampled, original.lm is None
            if lm is not None and key not in lms:
                lms[key] = (
                    watched_lm(
                        sampling_lm(self._watched(lm), attempt.number, attempt.temperature, seed, always=self._samples)
                    )
                    if sampled
                    else self._watched(lm)
                )
            predictor.lm = lms.get(key)
        self._stand_in = lms.get((id(dspy.settings.lm), True, True))
        if attempt.leads:
            hint_before_the_answer(self._by_name, attempt.narrow)
        elif attempt.narrow:
            narrow_signatures(self._by_name, attempt.narrow)
        self._basis = {
            name: _Basis(p.signature, tuple(p.demos), None if p.lm is self._stand_in else p.lm)
            for name, p in self._by_name.items()
        }

    def _watched(self, lm: Any) -> Any:
        """The watched copy of an LM, from a run before unless that one changed it."""
        own, kept = self._lms.get(id(lm), (None, None))
        if own is not lm or kept.kwargs != lm.kwargs or kept.model != lm.model:
            kept = watched_lm(lm)
            self._lms[id(lm)] = lm, kept
        return kept

    def _watched_for(self, attempt: Attempt, seed: int | None, predictor: dspy.Predict, lm: Any) -> Any:
        """The copy of an LM that a call asks in place of its predictor's, if that has one: with the same weights it
        samples alike."""
        if not isinstance(lm, dspy.BaseLM):
            return lm
        basis = self._basis.get(self._attribution.owner(predictor)[1] or "")
        if seed is not None and basis and (basis.lm is None or _weights_of(lm) == _weights_of(basis.lm)):
            lm = sampling_lm(lm, attempt.number, attempt.temperature, seed, always=self._samples)
        return watched_lm(lm)

    def _call_of(
        self,
        entry: Any,
        seen: Seen | None,
        name: str,
        record: Record,
        attempt: Attempt,
        place: int | None,
        returned: Any = None,
    ) -> Call:
        predictor, inputs, prediction = entry
        if seen is None:
            fields = predictor.signature.output_fields
            return Call(name, dict(inputs), {key: value for key, value in prediction.items() if key in fields})
        basis = self._basis[name]
        outputs, reply = _settled(seen, returned)
        own_signature = None if seen.signature is basis.signature else seen.signature
        # DSPy has filled in defaults, and a wrapped adapter (dspy.Refine's) may have put in more.
        fields = [key for key in seen.signature.input_fields if key in inputs]
        as_given = fields == list(seen.inputs)
        return Call(
            predictor=name,
            inputs=seen.inputs if as_given else {key: seen.inputs.get(key, inputs[key]) for key in fields},
            outputs=self._outputs(outputs, name, attempt),
            signature=own_signature,
            demos=None if _same_demos(seen, basis) else tuple(seen.demos),
            config=snapshot(dict(seen.asked.get("config") or {})),
            adapter=_own_adapter(seen, record),
            text=reply.text,
            thoughts=reply.thoughts,
            cut=reply.cut,
            sampled=tuple(seen.sampled),
            unfit=_unfit(seen, basis.lm or record.lm, own_signature, attempt),
            place=place,
            anew=seen.anew,
        )

    def _outputs(self, outputs: dict[str, Any], name: str, attempt: Attempt) -> dict[str, Any]:
        """What the call gave, a rescued label as a value of the field's own type."""
        if not attempt.narrow:
            return outputs
        fields = self._attribution.predictor(name).signature.output_fields
        rescued = attempt.narrow.keys() & fields.keys()
        return {
            field_name: as_field(value, fields[field_name].annotation) if field_name in rescued else value
            for field_name, value in outputs.items()
        }


def _settled(seen: Seen, returned: Any) -> tuple[dict[str, Any], Reply]:
    """What a call gave. Of several answers (`n`), the first that has what the program returned in the fields of that
    name: a program may vote among them, and what it voted down is not to be learned."""
    completions = getattr(seen.returned, "_completions", None)
    if completions is None or len(completions) < 2 or not isinstance(returned, dspy.Prediction):
        return seen.outputs, seen.reply
    shared = [name for name in seen.outputs if name in returned]
    wanted = [repr(returned[name]) for name in shared]
    for number, one in enumerate(completions):
        if [repr(one[name]) for name in shared] == wanted:
            reply = seen.choices[number] if number < len(seen.choices) else Reply()
            return {name: one[name] for name in seen.outputs}, reply
    return seen.outputs, seen.reply


def _same_demos(seen: Seen, basis: _Basis) -> bool:
    """Whether a call had the predictor's demos, or deep copies of them."""
    if len(seen.demos) != len(basis.demos):
        return False
    return all(one is other or repr(one) == repr(other) for one, other in zip(seen.demos, basis.demos, strict=True))


def _own_adapter(seen: Seen, record: Record) -> Any:
    # That of dspy.Refine adds advice on an earlier attempt, which is no part of the predictor's own prompt.
    if seen.adapter is record.adapter or type(seen.adapter).__module__ == REFINE:
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


def _is_left(thread: threading.Thread) -> bool:
    """Whether a new thread is one of a program's, and neither ours nor the event loop's."""
    return not thread.name.startswith(("bettertogether", "AnyIO", "asyncio"))


def _call(program: dspy.Module, inputs: dict[str, Any]) -> Any:
    has_forward = hasattr(type(program), "forward") or "forward" in vars(program)
    if hasattr(type(program), "aforward") and not has_forward:
        return run_async_part(program.acall(**inputs))
    return program(**inputs)


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, AdapterParseError):
        return "parse failure"
    # DSPy wraps what an engine raises, unless it is one of its own errors.
    if isinstance(error, ContextWindowExceededError) or isinstance(error.__cause__, PromptTooLongError):
        return "prompt too long"
    is_timeout = any(isinstance(each, TimeoutError | LMTimeoutError) for each in _chain(error))
    return "timeout" if is_timeout else "program error"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what an LM's error comes from. Of any other, what the program got over before is no cause."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        yield each
        seen.append(each)
        each = each.__cause__ if isinstance(error, LMError) else None
