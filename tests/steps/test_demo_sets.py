"""Candidates of the prompt step: which demos they show, and that they differ."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import dspy
import numpy as np
import pytest
from fakes import (
    Parity,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    predictor_over,
    right,
    two_step_engine,
    two_step_program,
)

from bettertogether.rollouts.examples import question_hash
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.traces import ExamplePass, Trace, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.demo_fit import DemoFit
from bettertogether.steps.demo_sets import Candidate, DemoSets, demos_of, labelled_demo
from bettertogether.steps.prompt_capture import render_prompt


def traces_of(program: dspy.Module, count: int, start: int = 0) -> list[Trace]:
    sampling = Sampling(num_samples=0, rescue=False)
    return list(collect_traces(program, numbers(count, start), ExamplePass(parity_match), sampling=sampling).traces)


def sets(count: int = 8, **options: Any) -> DemoSets:
    program = parity_program(parity_engine(lambda *_: True, **options))
    return DemoSets(program, traces_of(program, count), numbers(count))


def shown(candidate: Candidate | None) -> list[int]:
    assert candidate is not None
    return [demo.number for demo in candidate.program.demos]


def shown_texts(candidate: Candidate | None) -> list[str]:
    assert candidate is not None
    return [demo.text for demo in candidate.program.demos]


def test_a_candidate_shows_the_asked_number_of_traces() -> None:
    candidate = sets().candidate("demos", 3, 3, seed=0)
    assert candidate is not None
    assert len(shown(candidate)) == candidate.demos == 3
    for demo in candidate.program.demos:
        example = dspy.Example(number=demo.number).with_inputs("number")
        assert (demo.parity, demo.augmented) == (right(demo.number), question_hash(example))


def test_labelled_examples_fill_up_to_the_asked_number_and_repeat_no_example() -> None:
    candidate = sets().candidate("demos", 2, 5, seed=0)
    assert candidate is not None
    demos = candidate.program.demos
    assert [bool(demo.get("augmented")) for demo in demos] == [True, True, False, False, False]
    assert len({demo.number for demo in demos}) == 5


@pytest.mark.parametrize(("traces", "labelled"), [(3, 3), (0, 3), (1, 3)])
def test_of_examples_that_ask_the_same_one_is_shown(traces: int, labelled: int) -> None:
    program = parity_program(parity_engine(lambda *_: True))
    repeated = [*numbers(3), *numbers(3), *numbers(3)]
    runs = collect_traces(program, repeated, ExamplePass(parity_match), sampling=Sampling(rescue=False)).traces
    assert [trace.index for trace in runs] == list(range(9))

    def drawn(most: int, seed: int) -> list[int]:
        return sorted(shown(DemoSets(program, runs, repeated[::-1]).candidate("", traces, most, seed)))

    assert [drawn(labelled, seed) for seed in range(4)] == [[0, 1, 2]] * 4
    assert drawn(9, 0) == [0, 1, 2]


def test_no_more_labelled_examples_are_tried_than_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: set[int] = set()
    usable = DemoFit.usable

    def noted(self: DemoFit, demo: Any) -> bool:
        tried.add(demo.number)
        return usable(self, demo)

    monkeypatch.setattr(DemoFit, "usable", noted)
    program = parity_program(parity_engine(lambda *_: True))
    candidate = DemoSets(program, [], numbers(50)).candidate("labels", 0, 3, seed=0)
    assert sorted(tried) == sorted(shown(candidate))


def test_fewer_labelled_than_bootstrapped_demos_cut_nothing() -> None:
    assert len(shown(sets().candidate("demos", 4, 2, seed=0))) == 4


def test_a_candidate_of_labels_alone_has_no_traces() -> None:
    candidate = sets().candidate("labels", 0, 3, seed=0)
    assert candidate is not None
    assert len(candidate.program.demos) == 3
    assert not any(demo.get("augmented") for demo in candidate.program.demos)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 4])
def test_demos_cover_the_labels(seed: int, count: int) -> None:
    for candidate in (sets().candidate("demos", count, count, seed), sets().candidate("labels", 0, count, seed)):
        assert candidate is not None
        counts = Counter(demo.parity for demo in candidate.program.demos)
        assert set(counts) == {"even", "odd"}
        assert abs(counts["even"] - counts["odd"]) <= 1 + count // 4


def test_candidates_differ_and_one_that_was_made_before_is_none() -> None:
    demo_sets = sets()
    assert shown(demo_sets.candidate("one", 3, 3, seed=1)) != shown(demo_sets.candidate("two", 3, 3, seed=2))
    assert demo_sets.candidate("again", 3, 3, seed=1) is None


def test_a_labelled_example_and_a_trace_of_the_same_answer_show_the_same() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    demo_sets = DemoSets(program, traces_of(program, 1), numbers(1))
    assert demo_sets.candidate("labels", 0, 1, seed=0) is not None
    assert demo_sets.candidate("demos", 1, 0, seed=0) is None


def test_a_labelled_example_and_a_trace_whose_fields_come_in_another_order_show_the_same() -> None:
    program = predictor_over(parity_engine(lambda *_: True), "q -> a, b")
    example = dspy.Example(q="1", a="2", b="3").with_inputs("q")
    call = Call("self", {"q": "1"}, {"b": "3", "a": "2"})
    demo_sets = DemoSets(program, [Trace(0, example, None, (call,), Verdict(1.0, True), "student")], [example])
    assert demo_sets.candidate("labels", 0, 1, seed=0) is not None
    assert demo_sets.candidate("demos", 1, 0, seed=0) is None


def test_nothing_to_show_is_no_candidate() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    assert DemoSets(program, [], []).candidate("demos", 3, 3, seed=0) is None


def test_the_same_seed_gives_the_same_demos() -> None:
    assert shown(sets().candidate("demos", 3, 3, seed=5)) == shown(sets().candidate("demos", 3, 3, seed=5))


def test_the_program_given_keeps_its_demos() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    DemoSets(program, traces_of(program, 4), numbers(4)).candidate("demos", 2, 2, seed=0)
    assert program.demos == []


def test_demos_of_several_predictors_come_from_the_same_traces_in_the_same_order() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    candidate = DemoSets(program, traces_of(program, 8), []).candidate("demos", 3, 0, seed=0)
    assert candidate is not None
    remark, decide = (p.demos for p in candidate.program.predictors())
    assert [demo.number for demo in remark] == [demo.number for demo in decide]
    assert [demo.remark for demo in remark] == [demo.remark for demo in decide]
    assert len(remark) == 3


def test_of_two_traces_of_one_example_one_is_shown() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    double = [trace for trace in traces_of(program, 2) for _ in range(3)]
    assert len(shown(DemoSets(program, double, []).candidate("demos", 6, 0, seed=0))) == 2


def test_of_several_calls_of_one_predictor_one_is_the_demo() -> None:
    example = dspy.Example(q="x").with_inputs("q")
    calls = tuple(Call("p", {"q": f"x{i}"}, {"a": str(i)}) for i in range(4))
    picked = []
    for number in range(40):
        trace = Trace(0, example.copy(q=str(number)), None, calls, Verdict(1.0, True), "student")
        demos = demos_of(trace)
        assert demos == demos_of(trace)
        picked.append(demos["p"].a)
    assert set(picked) == {"0", "1", "2", "3"}
    assert 10 <= picked.count("3") <= 30


def test_a_labelled_example_is_a_demo_where_it_has_the_outputs() -> None:
    predictor = dspy.Predict(Parity)
    assert labelled_demo(predictor, numbers(1)[0]) == dspy.Example(number=0, parity="even")
    assert labelled_demo(predictor, dspy.Example(number=0).with_inputs("number")) is None
    assert labelled_demo(predictor, dspy.Example(parity="even")) is None
    named = dspy.Example({"self": "a", "base": "b"})
    assert (
        labelled_demo(dspy.Predict(dspy.Signature({"self": dspy.InputField(), "base": dspy.OutputField()})), named)
        == named
    )


@pytest.mark.parametrize(
    ("annotation", "label", "shown"),
    [
        (int, np.int64(3), "3"),
        (float, 3, "3.0"),
        (Literal["positive", "negative"], "Positive", "'positive'"),
        (str, "Positive", "'Positive'"),
        (int | None, None, "None"),
        (str, ["a", "b"], "['a', 'b']"),
    ],
)
def test_a_labelled_example_shows_the_label_as_the_field_has_it(annotation: Any, label: Any, shown: str) -> None:
    fields: dict[str, Any] = {"q": (str, dspy.InputField()), "y": (annotation, dspy.OutputField())}
    demo = labelled_demo(dspy.Predict(dspy.Signature(fields)), dspy.Example(q="a", y=label))
    assert demo is not None
    assert repr(demo.y) == shown


def test_an_example_without_a_label_is_no_demo() -> None:
    assert labelled_demo(dspy.Predict(Parity), dspy.Example(number=1, parity=None)) is None
    assert labelled_demo(dspy.Predict(Parity), dspy.Example(number=1, parity=math.nan)) is None


def test_a_labelled_example_needs_no_reasoning() -> None:
    predictor = dspy.ChainOfThought("number: int -> parity: str").predict
    assert labelled_demo(predictor, numbers(1)[0]) == dspy.Example(number=0, parity="even")


def test_a_labelled_example_is_no_demo_of_a_predictor_with_other_fields() -> None:
    assert labelled_demo(dspy.Predict("document -> summary"), numbers(1)[0]) is None


def test_demos_that_do_not_fit_the_context_with_room_for_an_answer_are_dropped_and_counted() -> None:
    program = parity_program(engine := parity_engine(lambda *_: True))
    traces = traces_of(program, 8)
    whole = DemoSets(program, traces, []).candidate("demos", 4, 0, seed=0)
    assert whole is not None
    with_two = len(engine.prompt_tokens(render_prompt(program, engine, {"number": 0}, whole.program.demos[:2])))
    engine.max_length = with_two + 256
    tight = DemoSets(program, traces, [])
    candidate = tight.candidate("demos", 4, 0, seed=0)
    assert shown(candidate) == shown(whole)[:2]
    assert tight.dropped == {"self": 2}
    assert tight.dropped == {"self": 2}


def test_the_room_for_an_answer_is_max_tokens_where_that_is_more() -> None:
    program = parity_program(engine := parity_engine(lambda *_: True), max_tokens=1000)
    traces = traces_of(program, 4)
    prompt = len(engine.prompt_tokens(render_prompt(program, engine, {"number": 0}, [])))
    engine.max_length = prompt + 900
    assert DemoSets(program, traces, []).candidate("demos", 2, 0, seed=0) is None
    engine.max_length = prompt + 2000
    assert len(shown(DemoSets(program, traces, []).candidate("demos", 2, 0, seed=0))) == 2


def test_the_longest_example_decides_whether_demos_fit() -> None:
    engine = parity_engine(lambda *_: True)
    program = dspy.Predict("text, number: int -> parity")
    program.set_lm(parity_program(engine).lm)
    long = dspy.Example(text="word " * 300, number=1, parity="odd").with_inputs("text", "number")
    short = [dspy.Example(text="word", number=n, parity=right(n)).with_inputs("text", "number") for n in range(2, 6)]
    inputs = {"text": "word", "number": 0}
    demos = [dspy.Example(**example.toDict()) for example in short]
    engine.max_length = len(engine.prompt_tokens(render_prompt(program, engine, inputs, demos))) + 256 + 10
    assert len(shown_texts(DemoSets(program, [], short).candidate("labels", 0, 4, seed=0))) == 4
    candidate = DemoSets(program, [], [*short, long]).candidate("labels", 0, 4, seed=0)
    assert candidate is None
    engine.max_length += 400
    candidate = DemoSets(program, [], [*short, long]).candidate("labels", 0, 4, seed=0)
    assert shown_texts(candidate) == ["word"] * 3
    assert candidate is not None
    longest = render_prompt(program, engine, dict(long.inputs()), candidate.program.demos)
    assert len(engine.prompt_tokens(longest)) + 256 <= engine.max_length


def test_a_candidates_mean_is_that_of_its_scores_so_far() -> None:
    candidate = Candidate("x", parity_program(parity_engine(lambda *_: True)))
    assert candidate.mean == 0.0
    candidate.scores = {0: 1.0, 5: 0.5}
    assert candidate.mean == 0.75
