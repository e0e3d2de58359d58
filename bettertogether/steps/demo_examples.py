"""Which examples demos show, so that no row's prompt holds its own answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from ..programs.program import predictors_of
from ..rollouts.examples import question_hash
from ..rollouts.traces import Trace
from .demo_sets import labelled_demo

_PLAIN = (str, int, bool, type(None))


def _plain(value: Any) -> Any:
    # DSPy makes a pydantic adapter for each value, which takes longer than all else that is done to a row.
    return value if type(value) in _PLAIN else serialize_for_json(value)


def plain_fields(demo: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a demo as JSON or text, which is how they are shown: arrays and tables can't be compared."""
    return {name: _plain(value) for name, value in demo.items() if name != "augmented"}


def without_example(demos: Sequence[Any], inputs: Mapping[str, Any], question: str | None = None) -> list[Any]:
    """The demos that don't show these very inputs, and are not from a run on the example of this `question_hash`."""
    asked = plain_fields(inputs)
    others = [demo for demo in demos if question is None or demo.get("augmented") != question]
    return [demo for demo in others if any(_plain(demo.get(n)) != shown for n, shown in asked.items())]


class DemoExamples:
    """Tells which example of a trainset a demo shows, be it drawn from there or from a program's own prompts.

    Examples that ask the same count as one.
    """

    def __init__(self, program: dspy.Module, trainset: Sequence[dspy.Example], traces: Sequence[Trace]) -> None:
        self._inputs = [plain_fields(example.inputs()) for example in trainset]
        first: dict[str, int] = {}
        self._questions = [first.setdefault(_text(inputs), index) for index, inputs in enumerate(self._inputs)]
        self._trainset = trainset
        self._made: dict[tuple[str, str], set[int]] = defaultdict(set)
        for trace in traces:
            for call in trace.calls:
                self._note(call.predictor, {**call.inputs, **call.outputs}, trace.index)
        for name, predictor in predictors_of(program).items():
            for index, example in enumerate(trainset):
                if (demo := labelled_demo(predictor, example)) is not None:
                    self._note(name, demo, index)
        self._known: dict[tuple[str, int], tuple[Any, set[int]]] = {}

    def _note(self, predictor: str, fields: Mapping[str, Any], index: int) -> None:
        self._made[predictor, _text(plain_fields(fields))].add(self._questions[index])

    def shows(self, predictor: str, demo: Any, example: int) -> bool:
        """Whether a demo of this predictor shows the example at this position."""
        key = predictor, id(demo)
        if key not in self._known:
            # With the demo itself, whose id is then nobody else's.
            self._known[key] = demo, self._found(predictor, demo)
        return self._questions[example] in self._known[key][1]

    def _found(self, predictor: str, demo: Any) -> set[int]:
        fields = plain_fields(demo)
        asked = {
            question
            for question, inputs in zip(self._questions, self._inputs, strict=True)
            if (shared := inputs.keys() & fields.keys()) and all(inputs[name] == fields[name] for name in shared)
        }
        made, mark = self._made.get((predictor, _text(fields)), set()), demo.get("augmented")
        if isinstance(mark, str):
            made = made | self._by_hash.get(mark, set())
        # What several examples have in common (a language, a topic) does not tell which is shown.
        return made | (asked if len(asked) == 1 else set())

    @cached_property
    def _by_hash(self) -> dict[str, set[int]]:
        """The question of each example by its hash, which demos from runs bear."""
        pairs = zip(self._trainset, self._questions, strict=True)
        return {name: {question} for example, question in pairs if (name := question_hash(example))}


def _text(fields: Mapping[str, Any]) -> str:
    return repr(sorted(fields.items()))
