"""Which demos a row's prompt shows, and which calls give no row."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, parity_match, predictor_over
from tries import call_rows

from bettertogether.errors import DataError
from bettertogether.rollouts.rollout import Call
from bettertogether.steps.demo_examples import without_example
from bettertogether.steps.prompt_capture import render_completion, render_prompt
from bettertogether.steps.rows_from_traces import TrainPrompt, prompt_variants
from bettertogether.steps.weight_step import LoRAFinetune


def call(number: int) -> Call:
    return Call("self", {"number": number}, {"parity": "odd" if number % 2 else "even"})


def test_vanilla_shows_no_demos_optimized_all_and_mixed_both() -> None:
    engine = parity_engine(lambda *_: True)
    program = predictor_over(engine, Parity, numbers(2))
    kinds: list[TrainPrompt] = ["vanilla", "optimized", "mixed"]
    rows = {kind: [*call_rows(program, engine, call(5), kind)] for kind in kinds}
    assert {kind: [len(row.messages) for row in found] for kind, found in rows.items()} == {
        "vanilla": [2],
        "optimized": [6],
        "mixed": [2, 6],
    }
    assert rows["mixed"] == rows["vanilla"] + rows["optimized"]


def test_mixed_without_demos_is_one_row() -> None:
    predictor = predictor_over(parity_engine(lambda *_: True), Parity)
    assert prompt_variants(predictor, call(5), "mixed", numbers(1)[0]) == [[]]


def test_a_demo_of_the_very_example_is_left_out_of_its_row() -> None:
    demos = numbers(3)
    assert without_example(demos, {"number": 1}) == [demos[0], demos[2]]


def test_a_row_longer_than_the_context_is_dropped_and_never_cut() -> None:
    engine = parity_engine(lambda *_: True)
    program = predictor_over(engine, Parity)
    prompt = len(engine.prompt_tokens(render_prompt(program, engine, {"number": 1}, [])))
    answer = len(engine.completion_tokens(render_completion(program, {"number": 1}, {"parity": "odd"})))
    engine.max_length = prompt + answer
    (row,) = call_rows(program, engine, call(1))
    program.demos = numbers(2)
    mixed = call_rows(program, engine, call(1), "mixed")
    assert next(mixed) == row
    with pytest.raises(DataError, match=f"longer than the model's context of {prompt + answer} tokens"):
        next(mixed)
    engine.max_length -= 1
    with pytest.raises(DataError, match=f"longer than the model's context of {prompt + answer - 1} tokens"):
        next(call_rows(program, engine, call(1)))


def test_the_zero_shot_row_of_a_call_stays_where_the_one_with_demos_is_too_long() -> None:
    engine = parity_engine(lambda *_: True)
    program = predictor_over(engine, Parity)
    longest = max(len(engine.prompt_tokens(render_prompt(program, engine, {"number": n}, []))) for n in range(4))
    engine.max_length = longest + len(
        engine.completion_tokens(render_completion(program, {"number": 0}, {"parity": "even"}))
    )
    program.demos = numbers(2, start=100)
    optimizer = LoRAFinetune(parity_match, train_prompt="mixed", validation_share=0)
    found = optimizer.collect(program, trainset=numbers(4))
    assert [len(row.messages) for row in found.rows] == [2] * 4
    assert found.card.dropped_by_reason == {f"longer than the model's context of {engine.max_length} tokens": 4}


def test_rows_of_a_compiled_program_equal_what_it_sends_for_every_train_prompt(adapter: dspy.Adapter) -> None:
    for kind in ("vanilla", "optimized", "mixed"):
        engine = parity_engine(lambda *_: True)
        program = predictor_over(engine, Parity, numbers(2, start=100))
        optimizer = LoRAFinetune(parity_match, train_prompt=kind, validation_share=0)
        compiled = optimizer.compile(program, trainset=numbers(4))
        trained = {row.messages for row in map(_hashable, engine.trainings[0])}
        engine.requests.clear()
        for example in numbers(4):
            compiled(**example.inputs())
        sent = {_hashable(request).messages for request in engine.requests}
        assert sent <= trained
        assert all(request.learned is not None for request in engine.requests)


class _Messages:
    def __init__(self, messages: tuple[tuple[str, str], ...]) -> None:
        self.messages = messages


def _hashable(item: Any) -> _Messages:
    return _Messages(tuple((message["role"], message["content"]) for message in item.messages))
