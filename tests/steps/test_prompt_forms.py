"""Rows of train_prompt="varied" are shown prompts with demos of other examples too."""

from __future__ import annotations

import re
from typing import Any

import dspy
import pytest
from fakes import (
    Parity,
    field_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    predictor_over,
    reply,
    right,
    two_step_engine,
    two_step_program,
)

from bettertogether.engines.protocol import ChatMessage
from bettertogether.errors import ConfigError
from bettertogether.rollouts.examples import question_hash
from bettertogether.rollouts.traces import ExamplePass, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.prompt_capture import render_prompt
from bettertogether.steps.prompt_forms import N_FORMS, OWN_EXAMPLE, TEMPLATE_TOKENS, TOO_LONG, PromptForms, too_long
from bettertogether.steps.rows import Row
from bettertogether.steps.rows_from_traces import Collected
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest

Form = tuple[ChatMessage, ...]


def collect(program: dspy.Module, trainset: list[dspy.Example], *, earlier: Any = (), **options: Any) -> Collected:
    off: dict[str, Any] = {"num_samples": 0, "rescue": False, "balance": False}
    return LoRAFinetune(parity_match, **(off | options)).collect(program, trainset=trainset, earlier=earlier)


def asked(form: Form) -> list[int]:
    """The numbers that a prompt shows, that of its question last."""
    found = (re.search(r"## number ## \]\]\n(\d+)", turn["content"]) for turn in form if turn["role"] == "user")
    return [int(number.group(1)) for number in found if number]


def knows_all(*_: Any) -> bool:
    return True


def test_a_row_has_the_zero_shot_prompt_and_up_to_eight_with_demos(adapter: dspy.Adapter) -> None:
    rows = collect(parity_program(parity_engine(knows_all)), numbers(20), train_prompt="vanilla").rows
    varied = collect(parity_program(parity_engine(knows_all)), numbers(20)).rows
    assert [(row.messages, row.completion) for row in varied] == [(row.messages, row.completion) for row in rows]
    assert {len(row.forms) for row in varied} == {N_FORMS}
    assert {len(row.forms) for row in rows} == {0}


def test_a_form_shows_one_to_max_demos_demos_and_then_the_question() -> None:
    for most in (1, 3):
        rows = collect(parity_program(parity_engine(knows_all)), numbers(40), max_demos=most).rows
        assert {asked(form)[-1] for row in rows for form in row.forms} == set(range(40))
        # A form that showed the row's own example alone is the zero-shot prompt.
        assert {len(asked(form)) - 1 for row in rows for form in row.forms} == set(range(most + 1))


def test_no_form_shows_the_rows_own_example() -> None:
    for row in collect(parity_program(parity_engine(knows_all)), numbers(5)).rows:
        for form in row.forms:
            assert row.example not in asked(form)[:-1]


def test_no_form_shows_another_example_that_asks_the_same() -> None:
    twice = [*numbers(4), *numbers(4)]
    for row in collect(parity_program(parity_engine(knows_all)), twice).rows:
        for form in row.forms:
            assert asked(form)[-1] == row.example % 4
            assert asked(form).count(row.example % 4) == 1


class Blind(dspy.Module):
    """The second predictor sees nothing of the example but a remark that all examples share or none does."""

    def __init__(self) -> None:
        super().__init__()
        self.remark = dspy.Predict("number: int -> remark: str")
        self.decide = dspy.Predict("remark: str -> parity: str")

    def forward(self, number: int) -> dspy.Prediction:
        return self.decide(remark=self.remark(number=number).remark)


def blind_program() -> Blind:
    def answer(request: FakeRequest) -> str:
        if "`parity`" not in request.system:
            # Each run of a number has a remark of its own.
            return reply(request, remark=f"{field_of(request, 'number')} seen at {request.temperature}")
        return reply(request, parity=right(int(field_of(request, "remark").split()[0])))

    program = Blind()
    program.set_lm(plain_lm(FakeEngine(answer)))
    return program


def test_no_form_of_a_later_predictor_shows_another_run_of_its_own_example() -> None:
    rows = collect(blind_program(), numbers(6), num_samples=1, sample_passing=True).rows
    decide = [row for row in rows if row.predictor == "decide"]
    assert len(decide) == 12
    for row in decide:
        for form in row.forms:
            shown = [turn["content"] for turn in form[1:-1] if turn["role"] == "user"]
            assert not any(f"\n{row.example} seen at" in turn for turn in shown)


def test_no_form_shows_the_rows_own_example_out_of_an_earlier_program() -> None:
    earlier = blind_program()
    earlier.decide.demos = [dspy.Example(remark="3 seen at 0.0", parity="odd"), dspy.Example(remark="x", parity="even")]
    rows = collect(blind_program(), numbers(6), earlier=[earlier], num_samples=1, sample_passing=True).rows
    first = {row.example: len(row.forms[0]) for row in rows if row.predictor == "decide"}
    assert first == {0: 6, 1: 6, 2: 6, 3: 4, 4: 6, 5: 6}


@pytest.mark.parametrize("train_prompt", ["varied", "optimized"])
def test_no_prompt_shows_what_came_of_the_own_example_under_another_prompt(train_prompt: str) -> None:
    program, trainset = blind_program(), numbers(6)
    own = dspy.Example(remark="in other words", parity="odd", augmented=question_hash(trainset[3]))
    program.decide.demos = [own, dspy.Example(remark="x", parity="even")]
    rows = [row for row in collect(program, trainset, train_prompt=train_prompt).rows if row.predictor == "decide"]
    lengths = {row.example: len(row.forms[0] if row.forms else row.messages) for row in rows}
    assert lengths == {0: 6, 1: 6, 2: 6, 3: 4, 4: 6, 5: 6}


def test_forms_of_one_number_show_one_demo_set_less_the_own_example_and_begin_alike(adapter: dspy.Adapter) -> None:
    rows = collect(parity_program(parity_engine(knows_all)), numbers(30)).rows
    for number in range(N_FORMS):
        beginnings = [row.forms[number][:-1] for row in rows]
        whole = max(beginnings, key=beginnings.count)
        demos = (len(whole) - 1) // 2
        assert 1 <= demos <= 3
        # The rows whose own example is in the set are the only ones that begin otherwise.
        assert len(rows) - beginnings.count(whole) == demos


def test_every_form_is_byte_for_byte_the_prompt_with_its_demos(adapter: dspy.Adapter) -> None:
    engine = parity_engine(knows_all)
    program = parity_program(engine)
    program.demos = numbers(2, start=50)
    rows = collect(program, numbers(12)).rows
    for row in rows:
        assert row.forms[0] == render_prompt(program, engine, {"number": row.example}, program.demos)


def test_the_prompts_of_an_adapter_that_writes_the_question_into_the_system_message_are_made_one_by_one() -> None:
    class Odd(dspy.ChatAdapter):
        def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
            messages = super().format(signature, demos, inputs)
            messages[0]["content"] += f" Mind {inputs['number']}."
            return messages

    engine = parity_engine(knows_all)
    program = parity_program(engine)
    program.demos = numbers(2, start=50)
    with dspy.context(adapter=Odd()):
        for row in collect(program, numbers(8)).rows:
            assert row.forms[0] == render_prompt(program, engine, {"number": row.example}, program.demos)


def test_sets_come_by_turns_from_passing_runs_and_labelled_examples() -> None:
    engine = parity_engine(lambda _, number: number < 10)
    collected = collect(parity_program(engine), numbers(20))
    assert collected.card.demo_sets == {"traces": 4, "labels": 4}
    shown: list[set[int]] = [set() for _ in range(N_FORMS)]
    for row in collected.rows:
        for number, form in enumerate(row.forms):
            shown[number] |= set(asked(form)[:-1])
    assert all(numbers_shown <= set(range(10)) for numbers_shown in shown[::2])
    assert set().union(*shown[1::2]) - set(range(10))


def test_predictors_are_shown_the_same_runs_in_a_set_of_runs() -> None:
    program = two_step_program(two_step_engine(knows_all))
    forms = PromptForms(program, numbers(20), _traces(program))
    of_runs = [[each.demos for each in forms.sets[name] if each.source == "traces"] for name in ("remark", "decide")]
    remark, decide = ([[demo.number for demo in demos] for demos in sets] for sets in of_runs)
    assert (len(remark), len(decide)) == (8, 4)
    assert remark[:4] == decide


def test_a_predictor_that_no_example_labels_is_shown_runs_alone() -> None:
    card = collect(two_step_program(two_step_engine(knows_all)), numbers(20), frozen=["decide"]).card
    assert card.demo_sets == {"traces": N_FORMS}


def _traces(program: dspy.Module) -> Any:
    sampling = Sampling(num_samples=0, rescue=False)
    return collect_traces(program, numbers(20), ExamplePass(parity_match), sampling=sampling).traces


def test_the_seed_decides_the_demos() -> None:
    def forms(seed: int) -> list[Any]:
        return [row.forms for row in collect(parity_program(parity_engine(knows_all)), numbers(30), seed=seed).rows]

    assert forms(1) == forms(1)
    assert forms(1) != forms(2)


def test_the_programs_own_prompt_and_those_of_earlier_programs_are_the_first_forms() -> None:
    engine = parity_engine(knows_all)
    program = predictor_over(engine, Parity, numbers(1, start=50))
    first = predictor_over(engine, Parity.with_instructions("Say it once."), numbers(1, start=60))
    second = predictor_over(engine, Parity.with_instructions("Say it twice."), numbers(2, start=60))
    zero_shot = predictor_over(engine, Parity)
    same = predictor_over(engine, Parity, numbers(1, start=50))
    told = predictor_over(engine, Parity.with_instructions("Say it well."))
    collected = collect(program, numbers(10), earlier=[zero_shot, first, same, second, told])
    (row, *_) = collected.rows
    inputs = {"number": row.example}
    expected = [render_prompt(each, engine, inputs, each.demos) for each in (program, first, second, told)]
    assert list(row.forms[:4]) == expected
    assert collected.card.demo_sets == {"given": 1, "earlier": 3, "traces": 2, "labels": 2}


def test_prompts_that_are_given_are_at_most_half_of_the_forms() -> None:
    engine = parity_engine(knows_all)
    earlier = [predictor_over(engine, Parity, numbers(1, start=50 + n)) for n in range(9)]
    collected = collect(parity_program(engine), numbers(10), earlier=earlier)
    assert collected.card.demo_sets == {"earlier": 4, "traces": 2, "labels": 2}
    assert [asked(collected.rows[0].forms[n])[0] for n in range(4)] == [50, 51, 52, 53]


def test_an_earlier_program_of_other_fields_or_names_is_passed_over() -> None:
    engine = parity_engine(knows_all)
    other = predictor_over(engine, "number: int -> answer: str", [dspy.Example(number=1, answer="x")])
    earlier = [other, two_step_program(engine)]
    assert collect(parity_program(engine), numbers(10), earlier=earlier).card.demo_sets == {"traces": 4, "labels": 4}


def test_a_form_that_would_show_nothing_but_the_own_example_is_the_zero_shot_prompt_and_is_counted() -> None:
    engine = parity_engine(knows_all)
    program = predictor_over(engine, Parity, numbers(1, start=2))
    collected = collect(program, numbers(30), max_demos=3)
    own = collected.rows[2]
    assert own.forms[0] == own.messages
    count = sum(form == row.messages for row in collected.rows for form in row.forms)
    assert count >= 1
    assert collected.card.forms_left_out == {OWN_EXAMPLE: count}


def test_a_form_too_long_for_the_context_is_the_zero_shot_prompt_and_is_counted() -> None:
    engine = parity_engine(knows_all)
    program = predictor_over(engine, Parity, [dspy.Example(number=99, parity="odd " * 2000)])
    engine.max_length = 1500
    collected = collect(program, numbers(10))
    assert all(row.forms[0] == row.messages and len(row.forms) > 1 for row in collected.rows)
    assert collected.card.forms_left_out[TOO_LONG] == 10


def test_a_form_fits_with_its_answer_to_the_last_token_and_not_one_less() -> None:
    engine = parity_engine(knows_all)
    program = predictor_over(engine, Parity, [dspy.Example(number=99, parity="odd " * 500)])
    row = collect(program, numbers(10)).rows[0]
    engine.max_length = len(engine.prompt_tokens(row.forms[0])) + len(engine.completion_tokens(row.completion))
    assert collect(program, numbers(10)).rows[0].forms[0] == row.forms[0]
    engine.max_length -= 1
    assert collect(program, numbers(10)).rows[0].forms[0] == row.messages


@pytest.mark.parametrize("trainset", [numbers(1), numbers(1) * 3])
def test_without_another_example_rows_are_zero_shot_and_a_warning_says_so(trainset: list[dspy.Example]) -> None:
    collected = collect(parity_program(parity_engine(knows_all)), trainset)
    assert {row.forms for row in collected.rows} == {()}
    assert collected.card.rows_with_demos == 0
    (warning,) = collected.card.warnings
    assert re.match(r"train_prompt='varied': no row of \['self'\] is shown demos, only the zero-shot prompt: ", warning)
    assert OWN_EXAMPLE in warning


def test_a_context_that_has_no_room_for_demos_leaves_rows_zero_shot_and_a_warning_says_so() -> None:
    engine = parity_engine(knows_all)
    zero_shot = collect(parity_program(engine), numbers(1)).card
    engine.max_length = zero_shot.prompt_tokens["max"] + zero_shot.completion_tokens["max"] + 1
    collected = collect(parity_program(engine), numbers(10))
    assert {row.forms for row in collected.rows} == {()}
    (warning,) = collected.card.warnings
    assert "there is no example that can be one" in warning


def test_a_call_with_demos_or_a_signature_of_its_own_keeps_its_own_prompt_alone() -> None:
    class Given(dspy.Module):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.p = dspy.Predict(Parity)
            self.given = given

        def forward(self, number: int) -> dspy.Prediction:
            return self.p(number=number, **self.given)

    for given in ({"demos": numbers(1, start=50)}, {"signature": Parity.with_instructions("Say.")}):
        program = Given(**given)
        program.set_lm(plain_lm(parity_engine(knows_all)))
        collected = collect(program, numbers(10))
        assert {row.forms for row in collected.rows} == {()}
        assert collected.card.warnings == ()
        assert collected.card.demo_sets == {}


def test_no_form_shows_the_hint_of_a_rescue(adapter: dspy.Adapter) -> None:
    engine = parity_engine(lambda request, number: "is known" in request.system)
    rows = collect(parity_program(engine), numbers(8), rescue=True).rows
    assert {len(row.forms) for row in rows} == {N_FORMS}
    assert not any("is known" in turn["content"] for row in rows for form in row.forms for turn in form)


def test_the_card_counts_rows_with_demos() -> None:
    card = collect(parity_program(parity_engine(knows_all)), numbers(20)).card
    assert card.rows_with_demos == 20
    assert sum(card.demo_sets.values()) == N_FORMS
    assert card.samples[0].keys() == {"prompt", "completion", "predictor", "example", "label", "source"}


def test_the_engine_is_given_the_forms_and_fields_of_its_rows() -> None:
    engine = parity_engine(knows_all)
    program = parity_program(engine)
    rows = collect(program, numbers(20)).rows
    LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False, validation_share=0).compile(
        program, trainset=numbers(20)
    )
    assert engine.trainings == [tuple(row.training_row for row in rows)]
    assert engine.trainings[0][0].forms == rows[0].forms
    assert engine.trainings[0][0].fields == rows[0].fields != ()


@pytest.mark.parametrize("demos", [0, 2])
def test_the_tuned_program_keeps_the_prompts_it_had(demos: int) -> None:
    program = parity_program(parity_engine(knows_all))
    program.demos = numbers(demos, start=50)
    compiled = LoRAFinetune(parity_match, num_samples=0).compile(program, trainset=numbers(8))
    assert [demo.number for demo in compiled.demos] == [50, 51][:demos]


@pytest.mark.parametrize("most", [0, -1, 1.5, "3", None, True])
def test_max_demos_is_one_or_more(most: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"max_demos={most!r}")):
        LoRAFinetune(parity_match, max_demos=most)


def test_a_misspelt_train_prompt_is_an_error_that_lists_the_allowed() -> None:
    with pytest.raises(ConfigError, match=r"train_prompt='various'.*varied.*vanilla.*optimized.*mixed"):
        LoRAFinetune(parity_match, train_prompt="various")  # type: ignore[arg-type]


def test_the_papers_prompt_is_zero_shot() -> None:
    assert LoRAFinetune(parity_match).rows.train_prompt == "varied"
    assert LoRAFinetune.paper(parity_match).rows.train_prompt == "vanilla"


def test_a_call_of_another_adapter_has_forms_of_that_adapter() -> None:
    class InJSON(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict(Parity)

        def forward(self, number: int) -> dspy.Prediction:
            with dspy.context(adapter=dspy.JSONAdapter()):
                return self.p(number=number)

    program = InJSON()
    program.set_lm(plain_lm(parity_engine(knows_all)))
    rows: tuple[Row, ...] = collect(program, numbers(10)).rows
    answers = [turn["content"] for turn in rows[0].forms[0] if turn["role"] == "assistant"]
    assert answers
    assert all(answer.startswith("{") for answer in answers)
    assert {type(row.response_format) for row in rows} == {dict}


def test_the_tokens_of_a_form_are_counted_only_where_they_may_be_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = parity_engine(knows_all)
    prompt_tokens, counted = engine.prompt_tokens, list[Any]()

    def noted(messages: Any) -> list[int]:
        counted.append(messages)
        return prompt_tokens(messages)

    monkeypatch.setattr(engine, "prompt_tokens", noted)
    # Two tokens, the role and the word, which has 20 bytes.
    messages: Form = ({"role": "user", "content": "é" * 10},)
    assert [too_long(messages, engine, room) for room in (20 + TEMPLATE_TOKENS, 19 + TEMPLATE_TOKENS, 2, 1)] == [
        *[False] * 3,
        True,
    ]
    assert counted == [messages] * 3
