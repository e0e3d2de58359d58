"""What is wrong with an answer or an error, in one line."""

from __future__ import annotations

from typing import Annotated, Any

import dspy
import pydantic
import pytest
from dspy import lm15
from fakes import api_lm, learner, numbers, parity_engine, parity_match, parity_program, plain_lm, reply, with_lm

from bettertogether.errors import TooManyErrors
from bettertogether.records import Failure, StepRecord
from bettertogether.report import CompileReport
from bettertogether.report.view import view_of
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


KEY = "The LM's service refuses the key or the account: check the LM's api_key, and the account."
RATE = "The LM's service limits the rate of calls: give the LM a higher num_retries, or take a lower num_threads."
AWAY = (
    "The LM's service failed or was not reached: check it and the LM's api_base, or give the LM a higher num_retries "
    "or a longer timeout."
)
REQUEST = "The LM's service refuses the request: check the model's name and the LM's options."
SERVICE = [
    (lm15.AuthError, KEY),
    (lm15.BillingError, KEY),
    (
        lm15.NotConfiguredError,
        "The LM can't be asked as it is configured: check its api_key, its api_base and the environment.",
    ),
    (lm15.RateLimitError, RATE),
    (lm15.ServerError, AWAY),
    (lm15.TransportError, AWAY),
    (lm15.TimeoutError, "Give the LM a longer timeout, or fewer threads."),
    (lm15.UnsupportedModelError, REQUEST),
]


def refused_by(error: type[Exception]) -> dspy.Predict:
    """A program whose LM's service answers every call with this error."""

    def refuses(request: Any) -> str:
        raise error("no")

    return with_lm(api_lm(refuses, num_retries=0))


@pytest.mark.parametrize(("error", "advice"), SERVICE)
def test_what_an_lms_service_refuses_is_no_fault_of_the_program_or_the_metric(
    error: type[Exception], advice: str
) -> None:
    asked = refused_by(error)

    def judged(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        return bool(asked(number=1))

    for program, metric in ((asked, parity_match), (parity_program(parity_engine(learner)), judged)):
        failures = evaluate(program, numbers(2), metric).failures
        assert str(failure_warning(failures, 2, "p")).endswith(f" (example 0: number=0). {advice}")


def test_a_pass_that_ends_at_max_errors_says_so_too() -> None:
    with pytest.raises(TooManyErrors, match=r"allows\. 2 x program error: LMAuthError: .*\. " + KEY):
        evaluate(refused_by(lm15.AuthError), numbers(4), parity_match, max_errors=1, num_threads=1)


def test_one_example_that_fails_is_told_of_in_the_singular_and_a_reason_that_is_its_kind_once() -> None:
    failures = (Failure("metric returned NaN", 1, "metric returned NaN", "example 0: number=0"),)
    assert str(failure_warning(failures, 1, "p")) == (
        "p: the only example failed, so the result says nothing: 1 x metric returned NaN (example 0: number=0). "
        "Let the metric return a finite number."
    )
    student = StepRecord(0, "", "", "complete", 0.0, (0.0,), failures=failures)
    found = view_of(CompileReport((student,), 0, 1, "p"))
    assert found.examples == "1 validation example"
    assert found.failed == ("student: 1 example failed and scored 0: 1 x metric returned NaN",)
