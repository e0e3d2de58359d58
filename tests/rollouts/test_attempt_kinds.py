"""A plain, a sampled and a rescued attempt: seeds, temperatures and hints."""

from __future__ import annotations

import dspy
import pytest
from fakes import ONE, OtherEngine, Parity, numbers, parity_engine, parity_program, reply, two_step_program

from bettertogether.programs.copies import Copier
from bettertogether.rollouts.examples import example_key
from bettertogether.rollouts.rollout import Attempt, stable_seed
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


def test_a_plain_attempt_runs_the_program_itself(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    run = Runner(program).run(ONE)
    assert [id(entry[0]) for entry in run.raw_trace] == [id(program.remark), id(program.decide)]
    assert {request.seed for request in engine.requests} == {None}


def test_a_sampled_attempt_has_its_temperature_and_a_seed_of_its_example_and_number(engine: FakeEngine) -> None:
    runner = Runner(two_step_program(engine), seed=7)
    for example in numbers(2):
        for number in (1, 2):
            runner.run(example, Attempt("sample", number, 0.9))
    assert {request.temperature for request in engine.requests} == {0.9}
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == 4
    assert seeds[0] == stable_seed(7, example_key(numbers(1)[0]), 1)


def test_sampling_leaves_the_program_as_it_was(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    lm, signature = program.remark.lm, program.remark.signature
    Runner(program).run(ONE, Attempt("rescue", 1, None, {"parity": "odd"}))
    assert (program.remark.lm, program.remark.signature) == (lm, signature)
    assert lm.kwargs == {"temperature": 0.0, "max_tokens": None}


def test_one_copy_serves_attempts_that_do_not_overlap(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Copier] = []
    copy = Copier.copy

    def counted(self: Copier) -> dspy.Module:
        copies.append(self)
        return copy(self)

    monkeypatch.setattr(Copier, "copy", counted)
    runner = Runner(two_step_program(engine))
    for number in range(1, 5):
        runner.run(ONE, Attempt("sample", number, 1.0))
    assert len(copies) == 1


def test_a_rescue_leaves_no_hint_for_the_next_attempt(engine: FakeEngine) -> None:
    runner = Runner(two_step_program(engine))
    runner.run(ONE, Attempt("rescue", 1, None, {"parity": "odd"}))
    runner.run(ONE, Attempt("sample", 1, 1.0))
    assert ["result is known" in request.system for request in engine.requests] == [False, True, False, False]


def test_an_lm_that_samples_without_a_seed_is_given_one(engine: FakeEngine) -> None:
    program = two_step_program(engine, temperature=0.7)
    Runner(program, seed=1).run(ONE)
    assert {request.seed for request in engine.requests} == {stable_seed(1, example_key(ONE), 0)}


def test_an_lm_with_its_own_seed_keeps_it(engine: FakeEngine) -> None:
    Runner(two_step_program(engine, temperature=0.7, seed=5)).run(ONE)
    assert {request.seed for request in engine.requests} == {5}


def test_an_engine_that_takes_no_seed_is_sent_none() -> None:
    other = OtherEngine(lambda request: reply(request, parity="odd"))
    program = dspy.Predict(Parity)
    program.set_lm(dspy.LM("local/api", engine=other, cache=False))
    Runner(program).run(ONE, Attempt("sample", 1, 1.0))
    assert [(request.temperature, request.seed) for request in other.fake.requests] == [(1.0, None)]


def test_rescue_narrows_the_answer_to_the_label_and_says_so_in_the_prompt() -> None:
    engine = parity_engine(lambda *_: True)
    with dspy.context(adapter=dspy.JSONAdapter()):
        Runner(parity_program(engine)).run(ONE, Attempt("rescue", 1, None, {"parity": "odd"}))
    (request,) = engine.requests
    assert request.schema is not None
    assert request.schema["properties"]["parity"]["const"] == "odd"
    assert "`parity` = 'odd'" in request.system


def test_rescue_hints_at_the_predictors_that_answer_the_label_alone(engine: FakeEngine) -> None:
    Runner(two_step_program(engine)).run(ONE, Attempt("rescue", 1, None, {"parity": "odd"}))
    assert ["result is known" in request.system for request in engine.requests] == [False, True]


def test_a_rescue_that_leads_hints_at_the_predictors_before_the_answer_alone(engine: FakeEngine) -> None:
    Runner(two_step_program(engine)).run(ONE, Attempt("rescue", 1, None, {"parity": "odd"}, leads=True))
    assert ["`parity` = 'odd'" in request.system for request in engine.requests] == [True, False]


def test_rescue_hints_at_all_predictors_when_none_answers_the_label(engine: FakeEngine) -> None:
    Runner(two_step_program(engine)).run(ONE, Attempt("rescue", 1, None, {"total": 3}))
    assert ["`total` = 3" in request.system for request in engine.requests] == [True, True]
