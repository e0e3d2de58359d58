"""Demos that can't be sent, saved or fitted cost themselves alone."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import api_lm, numbers, parity_engine, parity_match, placeless, plain_lm, prompt_details, right

from bettertogether import BootstrapFewShotRS
from bettertogether.steps.demo_fit import DemoFit
from bettertogether.steps.demo_sets import DemoSets
from bettertogether.steps.prompt_capture import render_prompt

SIGNATURE = "number: int, text -> parity"


def example(number: int, text: str) -> dspy.Example:
    return dspy.Example(number=number, text=text, parity=right(number)).with_inputs("number", "text")


def predictor(**options: Any) -> dspy.Predict:
    program = dspy.Predict(SIGNATURE)
    program.set_lm(plain_lm(parity_engine(lambda *_: True, **options)))
    return program


def tokens(program: dspy.Predict, question: dspy.Example, demos: list[Any]) -> int:
    engine = program.lm.engine
    return len(engine.prompt_tokens(render_prompt(program, engine, dict(question.inputs()), demos)))


def fit_of(program: dspy.Predict, examples: list[dspy.Example]) -> DemoFit:
    return DemoFit("self", program, [dict(each.inputs()) for each in examples])


@pytest.mark.parametrize("long", [1, 3, 12])
def test_questions_that_no_prompt_has_room_for_cost_no_demo(long: int) -> None:
    program = predictor(max_length=2000)
    examples = [example(n, "word " * 3000 if n < long else f"text {n}") for n in range(24)]
    fit = fit_of(program, examples)
    demos = [dspy.Example(**each.toDict()) for each in examples[-3:]]
    assert fit.fitting(demos) == demos
    assert fit.passed_over == long
    assert fit.left_out == {}


def test_a_tenth_of_the_questions_may_be_too_long_to_be_asked_beside_a_demo() -> None:
    program = predictor()
    examples = [example(n, "text") for n in range(20)]
    demos = [dspy.Example(**each.toDict()) for each in examples[-3:]]
    program.lm.engine.max_length = tokens(program, examples[0], demos) + 256 + 20
    hog = "word " * 300
    for hogs, kept in ((2, 3), (3, 0)):
        shown = [*(example(n, hog) for n in range(hogs)), *examples[hogs:]]
        assert tokens(program, shown[0], []) < program.lm.engine.max_length
        fit = fit_of(program, shown)
        assert len(fit.fitting(demos)) == kept
        assert fit.passed_over == (hogs if kept else 0)


def test_demos_are_trimmed_to_what_fits_beside_the_longest_question() -> None:
    program = predictor()
    long = example(1, "word " * 50)
    demos = [dspy.Example(**example(n, "text").toDict()) for n in range(5)]
    program.lm.engine.max_length = tokens(program, long, demos[:2]) + 256
    fit = fit_of(program, [long, *(example(n, "text") for n in range(9))])
    assert fit.fitting(demos) == demos[:2]
    assert (fit.passed_over, fit.left_out) == (0, {})


def test_a_demo_that_is_too_long_costs_itself_alone() -> None:
    program = predictor(max_length=1000)
    demos = [dspy.Example(**example(n, "word " * 900 if n == 1 else "text").toDict()) for n in range(3)]
    fit = fit_of(program, [example(n, "text") for n in range(3)])
    assert [demo.number for demo in fit.fitting(demos)] == [0, 2]
    assert fit.left_out == {"too long for the model's context": 1}


@pytest.mark.parametrize("lm", ["local", "api"])
def test_a_demo_with_half_an_emoji_costs_itself_alone(lm: str) -> None:
    program = predictor()
    if lm == "api":
        program.set_lm(api_lm(lambda _: ""))
    examples = [example(n, "half \ud83d" if n == 1 else "text") for n in range(3)]
    fit = fit_of(program, examples)
    demos = [dspy.Example(**each.toDict()) for each in examples]
    assert [demo.number for demo in fit.fitting(demos)] == [0, 2]
    assert fit.left_out == {"its text is not valid Unicode (half of an emoji, for example)": 1}


def test_a_demo_that_can_not_be_saved_costs_itself_alone() -> None:
    program = predictor()
    demos = [dspy.Example(number=n, text=object() if n == 1 else "text", parity="odd") for n in range(3)]
    fit = fit_of(program, [example(n, "text") for n in range(3)])
    assert [demo.number for demo in fit.fitting(demos)] == [0, 2]
    (reason,) = fit.left_out
    assert "field 'text' holds a builtins:object" in reason


def test_a_demo_that_the_engine_refuses_costs_itself_alone() -> None:
    program = predictor()

    class Refusing(type(program.lm.engine)):  # type: ignore[misc]
        def messages(self, request: Any) -> Any:
            found = super().messages(request)
            if "picture" in str(found):
                raise ValueError("no pictures")
            return found

    program.lm.engine.__class__ = Refusing
    demos = [dspy.Example(number=n, text="picture" if n == 1 else "text", parity="odd") for n in range(3)]
    fit = fit_of(program, [example(3, "picture " * 20), example(4, "text")])
    assert [demo.number for demo in fit.fitting(demos)] == [0, 2]
    assert [*map(placeless, fit.left_out.elements())] == ["ValueError: no pictures"]


def test_labelled_examples_that_can_not_be_shown_are_replaced_by_others() -> None:
    program = predictor()
    examples = [example(n, "half \ud83d" if n % 2 else "text") for n in range(12)]
    candidate = DemoSets(program, [], examples).candidate("labels", 0, 4, seed=0)
    assert candidate is not None
    assert [demo.number % 2 for demo in candidate.program.demos] == [0, 0, 0, 0]


def test_the_prompt_step_says_what_it_left_out_and_why(caplog: pytest.LogCaptureFixture) -> None:
    program = dspy.Predict(SIGNATURE)
    program.set_lm(plain_lm(parity_engine(lambda _, number: number not in {*texts, 20}, max_length=2000)))
    texts = {1: "half \ud83d", 2: "word " * 3000}
    trainset = [example(n, texts.get(n, "text")) for n in range(12)]
    step = BootstrapFewShotRS(parity_match, max_errors=5, max_labeled_demos=12, rescue=False, num_samples=0)
    compiled = step.compile(program, trainset=trainset, valset=[example(n, "text") for n in range(20, 28)])
    unicode_reason = "its text is not valid Unicode (half of an emoji, for example)"
    assert prompt_details(step.last).left_out == {
        "self": {
            unicode_reason: 1,
            "too long for the model's context": 1,
            "question too long to be asked beside demos": 1,
        }
    }
    assert f"demos of predictor 'self': 1 x {unicode_reason}; 1 x too long for the model's context" in caplog.text
    assert len([c for c in prompt_details(step.last).candidates if c.demos]) > 0
    assert compiled is not None


def test_nothing_is_said_where_nothing_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    program = dspy.Predict("number: int -> parity")
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    step = BootstrapFewShotRS(parity_match)
    step.compile(program, trainset=numbers(20))
    assert prompt_details(step.last).left_out == {}
    assert "can be demos" not in caplog.text
