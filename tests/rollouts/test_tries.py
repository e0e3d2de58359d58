"""An example that failed is tried again: sampled, by a teacher, and with its label as a hint."""

from __future__ import annotations

from collections import Counter

import dspy
import pytest
from fakes import number_of, numbers, parity_engine, parity_match, parity_program, reply, right, two_step_program, wrong
from tries import NO_MORE, attempts, collect, sampled_only

from bettertogether.rollouts.sampled_lms import sampling_lm
from bettertogether.rollouts.traces import ExamplePass, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.testing import FakeEngine, FakeRequest


def test_an_example_that_failed_is_tried_again_until_it_passes() -> None:
    sampling = Sampling(num_samples=3, rescue=False)
    traces = collect(engine := parity_engine(sampled_only), 4, sampling)
    assert attempts(traces) == [
        (0, "student", 0, True),
        (1, "student", 0, False),
        (1, "sample", 1, True),
        (2, "student", 0, True),
        (3, "student", 0, False),
        (3, "sample", 1, True),
    ]
    assert len(engine.requests) == 6


def test_an_example_that_never_passes_is_tried_num_samples_times() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 2, Sampling(num_samples=3, rescue=False))
    assert len(engine.requests) == 2 + 2 * 3


def solved_on_try(number_of_tries: int, numbers_known: int) -> FakeEngine:
    """An engine that answers the first numbers right on their n-th sample, and the others never."""
    tries: Counter[int] = Counter()

    def knows(request: FakeRequest, number: int) -> bool:
        tries[number] += request.temperature > 0
        return number < numbers_known and tries[number] == number_of_tries

    return parity_engine(knows)


@pytest.mark.parametrize(
    ("enough", "solved", "tries"),
    [
        (0, 0, {"sample": 12, "student": 6}),
        (1, 3, {"sample": 6 * 5, "student": 6}),
        (3, 3, {"sample": 6 * 5, "student": 6}),
        (4, 3, {"sample": 6 * 5 + 3 * 3, "student": 6}),
    ],
)
def test_where_hardly_any_is_solved_the_others_are_tried_up_to_eight_times(
    enough: int, solved: int, tries: dict[str, int]
) -> None:
    sampling = Sampling(num_samples=2, rescue=False, enough=enough)
    traces = collect(solved_on_try(5, 3), 6, sampling, num_threads=1)
    assert len(traces.passing) == solved
    assert Counter(trace.source for trace in traces.traces) == tries


def test_more_tries_than_asked_for_come_after_the_hint() -> None:
    engine = parity_engine(lambda request, _: "is known" in request.system)
    collect(engine, 2, Sampling(num_samples=1, enough=2))
    assert len(engine.requests) == 2 * 3


def test_num_samples_zero_is_no_more_tries_however_few_are_solved() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 3, Sampling(num_samples=0, rescue=False, enough=2))
    assert len(engine.requests) == 3


def test_num_samples_zero_without_rescue_is_one_run_an_example() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 5, NO_MORE)
    assert len(engine.requests) == 5


def test_sample_passing_tries_the_others_too() -> None:
    engine = parity_engine(lambda *_: True)
    traces = collect(engine, 3, Sampling(num_samples=2, rescue=False, sample_passing=True))
    assert len(engine.requests) == 9
    assert Counter(trace.source for trace in traces.traces) == {"student": 3, "sample": 6}


def test_the_temperature_schedule_is_used_in_turn() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 1, Sampling(num_samples=5, temperature=(0.5, 1.0), rescue=False))
    assert [request.temperature for request in engine.requests] == [0.0, 0.5, 1.0, 0.5, 1.0, 0.5]


def test_every_example_and_try_has_a_seed_of_its_own_and_a_second_run_the_same() -> None:
    def seeds(seed: int) -> set[tuple[str, int | None]]:
        engine = parity_engine(lambda *_: False)
        collect(engine, 4, Sampling(num_samples=3, rescue=False), seed=seed)
        return {(request.user, request.seed) for request in engine.requests if request.temperature > 0}

    assert len({seed for _, seed in seeds(0)}) == 12
    assert seeds(0) == seeds(0)
    assert not seeds(0) & seeds(1)


def test_rescue_tries_once_more_with_the_label_as_a_hint() -> None:
    engine = parity_engine(lambda request, _: "is known" in request.system)
    traces = collect(engine, 2, Sampling(num_samples=1))
    assert attempts(traces)[:3] == [(0, "student", 0, False), (0, "sample", 1, False), (0, "rescue", 1, True)]
    assert sum("is known" in request.system for request in engine.requests) == 2


def test_what_comes_before_the_answer_is_led_to_it_first_and_the_answer_given_only_where_that_fails() -> None:
    def answer(request: FakeRequest) -> str:
        told, number = "is known" in request.system, number_of(request)
        if "1. `parity`" not in request.system:
            return reply(request, remark="good" if told and number == 1 else "bad")
        return reply(request, parity=right(number) if told or "good" in request.user else wrong(number))

    program = two_step_program(FakeEngine(answer))
    traces = collect_traces(program, numbers(3, start=1), ExamplePass(parity_match), sampling=Sampling(0))
    passed = {trace.index: [call.outputs for call in trace.calls] for trace in traces.passing}
    assert passed == {
        0: [{"remark": "good"}, {"parity": "odd"}],
        1: [{"remark": "bad"}, {"parity": "even"}],
        2: [{"remark": "bad"}, {"parity": "odd"}],
    }
    assert [t.source for t in traces.traces] == ["student", "rescue", *["student", "rescue", "rescue"] * 2]


@pytest.mark.parametrize(
    "remark", ["As the right final result is known: `x`", "Given the hint, it is", "Write what leads to it."]
)
@pytest.mark.parametrize("hinted", [True, False])
def test_a_rescued_run_in_which_an_answer_talks_about_the_hint_has_not_passed(remark: str, hinted: bool) -> None:
    def answer(request: FakeRequest) -> str:
        told, number = "is known" in request.system, number_of(request)
        if "1. `parity`" not in request.system:
            return reply(request, remark=remark)
        return reply(request, parity=right(number) if told or not hinted else wrong(number))

    program = two_step_program(FakeEngine(answer))
    traces = collect_traces(program, numbers(1), ExamplePass(parity_match), sampling=Sampling(0))
    assert [trace.passed for trace in traces.traces] == ([False] * 3 if hinted else [True])
    assert traces.reasons().get("answer talks about the hint", 0) == int(hinted)


def test_rescue_false_never_hints() -> None:
    engine = parity_engine(lambda *_: False)
    collect(engine, 2, Sampling(num_samples=1, rescue=False))
    assert not any("is known" in request.system for request in engine.requests)


def test_an_example_without_a_label_is_not_rescued() -> None:
    engine = parity_engine(lambda *_: False)
    examples = [dspy.Example(number=1).with_inputs("number")]
    collect_traces(parity_program(engine), examples, ExamplePass(lambda e, p, t=None: False), sampling=Sampling(0))
    assert len(engine.requests) == 1


def test_a_named_label_field_alone_is_the_hint() -> None:
    engine = parity_engine(lambda *_: False)
    examples = [dspy.Example(number=1, parity="odd", secret="x").with_inputs("number")]
    options = ExamplePass(parity_match)
    collect_traces(parity_program(engine), examples, options, sampling=Sampling(0), label_field="parity")
    assert "secret" not in engine.requests[-1].system
    assert "`parity` = 'odd'" in engine.requests[-1].system


def test_traces_carry_their_label_where_labels_repeat() -> None:
    traces = collect(parity_engine(lambda *_: True), 4)
    assert [trace.label for trace in traces.traces] == ["even", "odd", "even", "odd"]


def test_a_teacher_makes_the_runs_instead_of_the_student() -> None:
    student, teacher = parity_engine(lambda *_: False), parity_engine(lambda *_: True, base_name="big")
    traces = collect_traces(
        parity_program(student),
        numbers(3),
        ExamplePass(parity_match),
        sampling=NO_MORE,
        teachers=[parity_program(teacher)],
    )
    assert attempts(traces) == [(i, "teacher", 0, True) for i in range(3)]
    assert (len(student.requests), len(teacher.requests)) == (0, 3)


def test_each_of_several_teachers_makes_a_run_of_every_example() -> None:
    engines = [parity_engine(lambda *_: True, base_name=name) for name in ("a", "b")]
    teachers = [parity_program(engine) for engine in engines]
    student = parity_program(parity_engine(lambda *_: False))
    traces = collect_traces(student, numbers(3), ExamplePass(parity_match), sampling=NO_MORE, teachers=teachers)
    assert [len(engine.requests) for engine in engines] == [3, 3]
    assert len(traces.passing) == 6


def test_the_first_teacher_makes_the_further_tries() -> None:
    engines = [parity_engine(lambda *_: False, base_name=name) for name in ("a", "b")]
    teachers = [parity_program(engine) for engine in engines]
    student = parity_engine(lambda *_: False)
    sampling = Sampling(1, rescue=False)
    collect_traces(parity_program(student), numbers(2), ExamplePass(parity_match), sampling=sampling, teachers=teachers)
    assert [len(engine.requests) for engine in engines] == [2 + 2, 2]
    assert student.requests == []
    sampling = Sampling(0, rescue=False, branches=1)
    traces = collect_traces(
        parity_program(student), numbers(2), ExamplePass(parity_match), sampling=sampling, teachers=teachers
    )
    first = [trace for trace in traces.traces if trace.source == "teacher"][::2]
    assert all(point.run is run for point, run in zip(traces.branches, first, strict=True))


@pytest.mark.parametrize(
    ("model", "own", "asked"),
    [("openai/gpt-5", {}, None), ("openai/gpt-5", {"temperature": 1.0}, 1.0), ("openai/gpt-4o", {}, 0.3)],
)
def test_a_model_that_takes_no_other_temperature_is_tried_at_its_own(
    model: str, own: dict[str, float], asked: float | None
) -> None:
    lm = sampling_lm(dspy.LM(model, api_key="k", **own), 2, 0.3, 7)
    assert (lm.kwargs["temperature"], lm.kwargs["rollout_id"], lm.kwargs["seed"]) == (asked, 2, 7)
    assert lm.drawn.at_own_temperature is (model == "openai/gpt-4o")
