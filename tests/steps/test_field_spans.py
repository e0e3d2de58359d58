"""The place of every output field's value in an answer."""

from __future__ import annotations

import enum
from typing import Any, Literal

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, parity_match, parity_program, predictor_over
from pydantic import BaseModel

from bettertogether.steps.prompt_capture import field_spans, render_completion
from bettertogether.steps.weight_step import LoRAFinetune


class Color(enum.Enum):
    RED = "red"


class Wheel(BaseModel):
    size: int


class Many(dspy.Signature):
    """Several fields, one whose value stands in the name of another."""

    text: str = dspy.InputField()
    reasoning: str = dspy.OutputField()
    answer: str = dspy.OutputField()
    sure: bool = dspy.OutputField()
    share: float = dspy.OutputField()
    color: Color = dspy.OutputField()
    kind: Literal["a", "answer"] = dspy.OutputField()
    counts: list[int] = dspy.OutputField()
    wheel: Wheel = dspy.OutputField()
    note: str | None = dspy.OutputField()


OUTPUTS: dict[str, Any] = {
    "reasoning": 'It is "a", the\nanswer.',
    "answer": "answer",
    "sure": True,
    "share": 0.5,
    "color": Color.RED,
    "kind": "answer",
    "counts": [1, 2],
    "wheel": Wheel(size=3),
    "note": None,
}
TEXTS = {
    "JSONAdapter": {
        "reasoning": '"It is \\"a\\", the\\nanswer."',
        "answer": '"answer"',
        "sure": "true",
        "share": "0.5",
        "color": '"red"',
        "kind": '"answer"',
        "counts": "[\n    1,\n    2\n  ]",
        "wheel": '{\n    "size": 3\n  }',
        "note": "null",
    },
    "ChatAdapter": {
        "reasoning": 'It is "a", the\nanswer.',
        "answer": "answer",
        "sure": "True",
        "share": "0.5",
        "color": "red",
        "kind": "answer",
        "counts": "[1, 2]",
        "wheel": '{"size": 3}',
        "note": "None",
    },
    "XMLAdapter": {
        "reasoning": 'It is "a", the\nanswer.',
        "answer": "answer",
        "sure": "True",
        "share": "0.5",
        "color": "red",
        "kind": "answer",
        "counts": "<item>1</item><item>2</item>",
        "wheel": "<size>3</size>",
        "note": "None",
    },
}


def located(predictor: dspy.Predict, inputs: Any, outputs: Any) -> dict[str, str]:
    completion = render_completion(predictor, inputs, outputs)
    spans = field_spans(predictor, inputs, outputs, completion)
    assert [span.start for span in spans] == sorted(span.start for span in spans)
    return {span.name: completion[span.start : span.end] for span in spans}


def test_a_span_is_the_exact_text_of_its_value(adapter: dspy.Adapter) -> None:
    program = predictor_over(parity_engine(lambda *_: True), Many)
    found = located(program, {"text": "t"}, OUTPUTS)
    expected = TEXTS[type(adapter).__name__]
    assert found == expected
    assert list(found) == list(OUTPUTS)


def test_the_reasoning_and_the_answer_of_a_chain_of_thought_have_spans(adapter: dspy.Adapter) -> None:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(parity_program(parity_engine(lambda *_: True)).lm)
    found = located(program.predict, {"question": "q"}, {"reasoning": "Since so.", "answer": "so"})
    assert {name: text.strip('"') for name, text in found.items()} == {"reasoning": "Since so.", "answer": "so"}


@pytest.mark.parametrize(("make", "answer"), [(dspy.ChatAdapter, ""), (dspy.JSONAdapter, '""')])
def test_an_empty_value_has_a_span_where_its_quotes_are_written(make: Any, answer: str) -> None:
    with dspy.context(adapter=make()):
        program = predictor_over(parity_engine(lambda *_: True), "question -> first, answer")
        found = located(program, {"question": "q"}, {"first": "x", "answer": ""})
    assert found.get("answer", "") == answer


def test_an_answer_in_the_lms_own_words_has_no_spans_where_the_adapter_writes_it_otherwise() -> None:
    program = predictor_over(parity_engine(lambda *_: True), Parity)
    spans = field_spans(program, {"number": 1}, {"parity": "odd"}, "It is\n[[ ## parity ## ]] odd")
    assert spans == ()


def test_an_adapter_that_takes_values_of_the_fields_type_alone_gives_no_span_for_that_field() -> None:
    class Rounds(dspy.ChatAdapter):
        def format_assistant_message_content(
            self, signature: Any, outputs: Any, missing_field_message: Any = None
        ) -> str:
            rounded = {**outputs, "share": f"{outputs['share']:.2f}"}
            return super().format_assistant_message_content(signature, rounded, missing_field_message)

    with dspy.context(adapter=Rounds()):
        program = predictor_over(parity_engine(lambda *_: True), "question -> share: float, answer")
        completion = Rounds().format_assistant_message_content(program.signature, {"share": 0.5, "answer": "x"})
        spans = field_spans(program, {"question": "q"}, {"share": 0.5, "answer": "x"}, completion)
    assert [(span.name, completion[span.start : span.end]) for span in spans] == [("answer", "x")]


def test_a_rows_response_format_is_what_the_engine_was_asked_for(adapter: dspy.Adapter) -> None:
    engine = parity_engine(lambda *_: True)
    rows = LoRAFinetune(parity_match, num_samples=0).collect(parity_program(engine), trainset=numbers(4)).rows
    sent = {repr(request.schema) for request in engine.requests}
    assert {repr((row.response_format or {}).get("schema")) for row in rows} == sent
    assert (rows[0].response_format is not None) == isinstance(adapter, dspy.JSONAdapter)
