"""The prompts with demos that a row is shown besides its zero-shot prompt: those that prompt steps search.

Training on one form of a prompt makes a model worse at the others (arXiv 2602.23197); training on prompts with demos,
as in-context fine-tuning does (arXiv 2506.11103), makes it learn from them.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from ..engines.protocol import LocalEngine
from ..programs.program import predictors_of
from ..rollouts.labels import labels_of, output_names, stratified_order
from ..rollouts.rollout import Call, stable_seed
from ..rollouts.traces import Trace
from .demo_examples import DemoExamples, plain_fields, without_example
from .demo_sets import DemoSets
from .prompt_capture import render_prompt
from .rows import Messages, question_of

N_FORMS = 8
"""Demo sets of one predictor at most. So many that a model can't learn them by heart, and so few that rows share
their beginnings."""

DRAWS = 3 * N_FORMS
"""Sets drawn in all. Some are there already, and some show nothing of a predictor."""

TEMPLATE_TOKENS = 64
"""Tokens that a chat template puts around a message, at most."""

OWN_EXAMPLE = "form shows nothing but the row's own example"
TOO_LONG = "form with demos too long for the context"


@dataclass(frozen=True)
class DemoSet:
    """The demos of one form of a predictor's prompt, and the instructions that stand before them."""

    source: str
    """"given": the program's own prompt; "earlier": one of an earlier prompt step; "traces" or "labels": drawn."""
    signature: type[dspy.Signature]
    demos: tuple[Any, ...]

    @property
    def content(self) -> str:
        """What the prompt shows."""
        return repr((self.signature.instructions, [sorted(plain_fields(demo).items()) for demo in self.demos]))


class PromptForms:
    """The demo sets of every predictor of a program, drawn once, and the prompts that they make of rows.

    Form number i of all rows of a predictor shows demo set i, less the row's own example, so that they begin alike.
    Examples of the `valset` have rows, counted on from those of the trainset, but no demo shows one.
    """

    def __init__(
        self,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        traces: Sequence[Trace],
        *,
        valset: Sequence[dspy.Example] = (),
        earlier: Sequence[dspy.Module] = (),
        max_demos: int = 3,
        seed: int = 0,
    ) -> None:
        self._predictors = predictors_of(student)
        self._examples = DemoExamples(student, [*trainset, *valset], traces)
        self.sets: dict[str, list[DemoSet]] = {name: [] for name in self._predictors}
        """By predictor."""
        self.left_out: Counter[str] = Counter()
        """Forms that became the zero-shot prompt, by reason."""
        self._shown: dict[str, bool] = {}
        self._beginnings: dict[tuple[Any, ...], list[Messages]] = defaultdict(list)
        for name in self._predictors:
            for demo_set in self._kept(name, [student, *earlier]):
                self._add(name, demo_set, most=N_FORMS // 2)
        labels = labels_of(trainset, outputs=output_names(student))
        labelled = stratified_order(trainset, labels, stable_seed("labelled forms", seed))[: DRAWS * max_demos]
        for source, program in _drawn(DemoSets(student, traces, labelled), max_demos, seed):
            for name, predictor in predictors_of(program).items():
                if predictor.demos:
                    self._add(name, DemoSet(source, predictor.signature, tuple(predictor.demos)), most=N_FORMS)
            if all(len(sets) == N_FORMS for sets in self.sets.values()):
                break

    def _kept(self, name: str, programs: Sequence[dspy.Module]) -> Iterator[DemoSet]:
        """The prompts of a predictor in these programs, but for the zero-shot prompt, the first program's first."""
        own = self._predictors[name].signature
        for number, program in enumerate(programs):
            predictor = predictors_of(program).get(name)
            if predictor is None or predictor.signature.fields.keys() != own.fields.keys():
                continue
            if predictor.demos or predictor.signature.instructions != own.instructions:
                yield DemoSet("earlier" if number else "given", predictor.signature, tuple(predictor.demos))

    def _add(self, name: str, demo_set: DemoSet, most: int) -> None:
        sets = self.sets[name]
        if len(sets) < most and demo_set.content not in {known.content for known in sets}:
            sets.append(demo_set)

    @property
    def without_demos(self) -> list[str]:
        """Predictors that have rows, of which none has a form."""
        return [name for name, shown in self._shown.items() if not shown]

    def count_by_source(self) -> Mapping[str, int]:
        """The demo sets of all predictors that have rows."""
        return Counter(demo_set.source for name in self._shown for demo_set in self.sets[name])

    def of_call(
        self, call: Call, example: int, engine: LocalEngine, zero_shot: Messages, room: int
    ) -> tuple[Messages, ...]:
        """The forms of a call's row, `room` being the tokens that its prompt may have. One that can't be shown is the
        zero-shot prompt, so that numbers mean the same sets in every row; () where none can, and for a call that
        came with a prompt of its own."""
        if call.demos is not None or call.signature is not None:
            return ()
        self._shown.setdefault(call.predictor, False)
        made = []
        for demo_set in self.sets[call.predictor]:
            messages = self._form(demo_set, call, example, engine, zero_shot)
            if messages is not None and too_long(messages, engine, room):
                self.left_out[TOO_LONG] += 1
                messages = None
            made.append(messages)
        if all(messages is None for messages in made):
            return ()
        self._shown[call.predictor] = True
        return tuple(zero_shot if messages is None else messages for messages in made)

    def _form(
        self, demo_set: DemoSet, call: Call, example: int, engine: LocalEngine, zero_shot: Messages
    ) -> Messages | None:
        others = [demo for demo in demo_set.demos if not self._examples.shows(call.predictor, demo, example)]
        demos = without_example(others, call.inputs)
        if demo_set.demos and not demos:
            self.left_out[OWN_EXAMPLE] += 1
            return None
        question = question_of(zero_shot)
        beginnings = self._beginnings[call.predictor, id(demo_set), tuple(map(id, demos)), id(call.adapter)]
        # Making a prompt takes milliseconds. What came before the question twice comes before it always.
        if len(beginnings) == 2 and beginnings[0] == beginnings[1] and not call.config:
            return beginnings[0] + question
        predictor = copy.copy(self._predictors[call.predictor])
        predictor.signature = demo_set.signature
        messages = render_prompt(predictor, engine, call.inputs, demos, config=call.config, adapter=call.adapter)
        if question and len(beginnings) < 2 and messages[-len(question) :] == question:
            beginnings.append(messages[: -len(question)])
        return messages


def too_long(messages: Messages, engine: LocalEngine, room: int) -> bool:
    """Whether a prompt has more than `room` tokens. Where it has no more bytes they are not counted: eight forms of
    each row would be as much text as all of the training."""
    most = sum(len(message["content"].encode("utf-8", "surrogatepass")) + TEMPLATE_TOKENS for message in messages)
    return most > room and len(engine.prompt_tokens(messages)) > room


def _drawn(sets: DemoSets, max_demos: int, seed: int) -> Iterator[tuple[str, dspy.Module]]:
    """Programs with 1 to `max_demos` demos a predictor, by turns from passing traces and from labelled examples."""
    for number in range(DRAWS):
        own_seed = stable_seed("forms", seed, number)
        size = random.Random(own_seed).randint(1, max_demos)
        source, counts = ("labels", (0, size)) if number % 2 else ("traces", (size, 0))
        if candidate := sets.candidate(source, *counts, own_seed):
            yield source, candidate.program
