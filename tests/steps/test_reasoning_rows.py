"""The thoughts of a reasoning model are left out of its rows, or kept in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from dspy.lm15 import Message, Request, Response, TextPart, ThinkingPart
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether import LoRAFinetune
from bettertogether.errors import ConfigError
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


class Reasoner(FakeEngine):
    """Says what it thought in a part of its own."""

    def complete(self, request: Request) -> Response:
        response = super().complete(request)
        message = Message(response.message.role, [ThinkingPart("Hm, hm."), TextPart(response.text)])
        return Response(None, response.model, message, response.finish_reason, response.usage)


def reasoner() -> Any:
    return Reasoner(parity_engine(lambda *_: True).answer)


def completions(**options: Any) -> set[str]:
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, **options)
    collected = optimizer.collect(parity_program(reasoner()), trainset=numbers(4))
    return {re.sub("odd|even", "P", row.completion) for row in collected.rows}


ANSWER = "[[ ## parity ## ]]\nP\n\n[[ ## completed ## ]]\n"


def test_a_call_knows_what_was_thought_before_its_answer() -> None:
    (call,) = Runner(parity_program(reasoner())).run(numbers(1)[0]).calls
    assert call.thoughts == "Hm, hm."


def test_rows_hold_the_answers_alone() -> None:
    assert completions() == {ANSWER}


def test_rows_hold_the_thoughts_too_where_they_are_kept() -> None:
    assert completions(reasoning="keep") == {f"Hm, hm.\n</think>\n\n{ANSWER}"}


@pytest.mark.parametrize("reasoning", ["strip", "keep"])
def test_the_spans_of_a_row_hold_its_values_with_thoughts_and_without(reasoning: Any) -> None:
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, reasoning=reasoning)
    rows = optimizer.collect(parity_program(reasoner()), trainset=numbers(4)).rows
    for row in rows:
        ((name, start, end),) = row.fields
        assert (name, row.completion[start:end]) == ("parity", row.label)
        assert row.completion.startswith("Hm, hm.") == (reasoning == "keep")


def test_another_word_for_what_becomes_of_thoughts_is_an_error() -> None:
    with pytest.raises(ConfigError, match='reasoning=True is not allowed: give "strip" or "keep"'):
        LoRAFinetune(parity_match, reasoning=True)  # type: ignore[arg-type]
