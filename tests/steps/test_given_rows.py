"""Rows that a step is given: which it trains on, which it leaves out, and of which example each is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import (
    learner,
    numbers,
    parity_engine,
    parity_program,
    plain_lm,
    two_step_engine,
    two_step_program,
)
from parity_step import step

from bettertogether.errors import (
    DataError,
    NoTrainingDataError,
)
from bettertogether.records import WeightDetails
from bettertogether.steps.given_rows import given_rows
from bettertogether.steps.rows import NO_EXAMPLE, Row, write_rows
from bettertogether.steps.step import StepContext
from bettertogether.steps.work import Outlook
from bettertogether.training.config import TrainingConfig


def given(predictor: str, number: int, example: int = NO_EXAMPLE) -> Row:
    return Row(({"role": "user", "content": f"{predictor} {number}"},), f"answer {number}", predictor, example)


def test_rows_given_are_trained_on_as_they_are_and_nothing_is_run() -> None:
    engine = parity_engine(lambda *_: True)
    rows = [Row(({"role": "user", "content": f"q{i}"},), f"a{i}", "self", i) for i in range(3)]
    compiled = step().compile(parity_program(engine), trainset=[], rows=rows)
    assert engine.requests == []
    assert engine.trainings == [tuple(row.training_row for row in rows)]
    assert compiled.lm.model != "local/fake"


def test_rows_may_come_from_a_file_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    engine, path = parity_engine(lambda *_: True), "~/rows.jsonl"
    collected = step().collect(parity_program(engine), trainset=numbers(4))
    assert collected.write(path) == tmp_path / "rows.jsonl"
    outlook = Outlook(solved=0.5, again=0.5, hinted=1.0, learned=None)
    work = step().work(parity_program(engine), StepContext([], rows=path), outlook)
    assert (work.plain_runs, work.trainings) == (0, 1)
    from_file = step().compile(parity_program(engine), trainset=[], rows=path)
    from_runs = step().compile(parity_program(engine), trainset=numbers(4))
    assert from_file.lm.model == from_runs.lm.model


def test_of_rows_given_as_many_are_expected_to_be_held_out_as_are() -> None:
    engine = parity_engine(lambda *_: True)
    rows = [given("self", 100 * i + j, i) for i in range(40) for j in range(i + 1)]
    optimizer = step(validation_share=0.1, training=TrainingConfig(epochs=1, seed=3))
    outlook = Outlook(solved=0.5, again=0.5, hinted=1.0, learned=None)
    work = optimizer.work(parity_program(engine), StepContext([], rows=rows), outlook)
    optimizer.compile(parity_program(engine), trainset=[], rows=rows)
    assert work.trained_rows == len(engine.trainings[0])


def test_rows_without_a_predictor_go_to_every_lm_of_a_multitask_run() -> None:
    small, large = two_step_engine(lambda *_: True), two_step_engine(lambda *_: True, base_name="large")
    program = two_step_program(small)
    program.decide.lm = plain_lm(large)
    step().compile(program, trainset=[], rows=[Row(({"role": "user", "content": "q"},), "a", "", -1)])
    assert [len(engine.trainings[0]) for engine in (small, large)] == [1, 1]


def test_rows_given_for_an_unknown_predictor_are_an_error_without_multitask() -> None:
    rows = [Row(({"role": "user", "content": "q"},), "a", "nope", 0)]
    with pytest.raises(DataError, match=r"rows= are for \['nope'\]"):
        step(multitask=False).compile(parity_program(parity_engine(learner)), trainset=[], rows=rows)


def test_no_rows_given_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoTrainingDataError, match="rows= is empty"):
        step().compile(parity_program(parity_engine(learner)), trainset=[], rows=[])
    path = write_rows([], tmp_path / "rows.jsonl")
    with pytest.raises(NoTrainingDataError, match="rows= is empty"):
        step().compile(parity_program(parity_engine(learner)), trainset=[], rows=path)


def test_a_rows_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl"):
        step().compile(parity_program(parity_engine(learner)), trainset=[], rows=tmp_path / "nope.jsonl")


def test_rows_of_a_predictor_that_is_not_trained_are_left_out_and_counted() -> None:
    engine = two_step_engine(lambda *_: True)
    optimizer = step(frozen=["remark"])
    rows = [*(given("decide", i) for i in range(3)), given("remark", 3), given("remark", 4), given("", 5)]
    optimizer.compile(two_step_program(engine), trainset=[], rows=rows)
    assert [row.completion for row in engine.trainings[0]] == ["answer 0", "answer 1", "answer 2", "answer 5"]
    assert optimizer.last is not None
    assert isinstance(optimizer.last.details, WeightDetails)
    assert optimizer.last.details.data_card.dropped_by_predictor == {"remark": 2}
    with pytest.raises(NoTrainingDataError, match=r"all for \['remark'\], which are not trained: .*\['decide'\]"):
        optimizer.compile(two_step_program(engine), trainset=[], rows=rows[3:5])


@pytest.mark.parametrize("multitask", [True, False])
def test_rows_of_a_predictor_that_the_program_has_not_are_an_error(multitask: bool) -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    with pytest.raises(DataError, match=r"rows= are for \['decdie'\]: .* of \['decide', 'remark'\]"):
        step(multitask=multitask).compile(program, trainset=[], rows=[given("decide", 0), given("decdie", 1)])


def test_of_rows_that_name_no_example_each_prompt_is_one_of_its_own(tmp_path: Path) -> None:
    engine, file = parity_engine(lambda *_: True), tmp_path / "rows.jsonl"
    lines = [{"prompt": [{"role": "user", "content": f"q{i // 2}"}], "completion": f"a{i}"} for i in range(80)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    optimizer = step(validation_share=0.1)
    optimizer.compile(parity_program(engine), trainset=[], rows=file)
    trained = {row.messages[0]["content"] for row in engine.trainings[0]}
    assert (len(engine.trainings[0]), len(trained)) == (2 * 36, 36)
    assert optimizer.step_gain == 1.0


def test_of_rows_given_a_share_is_held_out_and_neither_trainset_nor_valset_is_looked_at() -> None:
    engine, rows = parity_engine(lambda *_: True), [given("self", number, number) for number in range(24)]
    optimizer = step(validation_share=0.1)
    optimizer.compile(parity_program(engine), trainset=numbers(30), valset=numbers(20, start=100), rows=rows)
    assert engine.requests == []
    assert len({row.completion for row in engine.trainings[0]} & {row.completion for row in rows}) == 20
    assert len(engine.trainings[0]) == 20
    assert optimizer.step_gain == 1.0


def test_a_row_that_names_no_example_is_of_the_one_that_asks_the_same() -> None:
    numbered = [(0, 9), (0, 7), (0, NO_EXAMPLE), (1, NO_EXAMPLE), (2, 3)]
    rows = [given("self", number, example) for number, example in numbered]
    optimizer, program = step(), parity_program(parity_engine(learner))
    found, left_out = given_rows(optimizer, program, rows, optimizer.trainable(program))
    assert ([row.example for row in found], left_out) == ([9, 7, 7, 10, 3], {})
