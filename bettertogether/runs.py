"""Run a program on one example and note which predictor object made which call. Failures are data."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import dspy
from dspy.utils.exceptions import AdapterParseError, LMTimeoutError
from dspy.utils.usage_tracker import UsageTracker

from .programs import copy_program, predictors_of, program_key
from .records import Ledger

FailureKind = Literal["parse failure", "timeout", "program error"]


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

    Only runs whose answer is settled (greedy, or sampled with a seed that the engine honours) are kept.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str, str], Run] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, str]) -> Run | None:
        """The run for a key, or None."""
        with self._lock:
            return self._runs.get(key)

    def put(self, key: tuple[str, str, str], run: Run) -> None:
        """Keep a run, failed ones excepted: those are worth another try."""
        if run.failure != "program error":
            with self._lock:
                self._runs[key] = run


class Runner:
    """Runs one program on examples; safe to call from many threads."""

    def __init__(self, program: dspy.Module, *, seed: int = 0, store: RunStore | None = None) -> None:
        self._program = program
        self._seed = seed
        self._store = store
        self._key = program_key(program)

    def run(self, example: dspy.Example, attempt: Attempt = Attempt()) -> Run:
        """Run the program on one example. Never raises for what the program does; see `Run.failure`."""
        content = example_key(example)
        key = (self._key, content, f"{self._seed}|{attempt.key}")
        if self._store and (known := self._store.get(key)):
            return Run(known.prediction, known.calls, known.raw_trace, known.failure, known.error)
        program = self._prepare(attempt, stable_seed(self._seed, content, attempt.number))
        run = run_program(program, example)
        if self._store:
            self._store.put(key, run)
        return run

    def _prepare(self, attempt: Attempt, seed: int) -> dspy.Module:
        sampled = attempt.number > 0 or attempt.temperature is not None
        if not sampled and not attempt.narrow and not any(_needs_seed(p.lm) for p in self._program.predictors()):
            return self._program
        program = copy_program(self._program)
        for predictor in program.predictors():
            lm = predictor.lm or dspy.settings.lm
            if lm is not None:
                predictor.lm = _sampling_lm(lm, attempt, seed)
        if attempt.narrow:
            narrow_signatures(program, attempt.narrow)
        return program


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


def run_program(program: dspy.Module, example: dspy.Example) -> Run:
    """One run with its own trace and its own count of tokens."""
    tracker = UsageTracker()
    trace: list[Any] = []
    prediction, failure, error = None, None, None
    with dspy.context(trace=trace, usage_tracker=tracker):
        try:
            prediction = _call(program, dict(example.inputs()))
        except Exception as caught:
            failure, error = _kind(caught), caught
    outer = dspy.settings.usage_tracker
    if outer:
        for model, entries in tracker.usage_data.items():
            for entry in entries:
                outer.add_usage(model, entry)
    return Run(prediction, attribute_calls(program, trace), tuple(trace), failure, error, _ledger(tracker, len(trace)))


def _call(program: dspy.Module, inputs: dict[str, Any]) -> Any:
    if hasattr(type(program), "forward") or "forward" in program.__dict__:
        return program(**inputs)
    if hasattr(type(program), "aforward"):
        return asyncio.run(program.acall(**inputs))
    raise TypeError(f"{type(program).__name__} has neither forward nor aforward: define one of them.")


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, AdapterParseError):
        return "parse failure"
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


def attribute_calls(program: dspy.Module, trace: Sequence[Any]) -> tuple[Call, ...]:
    """The calls of a trace by predictor name: by object; failing that (a program that calls deep copies of its
    predictors) by the identity that a deep copy keeps, by signature, then by position.

    Calls of frozen (compiled) sub-modules belong to nobody and are left out.
    """
    predictors = predictors_of(program)
    by_object = {id(predictor): name for name, predictor in predictors.items()}
    fallbacks: list[Callable[[Any, int], str | None]] = [
        _unique_lookup(predictors, lambda p: getattr(p, "stage", None)),
        _unique_lookup(predictors, lambda p: repr(p.signature.dump_state()) + repr(sorted(p.signature.fields))),
        lambda _, position: list(predictors)[position] if len(trace) == len(predictors) else None,
    ]
    known_frozen = _frozen_predictors(program)
    calls = []
    for position, (predictor, inputs, prediction) in enumerate(trace):
        name = by_object.get(id(predictor))
        if name is None and id(predictor) not in known_frozen:
            name = next((found for look in fallbacks if (found := look(predictor, position))), None)
        if name is None:
            continue
        outputs = {key: value for key, value in prediction.items() if key in predictor.signature.output_fields}
        calls.append(Call(name, dict(inputs), outputs))
    return tuple(calls)


def _unique_lookup(
    predictors: Mapping[str, dspy.Predict], identity: Callable[[Any], object]
) -> Callable[[Any, int], str | None]:
    names: dict[object, list[str]] = {}
    for name, predictor in predictors.items():
        names.setdefault(identity(predictor), []).append(name)

    def look(predictor: Any, _: int) -> str | None:
        found = names.get(identity(predictor), [])
        return found[0] if len(found) == 1 else None

    return look


def _frozen_predictors(program: dspy.Module) -> set[int]:
    trainable = {id(predictor) for predictor in program.predictors()}
    return {id(m) for _, m in program.named_sub_modules(dspy.Predict)} - trainable
