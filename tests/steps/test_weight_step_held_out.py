"""A share of the examples is held out to choose the epoch; the details, rows and events that a weight step leaves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import TrainingWatch, numbers, parity_engine, parity_program, two_step_engine, two_step_program
from parity_step import step

from bettertogether.callbacks import listening
from bettertogether.engines.protocol import FinetuneResult
from bettertogether.records import WeightDetails
from bettertogether.steps.adapter_rows import hold_out
from bettertogether.steps.rows import Row, read_rows
from bettertogether.testing import FakeEngine
from bettertogether.training.config import TrainingConfig


def held_out(engine: FakeEngine, share: float, count: int = 60, **options: Any) -> tuple[set[str], set[str]]:
    """The prompts trained on, and those held out."""
    seen: dict[str, set[str]] = {}
    original = engine.finetune

    def finetune(rows: Any, *, validation_rows: Any = (), **keywords: Any) -> Any:
        seen["train"] = {str(row.messages) for row in rows}
        seen["held out"] = {str(row.messages) for row in validation_rows}
        return original(rows, validation_rows=validation_rows, **keywords)

    engine.finetune = finetune  # type: ignore[method-assign]
    step(validation_share=share, **options).compile(parity_program(engine), trainset=numbers(count))
    return seen["train"], seen["held out"]


def test_a_share_of_the_examples_is_held_out_to_choose_the_epoch() -> None:
    train, rest = held_out(parity_engine(lambda *_: True), 0.1)
    assert (len(train), len(rest)) == (54, 6)
    assert not train & rest


@pytest.mark.parametrize(("count", "kept", "rest"), [(39, 35, 4), (20, 16, 4), (19, 19, 0)])
def test_of_few_examples_a_larger_share_is_held_out_and_of_too_few_none(count: int, kept: int, rest: int) -> None:
    train, others = held_out(parity_engine(lambda *_: True), 0.1, count=count)
    assert (len(train), len(others)) == (kept, rest)


def test_without_keep_best_none_is_held_out() -> None:
    _, rest = held_out(parity_engine(lambda *_: True), 0.5, training=TrainingConfig(keep_best=False))
    assert rest == set()


def test_the_rows_of_one_example_are_never_on_both_sides() -> None:
    engine = parity_engine(lambda *_: True)
    program_rows = step(train_prompt="mixed")
    program = parity_program(engine)
    program.demos = numbers(1, start=99)
    rows = program_rows.collect(program, trainset=numbers(60)).rows
    assert len(hold_out(rows, share=0, seed=0)[0]) == 120
    train, rest = hold_out(rows, share=0.2, seed=0)
    assert (len(train), len(rest)) == (96, 24)
    assert not {row.example for row in train} & {row.example for row in rest}


def test_of_an_example_that_is_held_out_the_same_row_is_measured_once_and_each_other_prompt_too() -> None:
    asked = [(passage, "yes" if passage == 0 else "no") for passage in range(5)]
    rows = [
        Row(({"role": "user", "content": f"question {example}, passage {passage}"},), answer, "keep", example)
        for example in range(40)
        for passage, answer in (*asked, asked[0])
    ]
    train, rest = hold_out(rows, share=0.1, seed=0)
    assert (len(train), len(rest)) == (36 * 6, 4 * 5)
    assert Counter(row.completion for row in rest) == {"no": 16, "yes": 4}


def test_rows_of_examples_that_ask_the_same_are_held_out_together() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    rows = step().collect(program, trainset=[*numbers(40), *numbers(40)]).rows
    train, rest = hold_out(rows, share=0.25, seed=0)
    assert (len(train), len(rest)) == (60, 10)
    assert not {repr(row.messages) for row in train} & {repr(row.messages) for row in rest}


def test_the_step_gain_is_the_fall_of_the_held_out_loss() -> None:
    optimizer = step(validation_share=0.2)
    optimizer.compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(40))
    assert optimizer.step_gain == 1.0
    without = step()
    without.compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(40))
    assert without.step_gain is None


def test_the_step_gain_is_the_fall_of_the_held_out_error_where_it_is_measured() -> None:
    class Measuring(FakeEngine):
        def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
            result = super().finetune(*args, **options)
            return replace(result, base_validation_loss=1.0, validation_loss=1.5, validation_error=(0.75, 0.25))

    optimizer = step(validation_share=0.2)
    optimizer.compile(parity_program(Measuring(parity_engine(lambda *_: True).answer)), trainset=numbers(40))
    assert optimizer.step_gain == 0.5


def test_the_details_hold_the_data_card_the_adapters_and_the_losses_as_json() -> None:
    optimizer = step(validation_share=0.2)
    compiled = optimizer.compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(40))
    details = json.loads(json.dumps(optimizer.details))
    assert details["data_card"]["examples"] == 40
    adapter = details["adapters"][compiled.lm.model]
    assert (adapter["trained_from"], adapter["row_count"]) == ("local/fake", 32)
    assert adapter["held_out_loss"] == {"before": 2.0, "after": 1.0}
    assert Path(adapter["folder"]).is_dir()
    assert [line["adapter"] for line in details["history"]] == [compiled.lm.model]


def test_the_details_hold_the_losses_of_all_tokens_and_of_each_field() -> None:
    class Measuring(FakeEngine):
        def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
            result = super().finetune(*args, **options)
            return replace(result, all_tokens_loss=(1.0, 0.5), field_losses={"parity": (3.0, None)})

    optimizer = step(validation_share=0.2)
    compiled = optimizer.compile(parity_program(Measuring(parity_engine(lambda *_: True).answer)), trainset=numbers(40))
    adapter = json.loads(json.dumps(optimizer.details))["adapters"][compiled.lm.model]
    assert adapter["held_out_loss"] == {"before": 2.0, "after": 1.0}
    assert adapter["all_tokens_loss"] == {"before": 1.0, "after": 0.5}
    assert adapter["field_losses"] == {"parity": {"before": 3.0, "after": None}}
    assert optimizer.step_gain == 1.0


def test_the_rows_trained_on_are_kept_beside_the_adapter(tmp_path: Path) -> None:
    engine = parity_engine(lambda *_: True)
    optimizer = step(folder=tmp_path)
    compiled = optimizer.compile(parity_program(engine), trainset=numbers(4))
    assert optimizer.last is not None
    assert isinstance(optimizer.last.details, WeightDetails)
    adapter = optimizer.last.details.adapters[compiled.lm.model]
    rows = read_rows(Path(adapter.rows))
    assert Path(adapter.rows).parent == tmp_path
    assert tuple(row.training_row for row in rows) == engine.trainings[0]


def test_the_ledger_counts_runs_and_trained_tokens() -> None:
    engine = parity_engine(lambda *_: True)
    optimizer = step(training=TrainingConfig(epochs=2))
    optimizer.compile(parity_program(engine), trainset=numbers(4))
    rows = engine.trainings[0]
    tokens = sum(len(engine.prompt_tokens(r.messages)) + len(engine.completion_tokens(r.completion)) for r in rows)
    assert optimizer.ledger.trained_tokens == 2 * tokens
    assert optimizer.ledger.metric_calls == 4


def test_training_events_name_the_adapter() -> None:
    watch = TrainingWatch()
    with listening([watch]):
        step(multitask=False).compile(two_step_program(two_step_engine(lambda *_: True)), trainset=numbers(3))
    assert [event["adapter"] for event in watch.events] == ["adapter 1/2", "adapter 2/2"]


@pytest.mark.parametrize(("share", "minutes"), [(0.2, None), (0.0, 10)])
def test_training_events_say_what_may_end_the_training_early(share: float, minutes: float | None) -> None:
    watch = TrainingWatch()
    with listening([watch]):
        train = step(validation_share=share, training=TrainingConfig(max_minutes=minutes))
        train.compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(40))
    (event,) = watch.events
    assert event["may_end_early"] == (share > 0)
    assert event["left_s"] == (None if minutes is None else pytest.approx(60 * minutes, abs=30))


def test_that_max_minutes_ended_a_training_is_a_warning() -> None:
    class OutOfTime(FakeEngine):
        def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
            result = super().finetune(*args, **options)
            last = replace(result.history[-1], step=5, total_steps=200, epoch=1.0)
            return replace(result, history=(last,), out_of_time=True)

    optimizer = step(training=TrainingConfig(max_minutes=0.5))
    optimizer.compile(parity_program(OutOfTime(parity_engine(lambda *_: True).answer)), trainset=numbers(40))
    assert optimizer.warnings == ("Training ended by max_minutes=0.5 after 1 of up to 40 epochs.",)
