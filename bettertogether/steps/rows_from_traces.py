"""Passing traces to balanced rows, with the count of everything that was left out."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import dspy

from ..checks import is_number, require, require_one_of, require_switch, require_whole, with_plain_numbers
from ..engines.protocol import FieldSpan, LocalEngine
from ..engines.thinking import with_thoughts
from ..errors import DataError, NoTrainingDataError
from ..programs.program import predictors_of
from ..records import Blame, DataCard, Ledger
from ..rollouts.branches import blame
from ..rollouts.examples import question_hash
from ..rollouts.labels import label_fields, labels_of, output_names
from ..rollouts.rollout import Call
from ..rollouts.traces import Trace, TraceSet
from .data_card import WHOLE_TRACE, make_data_card
from .demo_examples import without_example
from .left_out import CUT, OWN_DEMO, Dropped, more_rows, no_rows, own_demos
from .prompt_capture import field_spans, render_completion, take_request
from .prompt_forms import PromptForms
from .rows import Messages, Row, balance_labels, write_rows
from .schema_fit import schema_of
from .select_traces import select_traces

DOMINANT_SHARE = 0.8
"""A label with more than this share of the rows gets a warning, unless the trainset is as skewed."""

STRANGER = "call of a predictor that is none of the program's"

TrainPrompt = Literal["varied", "vanilla", "optimized", "mixed"]

Reasoning = Literal["strip", "keep"]


class LocalModel(NamedTuple):
    """What answers for a predictor, and can be trained."""

    engine: LocalEngine
    lm: Any


Trainable = Mapping[str, LocalModel]
"""By predictor name."""


@dataclass(frozen=True)
class Collected:
    """Rows ready to train on, and how they came about."""

    rows: tuple[Row, ...] = field(repr=False)
    card: DataCard
    ledger: Ledger
    warnings: tuple[str, ...] = ()
    """What makes the runs meaningless that the rows come from."""
    held_out: tuple[Row, ...] = field(default=(), repr=False)
    """Rows of a valset, on which the epoch is chosen."""
    blame: Mapping[str, Blame] = field(default_factory=dict)
    """Which predictors the failures come from, where single calls were answered anew."""

    @classmethod
    def of(cls, runs: Runs, rows: Iterable[Row], held_out: Iterable[Row], card: DataCard) -> Self:
        """The rows of these runs, with what the runs cost and are warned of."""
        traces, apart = runs.traces, runs.held_out
        ledger = traces.ledger + (apart.ledger if apart else Ledger())
        return cls(tuple(rows), card, ledger, traces.warnings, tuple(held_out), blame(traces.branches))

    def write(self, path: str | Path) -> Path:
        """Write the rows as JSON lines that `datasets.load_dataset("json")` and `rows=` read."""
        return write_rows(self.rows, Path(path).expanduser())


@dataclass(frozen=True)
class RowOptions:
    """Which passing traces become rows, and with what prompt."""

    train_prompt: TrainPrompt = "varied"
    """"varied": the zero-shot prompt, and up to 8 prompts with demos of other examples as the row's forms; "vanilla":
    no demos (the paper's); "optimized": the predictor's demos; "mixed": a row with each."""
    max_demos: int = 3
    """Demos drawn for a form of a "varied" prompt, at most."""
    max_traces_per_example: int = 2
    """Distinct passing traces kept of one example."""
    max_rescue_share: float = 1.0
    """Rescued traces are at most this share of all. Below 1, a student that solves nothing by itself gets no rows."""
    balance: bool = True
    """Give the rows the trainset's shares of labels, where labels repeat."""
    label_field: str | None = None
    """Field that holds the label; None finds it."""
    reasoning: Reasoning = "strip"
    """"strip": a reasoning model learns to answer without thoughts; "keep": with those of its passing runs."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        require_one_of("train_prompt", self.train_prompt, get_args(TrainPrompt))
        require_one_of("reasoning", self.reasoning, get_args(Reasoning))
        share, field_name = self.max_rescue_share, self.label_field
        require(is_number(share) and 0 <= share <= 1, "max_rescue_share", share, "a number from 0 to 1")
        require_whole("max_demos", self.max_demos, 1, meaning="1 or more")
        require_whole("max_traces_per_example", self.max_traces_per_example, 1, meaning="1 or more")
        require_switch("balance", self.balance)
        require(isinstance(field_name, str | None), "label_field", field_name, "a field's name, or None")


@dataclass(frozen=True)
class Runs:
    """The runs that rows are made of."""

    trainset: Sequence[dspy.Example]
    traces: TraceSet
    valset: Sequence[dspy.Example] = ()
    held_out: TraceSet | None = None
    """Of the valset, whose rows are kept apart."""
    earlier: Sequence[dspy.Module] = ()
    """Programs whose prompts "varied" rows are shown too."""
    seed: int = 0
    """Draws the demos."""


def rows_from_traces(student: dspy.Module, runs: Runs, trainable: Trainable, options: RowOptions) -> Collected:
    """The rows of the passing traces; those held out apart, also shown with demos of the trainset. Raises
    NoTrainingDataError with the counts when there are none."""
    trainset, traces, held_out = runs.trainset, runs.traces, runs.held_out
    dropped: Dropped = Counter()
    chosen = _chosen(traces, options, dropped)
    forms = None
    if options.train_prompt == "varied":
        forms = PromptForms(
            student,
            trainset,
            chosen,
            valset=runs.valset,
            earlier=runs.earlier,
            max_demos=options.max_demos,
            seed=runs.seed,
        )
    rows_of = partial(_rows_of, predictors_of(student), trainable, options, forms)
    labels = labels_of(trainset, options.label_field, output_names(student))
    by_trace = [(trace.label, rows) for trace in chosen if (rows := rows_of(trace, dropped))]
    rows = _balanced(by_trace, labels, dropped) if options.balance else [row for _, rows in by_trace for row in rows]
    reasons = +dropped
    if not rows:
        prompted = bool(runs.earlier) or any(predictor.demos for predictor in student.predictors())
        raise NoTrainingDataError(no_rows(traces, reasons, prompted=prompted))
    warnings = [
        *_strangers(reasons[WHOLE_TRACE, STRANGER]),
        *own_demos(reasons),
        *_label_warnings(rows, labels, more_rows(traces, reasons, balance=options.balance)),
        *_no_labels(trainset, output_names(student)),
        *_no_forms(forms),
    ]
    card = make_data_card(rows, trainable, dropped=reasons, examples=len(trainset), forms=forms, warnings=warnings)
    apart = _held_out_traces(held_out, len(trainset)) if held_out else []
    return Collected.of(runs, rows, (row for trace in apart for row in rows_of(trace, Counter())), card)


def _chosen(traces: TraceSet, options: RowOptions, dropped: Dropped) -> list[Trace]:
    """The traces to learn from; all others are counted in `dropped`, and the calls in them that can't be learned."""
    unchosen = Counter(traces.reasons())
    chosen = select_traces(
        traces.traces,
        max_per_example=options.max_traces_per_example,
        max_rescue_share=options.max_rescue_share,
        near_misses=traces.mark is not None,
        dropped=unchosen,
    )
    unchosen[STRANGER] += sum(trace.strangers for trace in chosen)
    dropped.update({(WHOLE_TRACE, reason): count for reason, count in unchosen.items()})
    return chosen


def _balanced(
    by_trace: Sequence[tuple[str | None, Sequence[Row]]], wanted: Sequence[str | None], dropped: Dropped
) -> list[Row]:
    """The rows of the traces, of which each has its label, in the shares of labels that are wanted."""
    order = balance_labels([label for label, _ in by_trace], wanted)
    dropped[WHOLE_TRACE, "left out by balance"] += len(by_trace) - len(set(order))
    return [row for position in order for row in by_trace[position][1]]


def _held_out_traces(traces: TraceSet, trainset_size: int) -> list[Trace]:
    """One passing trace of each example of the valset, whose positions come after those in the trainset."""
    moved = [replace(trace, index=trainset_size + trace.index) for trace in traces.traces]
    return select_traces(moved, max_per_example=1)


def _rows_of(
    predictors: Mapping[str, dspy.Predict],
    trainable: Trainable,
    options: RowOptions,
    forms: PromptForms | None,
    trace: Trace,
    dropped: Dropped,
) -> list[Row]:
    rows: list[Row] = []
    for call in trace.calls:
        if call.predictor not in trainable:
            continue
        predictor, engine = predictors[call.predictor], trainable[call.predictor].engine
        try:
            for row in rows_of_call(predictor, engine, call, options, trace, forms=forms):
                rows.append(row)
        except DataError as error:
            dropped[call.predictor, str(error)] += 1
    return list({(row.predictor, row.prompt, row.completion): row for row in rows}.values())


def prompt_variants(
    predictor: dspy.Predict, call: Call, train_prompt: TrainPrompt, own: dspy.Example
) -> list[list[Any]]:
    """The demos of each prompt that a call gives a row for, forms not among them; none is from a run on its `own`
    example. Raises DataError for a call with demos of its own that show its very inputs."""
    if call.demos is not None:
        if len(without_example(call.demos, call.inputs)) < len(call.demos):
            raise DataError(OWN_DEMO)
        return [list(call.demos)]
    if train_prompt in ("varied", "vanilla"):
        return [[]]
    question = question_hash(own) if predictor.demos else None
    optimized = without_example(predictor.demos, call.inputs, question)
    return [optimized] if train_prompt == "optimized" or not optimized else [[], optimized]


def rows_of_call(
    predictor: dspy.Predict,
    engine: LocalEngine,
    call: Call,
    options: RowOptions,
    trace: Trace,
    *,
    forms: PromptForms | None = None,
    as_written: bool = False,
) -> Iterator[Row]:
    """The rows of one call of a trace, the zero-shot one first. An answer that could not be read is taken `as_written`.
    Raises DataError with the reason to drop the next row."""
    if call.cut or call.unfit:
        raise DataError(CUT if call.cut else call.unfit)
    if call.signature is not None:
        predictor = copy.copy(predictor)
        predictor.signature = call.signature
    for demos in prompt_variants(predictor, call, options.train_prompt, trace.example):
        request = take_request(predictor, call.inputs, demos, config=call.config, adapter=call.adapter)
        schema = schema_of(request.config.response_format)
        completion, fields = _completion_of(predictor, call, options.reasoning, as_written, schema)
        room = engine.max_length - len(engine.completion_tokens(completion))
        messages = _texts_shared(engine.messages(request))
        if len(engine.prompt_tokens(messages)) > room:
            raise DataError(f"longer than the model's context of {engine.max_length} tokens")
        yield Row(
            messages,
            completion,
            call.predictor,
            trace.index,
            label=trace.label,
            source=trace.source,
            forms=forms.of_call(call, trace.index, engine, messages, room) if forms else (),
            response_format=request.config.response_format,
            fields=fields,
        )


def _texts_shared(messages: Messages) -> Messages:
    """The same messages; a text that other rows begin with too, such as the instructions, is one string for all."""
    return tuple({"role": each["role"], "content": sys.intern(each["content"])} for each in messages)


def _completion_of(
    predictor: dspy.Predict, call: Call, reasoning: Reasoning, as_written: bool, schema: Mapping[str, Any] | None
) -> tuple[str, tuple[FieldSpan, ...]]:
    """The text of the answer, and where each output field stands in it."""
    completion, fields = call.text or "", tuple[FieldSpan, ...]()
    if not as_written:
        completion = render_completion(
            predictor, call.inputs, call.outputs, adapter=call.adapter, text=call.text, schema=schema
        )
        fields = field_spans(predictor, call.inputs, call.outputs, completion, adapter=call.adapter)
    if reasoning == "strip" or not call.thoughts:
        return completion, fields
    shift = len(with_thoughts(call.thoughts, ""))
    moved = tuple(span._replace(start=span.start + shift, end=span.end + shift) for span in fields)
    return with_thoughts(call.thoughts, completion), moved


def _strangers(calls: int) -> list[str]:
    if not calls:
        return []
    return [
        f"{calls} calls were of predictors that are none of the program's, such as one that forward makes: nothing is "
        "learned from them, and no step changes them. Make them in __init__, as attributes."
    ]


def _label_warnings(rows: Sequence[Row], wanted: Sequence[str | None], advice: str) -> list[str]:
    counts = Counter(row.label for row in rows if row.label is not None)
    labels = {label for label in wanted if label is not None}
    if not counts or len(labels) < 2:
        return []
    warnings = []
    absent = sorted(labels - counts.keys())
    if absent:
        warnings.append(f"No row has the label {absent}: the tuned model will hardly answer it.")
    label, most = counts.most_common(1)[0]
    total = sum(counts.values())
    share_wanted = wanted.count(label) / sum(each is not None for each in wanted)
    if most > DOMINANT_SHARE * total > share_wanted * total:
        warnings.append(
            f"{most} of {total} rows have the label {label!r}: training on them teaches that answer. {advice}"
        )
    return warnings


def _no_labels(trainset: Sequence[dspy.Example], outputs: Collection[str]) -> list[str]:
    answers = sorted({name for example in trainset for name in example.inputs() if name in outputs})
    if not answers or label_fields(trainset):
        return []
    return [
        f"{answers} of the trainset are declared as inputs, though the program answers them: they are not taken for "
        "labels, so nothing is rescued or balanced. Leave them out of with_inputs(...)."
    ]


def _no_forms(forms: PromptForms | None) -> list[str]:
    if forms is None or not forms.without_demos:
        return []
    reasons = "; ".join(f"{count} x {reason}" for reason, count in forms.left_out.items())
    return [
        f"train_prompt='varied': no row of {forms.without_demos} is shown demos, only the zero-shot prompt: "
        f"{reasons or 'there is no example that can be one'}. Prompts with demos may suit the tuned model less. Give "
        "more examples, or train_prompt='vanilla'."
    ]
