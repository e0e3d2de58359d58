"""What a program did on one example, how it is told to, and what is kept of it for the next time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import dspy

from ..programs.content import by_name, fingerprint
from ..records import Ledger
from .replay import Answer, Branch

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
