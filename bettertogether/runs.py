"""Run a program on one example and note which predictor object made which call. Failures are data."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMTimeoutError
from dspy.utils.usage_tracker import UsageTracker

from .errors import PromptTooLongError
from .programs import copy_program, modules_of, predictors_of, program_key
from .records import Ledger

FailureKind = Literal["parse failure", "prompt too long", "timeout", "program error"]


@dataclass(frozen=True)
class Call:
    """One call of a predictor."""

    predictor: str
    """Its name in `program.named_predictors()`."""
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    """Output fields only."""


@dataclass(frozen=True)
class Run:
    """What a program did on one example, before any metric has looked at it."""

    prediction: Any
    calls: tuple[Call, ...]
    raw_trace: tuple[Any, ...]
    """DSPy's trace: (predictor, inputs, prediction) triples."""
    failure: FailureKind | None = None
    error: BaseException | None = None
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class Attempt:
    """How to run: as it is, sampled, or with the label as a hint."""

    source: Literal["student", "teacher", "sample", "rescue"] = "student"
    number: int = 0
    """0 for the first run, 1.. for further ones."""
    temperature: float | None = None
    """None leaves the LM's own."""
    narrow: Mapping[str, Any] = field(default_factory=dict)
    """Rescue: label field to the value that the answer must have."""

    @property
    def key(self) -> str:
        """What tells one attempt from another."""
        return f"{self.number}|{self.temperature}|{sorted((k, repr(v)) for k, v in self.narrow.items())}"


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def example_key(example: dspy.Example) -> str:
    """A hash of an example's content."""
    return hashlib.sha256(repr(sorted(example.toDict().items())).encode()).hexdigest()


class RunStore:
    """Runs that were done before, by program, example and attempt, so that steps share them.

    As with DSPy's cache, the same request to the same model has the same answer, sampled or not.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str, str], Run] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, str]) -> Run | None:
        """The run for a key, or None."""
        with self._lock:
            return self._runs.get(key)

    def put(self, key: tuple[str, str, str], run: Run) -> None:
        """Keep a run, unless something raised or took too long: that is worth another try."""
        if run.failure not in ("program error", "timeout"):
            with self._lock:
                self._runs[key] = run


class Runner:
    """Runs one program on examples; safe to call from many threads."""

    def __init__(self, program: dspy.Module, *, seed: int = 0, store: RunStore | None = None) -> None:
        self._program = program
        self._seed = seed
        self._key = program_key(program)
        self._store = store if self._key is not None else None
        self._predictors = program.predictors()
        self._needs_seeds = any(_needs_seed(predictor.lm) for predictor in self._predictors)
        self._attribution = Attribution(program)
        self._spare: list[tuple[dspy.Module, Attribution]] = []
        """Copies of the program that no thread is using; copying one for each attempt would cost more than the run
        of a small program, and as much memory as what it holds, such as a search index."""

    def run(self, example: dspy.Example, attempt: Attempt = Attempt()) -> Run:
        """Run the program on one example. Never raises for what the program does; see `Run.failure`."""
        content = example_key(example)
        key = (self._key or "", content, f"{self._seed if self._is_changed(attempt) else ''}|{attempt.key}")
        if self._store and (known := self._store.get(key)):
            return Run(known.prediction, known.calls, known.raw_trace, known.failure, known.error)
        with self._prepared(attempt, stable_seed(self._seed, content, attempt.number)) as (program, attribution):
            run = run_program(program, example, attribution)
        if self._store:
            self._store.put(key, run)
        return run

    def _is_changed(self, attempt: Attempt) -> bool:
        """Whether an attempt needs other LMs or prompts than the program's."""
        asked = attempt.number > 0 or attempt.temperature is not None or bool(attempt.narrow)
        return asked or self._needs_seeds

    @contextmanager
    def _prepared(self, attempt: Attempt, seed: int) -> Iterator[tuple[dspy.Module, Attribution]]:
        """The program as it is, or a copy that samples, or one that knows the label."""
        if not self._is_changed(attempt):
            yield self._program, self._attribution
            return
        try:
            program, attribution = self._spare.pop()
        except IndexError:
            program = copy_program(self._program)
            attribution = Attribution(program)
        for predictor, original in zip(program.predictors(), self._predictors, strict=True):
            lm = original.lm or dspy.settings.lm
            predictor.lm = None if lm is None else _sampling_lm(lm, attempt, seed)
            predictor.signature = original.signature
        if attempt.narrow:
            narrow_signatures(program, attempt.narrow)
        yield program, attribution
        self._spare.append((program, attribution))


def _needs_seed(lm: Any) -> bool:
    """Whether an LM samples without a seed although it could take one."""
    if lm is None or not (lm.kwargs.get("temperature") or 0) > 0 or lm.kwargs.get("seed") is not None:
        return False
    return "seed" in lm.supported_params


def _sampling_lm(lm: Any, attempt: Attempt, seed: int) -> Any:
    changes: dict[str, Any] = {}
    if attempt.temperature is not None:
        changes["temperature"] = attempt.temperature
    if attempt.number > 0 and changes.get("temperature", lm.kwargs.get("temperature")):
        changes["rollout_id"] = attempt.number
    samples = (changes.get("temperature", lm.kwargs.get("temperature")) or 0) > 0
    if samples and "seed" in lm.supported_params:
        changes["seed"] = seed
    return lm.copy(**changes) if changes else lm


def narrow_signatures(program: dspy.Module, labels: Mapping[str, Any]) -> None:
    """Rescue (STaR's rationalization): let the answer fields accept the label alone, and say so in the prompt.

    An engine that constrains its output to the schema can then write nothing else; any other model reads the hint.
    Predictors without one of the label fields get the hint as text when no predictor has one.
    """
    predictors = predictors_of(program)
    hit = {name for name, p in predictors.items() if labels.keys() & p.signature.output_fields.keys()}
    for name, predictor in predictors.items():
        if hit and name not in hit:
            continue
        signature = predictor.signature
        for label_field, value in labels.items():
            if label_field in signature.output_fields and isinstance(value, str | int | bool):
                signature = signature.with_updated_fields(label_field, type_=Literal[value])
        hint = ", ".join(f"`{label_field}` = {value!r}" for label_field, value in labels.items())
        predictor.signature = signature.with_instructions(
            f"{signature.instructions}\n\nThe right final result is known: {hint}. Write what leads to it."
        )


def run_program(program: dspy.Module, example: dspy.Example, attribution: Attribution | None = None) -> Run:
    """One run with its own trace and its own count of tokens. DSPy's histories, which keep every prompt of a pass in
    memory, are left alone."""
    tracker = _SharedTracker()
    trace = _Trace()
    prediction, failure, error = None, None, None
    with dspy.context(trace=trace, usage_tracker=tracker, disable_history=True):
        try:
            prediction = _call(program, dict(example.inputs()))
        except Exception as caught:
            failure, error = _kind(caught), caught
    if dspy.settings.track_usage and isinstance(prediction, dspy.Prediction):
        prediction.set_lm_usage(tracker.get_total_tokens())
    outer = dspy.settings.usage_tracker
    if outer:
        for model, entries in tracker.usage_data.items():
            for entry in entries:
                outer.add_usage(model, entry)
    entries = trace.in_order()
    calls = (attribution or Attribution(program)).calls(entries)
    return Run(prediction, calls, tuple(entries), failure, error, _ledger(tracker, len(trace)))


class _SharedTracker(UsageTracker):
    """A count of tokens that `dspy.Parallel` does not copy for each of its threads."""

    def __deepcopy__(self, memo: Any) -> _SharedTracker:
        return self


class _Trace(list[Any]):
    """A trace that can be put in an order which does not depend on the timing of a program's own threads."""

    def __init__(self) -> None:
        super().__init__()
        self._home = threading.get_ident()
        self._threads: list[int] = []

    def append(self, entry: Any) -> None:
        """Add a call, and note the thread that made it."""
        self._threads.append(threading.get_ident())
        super().append(entry)

    def pop(self, position: Any = -1) -> Any:
        """Drop a call, as DSPy does with the oldest when a trace grows too long."""
        self._threads.pop(position)
        return super().pop(position)

    def in_order(self) -> list[Any]:
        """The calls as they were made; those that other threads made between two of this one's, by content."""
        ordered: list[Any] = []
        pairs = zip(self, self._threads, strict=True)
        for foreign, group in itertools.groupby(pairs, lambda pair: pair[1] != self._home):
            entries = [entry for entry, _ in group]
            ordered += sorted(entries, key=_content) if foreign else entries
        return ordered


def _content(entry: Any) -> str:
    predictor, inputs, prediction = entry
    signature = predictor.signature
    return repr((list(signature.fields), signature.instructions, sorted(inputs.items(), key=str), prediction))


def _call(program: dspy.Module, inputs: dict[str, Any]) -> Any:
    if hasattr(type(program), "forward") or "forward" in program.__dict__:
        return program(**inputs)
    if hasattr(type(program), "aforward"):
        return asyncio.run(program.acall(**inputs))
    raise TypeError(f"{type(program).__name__} has neither forward nor aforward: define one of them.")


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, AdapterParseError):
        return "parse failure"
    # DSPy wraps what an engine raises, unless it is one of its own errors.
    if isinstance(error, ContextWindowExceededError) or isinstance(error.__cause__, PromptTooLongError):
        return "prompt too long"
    return "timeout" if isinstance(error, TimeoutError | LMTimeoutError) else "program error"


def _ledger(tracker: UsageTracker, calls: int) -> Ledger:
    entries = [entry for model_entries in tracker.usage_data.values() for entry in model_entries]
    return Ledger(
        program_calls=1,
        lm_calls=max(calls, len(entries)),
        cache_hits=max(0, calls - len(entries)),
        prompt_tokens=sum(int(entry.get("prompt_tokens") or 0) for entry in entries),
        generated_tokens=sum(int(entry.get("completion_tokens") or 0) for entry in entries),
    )


class Attribution:
    """Which predictor of a program made which call: by object; failing that (a program that calls deep copies of its
    predictors) by the identity that a deep copy keeps, by signature, then by position.

    Calls of frozen (compiled) sub-modules belong to nobody and are left out.
    """

    def __init__(self, program: dspy.Module) -> None:
        predictors = predictors_of(program)
        self._names = list(predictors)
        self._by_object = {id(predictor): name for name, predictor in predictors.items()}
        self._frozen = _frozen_predictors(program)
        self._by_identity: list[Callable[[Any], str | None]] = [
            _unique_lookup(predictors, lambda p: getattr(p, "stage", None)),
            _unique_lookup(predictors, lambda p: repr(p.signature.dump_state()) + repr(sorted(p.signature.fields))),
        ]

    def calls(self, trace: Sequence[Any]) -> tuple[Call, ...]:
        """The calls of a trace, by predictor name."""
        found = []
        for position, (predictor, inputs, prediction) in enumerate(trace):
            name = self._by_object.get(id(predictor)) or self._name_of_copy(predictor, position, len(trace))
            if name is not None:
                outputs = {key: value for key, value in prediction.items() if key in predictor.signature.output_fields}
                found.append(Call(name, dict(inputs), outputs))
        return tuple(found)

    def _name_of_copy(self, predictor: Any, position: int, calls: int) -> str | None:
        if {id(predictor), getattr(predictor, "stage", None)} & self._frozen:
            return None
        for look in self._by_identity:
            if name := look(predictor):
                return name
        return self._names[position] if calls == len(self._names) else None


def _unique_lookup(
    predictors: Mapping[str, dspy.Predict], identity: Callable[[Any], object]
) -> Callable[[Any], str | None]:
    names: dict[object, list[str]] = {}
    for name, predictor in predictors.items():
        names.setdefault(identity(predictor), []).append(name)

    def look(predictor: Any) -> str | None:
        found = names.get(identity(predictor), [])
        return found[0] if len(found) == 1 else None

    return look


def _frozen_predictors(program: dspy.Module) -> set[object]:
    """Object and identity of each."""
    trainable = {key for predictor in program.predictors() for key in (id(predictor), predictor.stage)}
    predictors = [module for _, module in modules_of(program) if isinstance(module, dspy.Predict)]
    return {key for p in predictors for key in (id(p), p.stage)} - trainable
