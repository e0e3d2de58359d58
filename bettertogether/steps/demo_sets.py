"""Demo sets: which traces and which labelled examples a candidate prompt shows."""

from __future__ import annotations

import enum
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice

import dspy
import numpy as np

from ..programs.program import copy_for_step, predictors_of
from ..rollouts.examples import example_key, question_hash, question_key
from ..rollouts.labels import label_value, labels_of, output_names, stratified_order
from ..rollouts.rescue import admits_none, as_field
from ..rollouts.rollout import stable_seed
from ..rollouts.traces import Trace
from .demo_fit import DemoFit

_SCALARS = (str, int, float, enum.Enum, np.generic)


@dataclass
class Candidate:
    """A program with one set of demos."""

    name: str
    program: dspy.Module
    scores: dict[int, float] = field(default_factory=dict)
    """Position in the validation examples to score."""
    stopped: bool = False
    """Taken out of the race before it was fully scored."""
    strength: float = 1.0
    """Of the program's adapters, times what the step was given."""

    @property
    def mean(self) -> float:
        """Mean of the scores so far."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else 0.0

    @property
    def demos(self) -> int:
        """Demos in all of the program's prompts."""
        return sum(len(predictor.demos) for predictor in self.program.predictors())


def demos_of(trace: Trace) -> dict[str, dspy.Example]:
    """One demo per predictor of a trace. Of several calls of one predictor, one chosen by the trace's content: half
    the time the last, else one of the earlier, as DSPy does. `augmented`, which marks demos from runs, says of which
    example they are (`DemoExamples`)."""
    calls: dict[str, list[dspy.Example]] = defaultdict(list)
    question = question_hash(trace.example) or True
    for call in trace.calls:
        if not call.cut:
            calls[call.predictor].append(dspy.Example({**call.inputs, **call.outputs, "augmented": question}))
    chosen = {}
    for name, demos in calls.items():
        chosen[name] = demos[-1]
        if len(demos) > 1:
            rng = random.Random(stable_seed(name, example_key(trace.example), len(demos)))
            if rng.random() < 0.5:
                chosen[name] = rng.choice(demos[:-1])
    return chosen


def labelled_demo(predictor: dspy.Predict, example: dspy.Example) -> dspy.Example | None:
    """The example itself as a demo, its labels as the fields have them, where it has a field of the predictor's inputs
    and all of its outputs but a reasoning; None where it would show too little."""
    signature = predictor.signature
    fields = {name: example[name] for name in signature.fields if name in example}
    outputs = [name for name in signature.output_fields if name != "reasoning"]
    if not any(name in fields for name in signature.input_fields) or not all(name in fields for name in outputs):
        return None
    for name in outputs:
        annotation, fields[name] = signature.output_fields[name].annotation, label_value(example, name)
        if fields[name] is None and not admits_none(annotation):
            return None
        if isinstance(fields[name], _SCALARS):
            fields[name] = as_field(fields[name], annotation)
    return dspy.Example(fields)


class DemoSets:
    """Makes candidates for a program from passing traces and labelled examples."""

    def __init__(self, program: dspy.Module, traces: Sequence[Trace], labelled: Sequence[dspy.Example]) -> None:
        self._program = program
        self._traces = traces
        self._labelled = labelled
        self._of_trace = {id(trace): demos_of(trace) for trace in self._traces}
        self._of_example = {name: self._labelled_demos(p) for name, p in predictors_of(program).items()}
        self._fits = {name: self._fit(name, predictor) for name, predictor in predictors_of(program).items()}
        self._seen: set[str] = set()
        self.dropped: Counter[str] = Counter()
        """Demos dropped because they did not fit, by predictor."""

    def _labelled_demos(self, predictor: dspy.Predict) -> dict[int, dspy.Example]:
        found = {id(example): labelled_demo(predictor, example) for example in self._labelled}
        return {key: demo for key, demo in found.items() if demo is not None}

    def _fit(self, name: str, predictor: dspy.Predict) -> DemoFit:
        asked = [call.inputs for trace in self._traces for call in trace.calls if call.predictor == name]
        return DemoFit(name, predictor, [*asked, *self._of_example[name].values()])

    def problems(self) -> dict[str, dict[str, int]]:
        """By predictor: how many demos can't be shown, by reason, and how many questions can't be asked beside any."""
        found = {name: dict(fit.left_out) for name, fit in self._fits.items()}
        for name, fit in self._fits.items():
            if fit.passed_over:
                found[name]["question too long to be asked beside demos"] = fit.passed_over
        return {name: reasons for name, reasons in found.items() if reasons}

    def candidate(self, name: str, traces: int, labelled: int, seed: int) -> Candidate | None:
        """A candidate with demos of up to `traces` traces, filled up with labelled examples to `labelled` demos in
        all; covering the labels. None when the same set was made before, or when there is nothing to show."""
        program = copy_for_step(self._program)
        shown = self._pick_traces(traces, seed)
        asked = {question_key(trace.example) for trace in shown}
        order = self._labelled_order(seed)
        for predictor_name, predictor in predictors_of(program).items():
            fit, labelled_demos = self._fits[predictor_name], self._of_example[predictor_name]
            made = [self._of_trace[id(trace)] for trace in shown]
            demos = [demos[predictor_name] for demos in made if predictor_name in demos]
            known = (each for each in order if id(each) in labelled_demos and fit.usable(labelled_demos[id(each)]))
            # One by one: to see whether a demo is usable takes a prompt.
            others = _distinct(known, asked)
            fills = [labelled_demos[id(each)] for each in islice(others, max(0, labelled - len(demos)))]
            predictor.demos = fit.fitting([*demos, *fills])
            self.dropped += Counter({predictor_name: len(demos) + len(fills) - len(predictor.demos)})
        candidate = self.of(name, program)
        return candidate if candidate is not None and candidate.demos else None

    def earlier(self, name: str, program: dspy.Module) -> Candidate | None:
        """A candidate with a program's own prompts, less the demos that don't fit. None for prompts that were made
        before."""
        program = copy_for_step(program)
        for predictor_name, predictor in predictors_of(program).items():
            demos = predictor.demos
            predictor.demos = self._fit(predictor_name, predictor).fitting(demos)
            self.dropped += Counter({predictor_name: len(demos) - len(predictor.demos)})
        return self.of(name, program)

    def of(self, name: str, program: dspy.Module) -> Candidate | None:
        """The program as a candidate; None for prompts that were made before."""
        content = _shown(program)
        if content in self._seen:
            return None
        self._seen.add(content)
        return Candidate(name, program)

    def _pick_traces(self, count: int, seed: int) -> list[Trace]:
        order = stratified_order(self._traces, [trace.label for trace in self._traces], seed)
        picked: dict[object, Trace] = {}
        for trace in order:
            if len(picked) < count:
                picked.setdefault(question_key(trace.example), trace)
        return list(picked.values())

    def _labelled_order(self, seed: int) -> list[dspy.Example]:
        labels = labels_of(self._labelled, outputs=output_names(self._program))
        return stratified_order(self._labelled, labels, stable_seed("labelled", seed))


def _distinct(examples: Iterable[dspy.Example], asked: Set[object]) -> Iterator[dspy.Example]:
    """The examples that ask what is not asked yet, each question once."""
    seen = {*asked}
    for example in examples:
        key = question_key(example)
        if key not in seen:
            seen.add(key)
            yield example


def _shown(program: dspy.Module) -> str:
    """What the prompts show; a labelled example and a trace of the same answer show the same."""
    demos = {
        name: [sorted((key, value) for key, value in demo.items() if key != "augmented") for demo in predictor.demos]
        for name, predictor in predictors_of(program).items()
    }
    return repr((demos, [predictor.signature.dump_state() for predictor in program.predictors()]))
