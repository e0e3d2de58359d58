"""Pairs of answers to one prompt, of which one led to a run that passed and the other to one that failed."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

import dspy

from ..errors import DataError, NoTrainingDataError
from ..programs.program import predictors_of
from ..rollouts.branches import BranchPoint
from ..rollouts.failures import advice, commonest, count_failures
from ..rollouts.traces import TraceSet
from .data_card import make_data_card
from .left_out import Dropped, longer_answers, own_demos
from .rows import Row
from .rows_from_traces import Collected, RowOptions, Runs, Trainable, rows_of_call
from .select_traces import unseen_calls

AS_RUN = RowOptions(train_prompt="optimized", reasoning="keep")
"""Answers as they were given, to the prompts that the program sends."""

STRAYED = "the program asked something else when it was run again"
RAISED = "its run raised, or the metric did, which says nothing of the answer"


def pairs_from_traces(student: dspy.Module, runs: Runs, trainable: Trainable, max_pairs: int) -> Collected:
    """The pairs of the calls that were answered anew, at most `max_pairs` of an example and predictor; those of
    `held_out`, whose examples come after the others, apart. Raises NoTrainingDataError with the counts when there are
    none."""
    examples, traces, held_out = len(runs.trainset), runs.traces, runs.held_out
    dropped: Dropped = Counter()
    rows = _pairs(student, traces, trainable, max_pairs, dropped)
    reasons = +dropped
    if not rows:
        raise NoTrainingDataError(_no_pairs(traces, reasons))
    card = make_data_card(rows, trainable, dropped=reasons, examples=examples)
    apart = _pairs(student, held_out, trainable, max_pairs, Counter()) if held_out else []
    return Collected.of(runs, rows, (replace(row, example=examples + row.example) for row in apart), card)


def _pairs(student: dspy.Module, traces: TraceSet, trainable: Trainable, max_pairs: int, dropped: Dropped) -> list[Row]:
    predictors = predictors_of(student)
    by_origin: dict[tuple[int, str], list[list[Row]]] = defaultdict(list)
    for point in traces.branches:
        name = point.call.predictor
        if name in trainable:
            dropped[name, STRAYED] += len(point.branches) - len(point.answered)
            found = _pairs_of(point, predictors[name], trainable, dropped)
            by_origin[point.run.index, name].append(found)
    chosen = []
    for (_, name), groups in by_origin.items():
        # One of each call first, where a predictor is called several times.
        in_turn = [row for turn in itertools.zip_longest(*groups) for row in turn if row is not None]
        distinct = list({(row.prompt, row.completion, row.rejected): row for row in in_turn}.values())
        dropped[name, "over max_pairs_per_example"] += max(0, len(distinct) - max_pairs)
        chosen += distinct[:max_pairs]
    return chosen


def _pairs_of(point: BranchPoint, predictor: dspy.Predict, trainable: Trainable, dropped: Dropped) -> list[Row]:
    """The pairs of one call: each of its answers in one at least, as far as there are answers of both kinds."""
    name = point.call.predictor
    answers: dict[str, tuple[Row, set[bool]]] = {}
    for row, passed in _answers(point, predictor, trainable, dropped):
        answers.setdefault(row.completion, (row, set()))[1].add(passed)
    dropped[name, "the same answer passed and failed"] += sum(len(kinds) == 2 for _, kinds in answers.values())
    right, wrong = ([row for row, kinds in answers.values() if kinds == {kind}] for kind in (True, False))
    if not right or not wrong:
        none = "failed" if right else "passed" if wrong else "is left"
        dropped[name, f"no answer of the call {none}"] += 1
        return []
    count = max(len(right), len(wrong))
    return [replace(right[i % len(right)], rejected=wrong[i % len(wrong)].completion) for i in range(count)]


def _answers(
    point: BranchPoint, predictor: dspy.Predict, trainable: Trainable, dropped: Dropped
) -> Iterator[tuple[Row, bool]]:
    """The answers to one prompt, and whether their runs passed: that of the run, then the new ones. One that could not
    be read is among them as the LM wrote it, where its run failed; one whose run raised is not."""
    first: Row | None = None
    for trace, call, is_read in point.answers():
        if trace.failed:
            dropped[point.call.predictor, RAISED] += 1
            continue
        if call is None or not (is_read or (call.text and not trace.passed)):
            dropped[point.call.predictor, "an answer that could not be read"] += 1
            continue
        engine = trainable[call.predictor].engine
        try:
            (row,) = rows_of_call(predictor, engine, call, AS_RUN, trace, as_written=not is_read)
        except DataError as error:
            dropped[call.predictor, str(error)] += 1
            continue
        first = first or row
        if row.messages == first.messages:
            yield row, trace.passed


def _no_pairs(traces: TraceSet, dropped: Dropped) -> str:
    passed = len(traces.passing)
    reasons = "; ".join(f"{count} x {name}: {reason}" for (name, reason), count in dropped.most_common())
    unseen = f" {unseen_calls(passed)}" if passed and not traces.branches else ""
    scores = {trace.score for trace in traces.traces}
    same = f" The metric gave all of them the score {scores.pop():g}." if len(scores) == 1 else ""
    return (
        f"No pairs: {traces.size_text}, {passed} passed.{same} A pair has an answer whose run "
        f"passed and one whose run failed. Dropped: {reasons or 'nothing'}.{unseen} "
        + " ".join([*longer_answers(traces), *own_demos(dropped), _what_to_try(traces)])
    )


def _what_to_try(traces: TraceSet) -> str:
    most = commonest(count_failures(traces.traces), len(traces.traces))
    if most is not None:
        return advice(most)
    if len(traces.passing) == len(traces.traces):
        return "Nothing is left to prefer: leave the step out, or give examples that the program fails on now and then."
    return (
        "Three things to try: more answers to choose from (num_samples=8), at a higher temperature; examples that the "
        "program solves now and then (a prompt step first, 'p -> r'); or a metric with a threshold= that some runs "
        "reach and others don't."
    )
