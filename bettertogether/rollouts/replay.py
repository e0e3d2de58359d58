"""Run a program again as it ran before, up to one of its calls, which is answered anew."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import dspy
from dspy.primitives.prediction import Completions
from pydantic import BaseModel

from ..programs.content import SCALARS, fingerprint


class Reply(NamedTuple):
    """What an LM answered."""

    text: str | None = None
    """As it wrote it."""
    thoughts: str | None = None
    """What a reasoning LM thought before it."""
    cut: bool = False
    """Whether it ended at max_tokens."""


@dataclass(frozen=True)
class Answer:
    """What a call in a run was asked, and what it gave."""

    mark: str
    """Of the predictor, see `CallAttribution.mark`."""
    inputs: Mapping[str, Any]
    """As they were when the call began."""
    filled: Mapping[str, Any]
    """The same with the signature's defaults, as DSPy's trace has them."""
    prediction: dspy.Prediction
    """As the predictor returned it; empty where the answer could not be read."""
    reply: Reply

    @cached_property
    def asked(self) -> str:
        """Hash of what was asked of whom."""
        return fingerprint([self.mark, self.inputs])


@dataclass(frozen=True)
class Branch:
    """A call of an earlier run that is answered anew; those before it are answered as they were, and those after it as
    the program answers them."""

    answers: tuple[Answer, ...] = field(repr=False)
    """Of the earlier run's calls in their order, the one to answer anew last."""
    temperature: float

    @cached_property
    def key(self) -> str:
        """What tells one branch from another."""
        before = [[answer.asked, dict(answer.prediction.items())] for answer in self.answers[:-1]]
        return fingerprint([before, self.answers[-1].asked, self.temperature])


class Replay:
    """One run of a branch. Calls are known by what they ask, those that ask the same of the same predictor by their
    order, so that a program may make its calls in several threads."""

    def __init__(self, branch: Branch, number: int, seed: int | None) -> None:
        self._branch, self._number, self._seed = branch, number, seed
        self._known: dict[str, deque[Answer]] = defaultdict(deque)
        for answer in branch.answers[:-1]:
            self._known[answer.asked].append(answer)
        self._lock = threading.Lock()
        self.given = 0
        """Calls that were answered as they were."""
        self.came = False
        """Whether the run has come to the call that is answered anew. One that asks something else when it is run again
        never does."""

    def known(self, mark: str, inputs: Mapping[str, Any]) -> tuple[Answer | None, bool]:
        """The answer to a call where it is known, and whether the call is the one to answer anew."""
        asked = fingerprint([mark, inputs])
        with self._lock:
            if answers := self._known[asked]:
                self.given += 1
                return answers.popleft(), False
            anew = not self.came and asked == self._branch.answers[-1].asked
            self.came = self.came or anew
            return None, anew

    def sample(self, lm: Any, arguments: dict[str, Any]) -> None:
        """Have a predictor's call answered by sampling."""
        config: dict[str, Any] = {"temperature": self._branch.temperature, "rollout_id": self._number}
        if "seed" in lm.supported_params:
            config["seed"] = self._seed
        arguments["config"] = {**(arguments.get("config") or {}), **config}


def snapshot(value: Any) -> Any:
    """The value with its own lists, dicts and records, so that what a program or a metric does to it later does not
    show: a `dspy.History` that grows, an answer that is tidied up in place."""
    if type(value) in SCALARS:
        return value
    if type(value) in (list, tuple, set):
        return type(value)(map(snapshot, value))
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, dspy.Example):
        return _example_copy(value)
    if isinstance(value, BaseModel) and not isinstance(value, dspy.Tool):
        copied = value.model_copy()
        # Not by `update=`, which takes fields for set that were not.
        vars(copied).update({name: snapshot(item) for name, item in vars(copied).items()})
        return copied
    return value


def _example_copy(example: dspy.Example) -> dspy.Example:
    # Not copy.copy, which takes as long as all else here.
    copied = object.__new__(type(example))
    state = vars(copied)
    state.update(vars(example), _store=snapshot(example._store))
    if (given := state.get("_completions")) is not None:
        state["_completions"] = Completions(snapshot(given._completions), signature=given.signature)
    return copied
