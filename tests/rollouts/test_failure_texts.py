"""What is wrong with an answer or an error, in one line."""

from __future__ import annotations

from typing import Annotated, Any

import dspy
import pydantic
from fakes import plain_lm, reply

from bettertogether.records import Failure
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.failures import error_text, failure_warning
from bettertogether.testing import FakeEngine


def test_an_error_of_several_lines_is_told_in_one_and_ends_with_dots_where_it_is_cut() -> None:
    assert error_text(ValueError("\n  no such table\nin line 3")) == "ValueError: no such table in line 3"
    assert error_text(ValueError("x" * 188)) == f"ValueError: {'x' * 188}"
    assert error_text(ValueError("x" * 189)) == f"ValueError: {'x' * 187}…"


class Order(pydantic.BaseModel):
    product: str
    count: Annotated[int, pydantic.Field(ge=10)]


REFUSED = (
    "1 validation error for Order count Input should be greater than or equal to 10 [type=greater_than_equal, "
    "input_value=3, input_type=int]"
)


def failure_of(adapter: dspy.Adapter, **outputs: Any) -> Failure:
    """How an answer with these fields to "text -> order: Order, note" fails."""
    program = dspy.Predict(dspy.Signature("text -> order: Order, note", custom_types={"Order": Order}))
    program.set_lm(plain_lm(FakeEngine(lambda r: reply(r, **outputs))))
    with dspy.context(adapter=adapter):
        example = dspy.Example(text="three lamps").with_inputs("text")
        (failure,) = evaluate(program, [example], lambda e, p, trace=None: True).failures
    assert failure.kind == "parse failure"
    return failure


def test_an_answer_with_some_of_the_fields_is_told_by_those_that_are_missing() -> None:
    answer = {"order": {"product": "lamp", "count": 30}}
    for adapter in (dspy.JSONAdapter(), dspy.ChatAdapter(use_json_adapter_fallback=False)):
        assert failure_of(adapter, **answer).reason.startswith("note not found in the answer ")


def test_a_value_that_a_type_refuses_is_told_with_the_reason_and_advice_of_its_own() -> None:
    answer = {"order": {"product": "lamp", "count": 3}, "note": "none"}
    failure = failure_of(dspy.JSONAdapter(), **answer)
    assert failure.reason.startswith(f"a value is refused: Failed to parse field order: {REFUSED} in the answer ")
    assert str(failure_warning((failure,), 1, "p")).endswith(
        "(example 0: text='three lamps'). A field's type or validator refuses values: say in the field's description "
        "what is allowed, loosen the type or the validator, or take a larger model."
    )


def test_a_refused_value_that_is_long_does_not_hide_the_reason() -> None:
    answer = {"order": {"product": "lamp" * 100, "count": 3}, "note": "none"}
    reason = failure_of(dspy.ChatAdapter(use_json_adapter_fallback=False), **answer).reason
    told = reason.partition(" in the answer ")[0]
    assert told.startswith("a value is refused: Failed to parse field order with value ")
    assert "…" in told
    assert told.endswith("equal to 10 [type=greater_than_equal, input_value=3, input_type=int]")
