"""Where the trainset is small, the epoch is chosen on examples of the valset, and all of the trainset is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.engines.protocol import TrainingRow
from bettertogether.errors import DataError
from bettertogether.records import WeightDetails
from bettertogether.steps.rows import read_rows
from bettertogether.testing import FakeEngine

VALSET = numbers(40, start=1000)


class Recorded:
    """The numbers that rows ask about, of those trained on and of those held out, in each training of the engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.trained: list[list[int]] = []
        self.held_out: list[list[int]] = []
        self.shown: list[set[int]] = []
        """What the prompts of the rows held out show, demos included."""
        self._finetune = engine.finetune
        engine.finetune = self._record  # type: ignore[assignment, method-assign]

    def _record(self, rows: Sequence[TrainingRow], *, validation_rows: Sequence[TrainingRow], **options: Any) -> Any:
        self.trained.append([asked(row.messages)[-1] for row in rows])
        self.held_out.append([asked(row.messages)[-1] for row in validation_rows])
        self.shown.append({n for row in validation_rows for form in row.forms for n in asked(form)[:-1]})
        return self._finetune(rows, validation_rows=validation_rows, **options)


def asked(messages: Sequence[Any]) -> list[int]:
    """The numbers of the user's turns."""
    turns = [turn["content"] for turn in messages if turn["role"] == "user"]
    return [int(turn.split("[[ ## number ## ]]\n")[1].split("\n")[0]) for turn in turns]


def tuned(train: int, valset: Sequence[dspy.Example] | None = VALSET, **options: Any) -> Recorded:
    recorded = Recorded(parity_engine(lambda *_: True))
    step = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False, **options)
    step.compile(parity_program(recorded.engine), trainset=numbers(train), valset=valset)
    return recorded


def test_all_of_a_small_trainset_is_trained_on_and_sixteen_examples_of_the_valset_are_held_out() -> None:
    recorded = tuned(30)
    assert recorded.trained == [list(range(30))]
    assert len(set(recorded.held_out[0])) == 16
    assert set(recorded.held_out[0]) <= {example.number for example in VALSET}
    assert sum(number % 2 for number in recorded.held_out[0]) == 8


def test_no_prompt_of_a_row_held_out_shows_another_example_of_the_valset() -> None:
    recorded = tuned(30)
    assert recorded.shown[0]
    assert recorded.shown[0] <= set(range(30))


@pytest.mark.parametrize(
    ("train", "valset", "share", "trained", "held_out"),
    [(160, VALSET, 0.1, 144, 16), (40, VALSET[:3], 0.1, 36, 4), (40, None, 0.1, 36, 4), (40, VALSET, 0.0, 40, 0)],
)
def test_a_large_trainset_a_tiny_valset_or_no_share_leave_the_valset_alone(
    train: int, valset: Sequence[dspy.Example] | None, share: float, trained: int, held_out: int
) -> None:
    recorded = tuned(train, valset, validation_share=share)
    assert (len(recorded.trained[0]), len(recorded.held_out[0])) == (trained, held_out)
    assert all(number < train for number in recorded.held_out[0])


def test_where_hardly_an_example_of_the_valset_is_solved_the_trainset_gives_those_held_out() -> None:
    recorded = Recorded(parity_engine(lambda _, number: number < 1000))
    step = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False)
    step.compile(parity_program(recorded.engine), trainset=numbers(40), valset=VALSET)
    assert (len(recorded.trained[0]), len(recorded.held_out[0])) == (36, 4)


def test_a_strategy_gives_its_valset_to_the_weight_step() -> None:
    recorded = Recorded(parity_engine(lambda *_: True))
    optimizer = BetterTogether(
        parity_match, p=BootstrapFewShotRS(parity_match), w=LoRAFinetune(parity_match, num_samples=0, balance=False)
    )
    optimizer.compile(parity_program(recorded.engine), trainset=numbers(30), valset=VALSET, strategy="p -> w")
    assert sorted(recorded.trained[0]) == list(range(30))
    assert set(recorded.held_out[0]) <= {example.number for example in VALSET}


def test_the_file_of_rows_is_of_those_trained_on_and_those_held_out_have_one_of_their_own(tmp_path: Path) -> None:
    recorded = Recorded(parity_engine(lambda *_: True))
    step = LoRAFinetune(parity_match, num_samples=0, rescue=False, validation_share=0.1, folder=tmp_path)
    step.compile(parity_program(recorded.engine), trainset=numbers(30), valset=VALSET)
    assert step.last is not None
    assert isinstance(step.last.details, WeightDetails)
    (adapter,) = step.last.details.adapters.values()
    apart = read_rows(Path(f"{adapter.folder}.held_out.jsonl"))
    assert [asked(row.messages)[-1] for row in apart] == recorded.held_out[0]
    assert {row.example for row in apart} == set(range(30, 46))
    again = LoRAFinetune(parity_match, validation_share=0, folder=tmp_path)
    again.compile(parity_program(recorded.engine), trainset=[], rows=adapter.rows)
    assert recorded.engine.trainings[1] == recorded.engine.trainings[0]


def test_a_valset_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="valset"):
        tuned(30, ["a"])
