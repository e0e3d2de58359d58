"""A row shows what its call was given and what the LM said, whatever the program does before and after."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import dspy
import pytest
from fakes import (
    Parity,
    TwoSteps,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    reply,
    right,
    two_step_engine,
)
from watched import ALWAYS, One, over, prompts, rows_of

from bettertogether.errors import NoTrainingDataError
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.runner import Runner
from bettertogether.steps.left_out import OWN_DEMO, own_demos
from bettertogether.steps.preference_step import PreferenceFinetune
from bettertogether.steps.training_step import TrainingStep
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine

DEMOS = numbers(2, start=100)


OTHER = Parity.with_instructions("Even or odd? Say it.")


class CallTime(One):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, number: int) -> dspy.Prediction:
        return self.p(number=number, **self.given)


GIVEN: dict[str, dict[str, Any]] = {
    "demos": {"demos": DEMOS},
    "signature": {"signature": OTHER},
    "text": {"signature": "number: int -> parity: str"},
    "config": {"config": {"temperature": 0.5}},
    "all": {"demos": DEMOS, "signature": OTHER, "config": {"max_tokens": 9}},
}


@pytest.mark.parametrize("given", list(GIVEN))
@pytest.mark.parametrize("train_prompt", ["vanilla", "optimized", "mixed"])
def test_what_a_call_is_given_is_in_its_rows(adapter: dspy.Adapter, given: str, train_prompt: Any) -> None:
    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(CallTime(**GIVEN[given]), engine), 3, train_prompt=train_prompt)
    assert len(rows) == 3
    assert {repr(row.messages) for row in rows} == prompts(engine)


def test_the_tuned_program_sends_the_prompts_that_it_was_trained_on() -> None:
    engine = parity_engine(lambda *_: True)
    program = over(CallTime(**GIVEN["all"]), engine)
    program.p.demos = numbers(1, start=50)
    tuned = LoRAFinetune(parity_match, num_samples=0).compile(program, trainset=numbers(4))
    engine.requests.clear()
    for example in numbers(4):
        tuned(**example.inputs())
    assert all(request.learned is not None for request in engine.requests)


@pytest.mark.parametrize("name", ["demos", "signature"])
def test_what_forward_puts_on_a_predictor_is_in_its_rows(name: str) -> None:
    class Sets(One):
        def forward(self, number: int) -> dspy.Prediction:
            setattr(self.p, name, GIVEN[name][name])
            return self.p(number=number)

    engine = parity_engine(lambda *_: True)
    program = over(Sets(), engine)
    rows = rows_of(program, 3)
    assert {repr(row.messages) for row in rows} == prompts(engine)
    assert (program.p.demos, program.p.signature) == ([], Parity)


def test_an_adapter_that_forward_takes_is_that_of_its_rows() -> None:
    class Takes(One):
        def forward(self, number: int) -> dspy.Prediction:
            with dspy.context(adapter=dspy.JSONAdapter()):
                return self.p(number=number)

    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(Takes(), engine), 3)
    assert {repr(row.messages) for row in rows} == prompts(engine)
    assert rows[0].completion == '{\n  "parity": "even"\n}'


OWN = (
    "Nothing is learned from calls that were given their own example as a demo ({} answers): leave the example itself "
    "out of the search (dspy.KNN), or let it search other data."
)


def test_a_call_whose_demos_show_its_own_inputs_is_dropped_counted_and_told() -> None:
    program = over(CallTime(demos=numbers(2)), parity_engine(lambda *_: True))
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False)
    collected = optimizer.collect(program, trainset=numbers(5))
    assert [row.example for row in collected.rows] == [2, 3, 4]
    assert collected.card.dropped_by_reason == {"the demos that the call was given show its own inputs": 2}
    assert collected.card.warnings == (OWN.format(2),)


@pytest.mark.parametrize(
    ("step", "count"), [(LoRAFinetune(parity_match, num_samples=0), 2), (PreferenceFinetune(parity_match), 10)]
)
def test_where_all_calls_show_their_own_example_the_error_says_what_to_do(step: TrainingStep, count: int) -> None:
    program = over(CallTime(demos=numbers(2)), parity_engine(lambda *_: True))
    with pytest.raises(NoTrainingDataError, match=re.escape(f" {OWN.format(count)} ")):
        step.compile(program, trainset=numbers(2))


def test_own_demos_are_told_where_no_other_reason_left_out_more_calls() -> None:
    for others, told in ((2, [OWN.format(2)]), (3, [])):
        assert own_demos(Counter({("", "failed"): 9, ("p", OWN_DEMO): 2, ("p", "too long"): others})) == told
    assert own_demos(Counter({("", "failed"): 9})) == []


def test_a_call_given_another_lm_is_dropped_and_counted() -> None:
    other = parity_engine(lambda *_: True, base_name="other")

    class Mixed(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            remark = self.remark(number=number).remark
            return self.decide(number=number, remark=remark, lm=plain_lm(other))

    program = over(Mixed(), two_step_engine(lambda *_: True))
    collected = LoRAFinetune(parity_match, num_samples=0, rescue=False).collect(program, trainset=numbers(4))
    assert {row.predictor for row in collected.rows} == {"remark"}
    assert collected.card.dropped_by_reason == {"made with another LM than the predictor's": 4}


def test_a_call_given_its_own_lm_with_other_options_is_a_row() -> None:
    class Hot(One):
        def forward(self, number: int) -> dspy.Prediction:
            return self.p(number=number, lm=self.p.lm.copy(temperature=0.7))

    assert len(rows_of(over(Hot(), parity_engine(lambda *_: True)), 3)) == 3


def test_a_rescued_call_whose_own_signature_shows_the_hint_is_dropped() -> None:
    class Rewrites(One):
        def forward(self, number: int) -> dspy.Prediction:
            signature = self.p.signature
            return self.p(number=number, signature=signature.with_instructions(signature.instructions + " Now!"))

    program = over(Rewrites(), parity_engine(lambda request, _: "is known" in request.system))
    with pytest.raises(NoTrainingDataError, match="2 x its own signature shows the hint"):
        rows_of(program, 2, rescue=True)


def test_inputs_are_those_of_the_call_though_the_program_changes_them_later() -> None:
    class Talk(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict("history: dspy.History, notes: list[str], number: int -> parity: str")

        def forward(self, number: int) -> dspy.Prediction:
            history, notes = dspy.History(messages=[]), ["one"]
            for _ in range(2):
                answer = self.p(history=history, notes=notes, number=number)
                history.messages.append({"number": number, "notes": list(notes), "parity": answer.parity})
                notes.append(answer.parity)
            return answer

    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(Talk(), engine), 2)
    assert len(rows) == 4
    assert {repr(row.messages) for row in rows} == prompts(engine)


def test_outputs_are_what_the_lm_said_though_the_program_tidies_them_up() -> None:
    class Tidy(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict("number: int -> parity: str, why: list[str]")

        def forward(self, number: int) -> dspy.Prediction:
            answer = self.p(number=number)
            answer.parity = answer.parity.lower()
            answer.why.append("tidied")
            return answer

    program = over(Tidy(), FakeEngine(lambda r: reply(r, parity=right(number_of(r)).upper(), why=["x"])))
    (call,) = Runner(program).run(numbers(1)[0]).calls
    assert call.outputs == {"parity": "EVEN", "why": ["x"]}


def test_inputs_that_are_no_fields_of_the_predictor_are_not_the_calls() -> None:
    example = dspy.Example(number=1, parity="odd", extra="x").with_inputs("number", "parity", "extra")
    (call,) = Runner(parity_program(ALWAYS)).run(example).calls
    assert call == Call("self", {"number": 1}, {"parity": "odd"})
