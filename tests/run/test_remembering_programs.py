"""A program that remembers: no run of a compile reaches the program itself, so that its rounds are restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, numbers, parity_engine, parity_match, plain_lm
from parity_run import steps

from bettertogether import BetterTogether
from bettertogether.callbacks import Callback
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine

TRAIN, VAL = numbers(8, start=40), numbers(6)


class Chat(dspy.Module):
    """Shows its predictor the last turns, and keeps all that it was asked in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("number: int, turns: dspy.History -> parity: str")
        self.turns, self.asked, self.known = dspy.History(messages=[]), list[int](), {"odd": [0], "even": [0]}
        self.users = {"one": [dspy.History(messages=[])]}

    def forward(self, number: int) -> dspy.Prediction:
        prediction = self.answer(number=number, turns=self.turns)
        turn = {"number": number, "parity": prediction.parity}
        self.turns.messages.append(turn)
        self.users["one"][0].messages.append(turn)
        self.asked.append(number)
        self.known.setdefault(prediction.parity, []).append(number)
        return prediction

    @property
    def memory(self) -> list[Any]:
        return [self.turns.messages, self.asked, self.known["odd"], self.known["even"], self.users["one"][0].messages]


EMPTY: list[Any] = [[], [], [0], [0], []]


def chat(engine: FakeEngine) -> Chat:
    program = Chat()
    program.set_lm(plain_lm(engine))
    return program


def compiled(engine: FakeEngine, strategy: str, student: Chat | None = None, **options: Any) -> Any:
    optimizer = BetterTogether(parity_match, **steps(**options.pop("optimizers", {})))
    return optimizer.compile(
        student or chat(engine), trainset=TRAIN, valset=VAL, strategy=strategy, progress=False, **options
    )


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


def test_the_runs_of_a_pass_remember_one_another_and_the_program_none_of_them(engine: FakeEngine) -> None:
    program = chat(engine)
    for _ in range(2):
        runner = Runner(program)
        runs = [runner.run(example) for example in numbers(3)]
        assert [len(run.calls[0].inputs["turns"].messages) for run in runs] == [0, 1, 2]
    assert program.memory == EMPTY


def test_neither_the_student_nor_any_round_remembers_a_run(engine: FakeEngine) -> None:
    student = chat(engine)
    best = compiled(engine, "p -> w", student)
    programs = [candidate["program"] for candidate in best.candidate_programs]
    assert [program.memory for program in [student, best, *programs]] == [EMPTY] * 5


def test_the_rounds_of_a_program_that_remembers_are_restored(engine: FakeEngine, tmp_path: Path) -> None:
    first = compiled(engine, "p -> w", run_dir=tmp_path)
    made = len(engine.requests)
    again = compiled(engine, "p -> w", run_dir=tmp_path)
    assert (len(engine.requests), len(engine.trainings)) == (made, 1)
    assert again.report.warnings == first.report.warnings
    assert not any("changed more" in warning for warning in first.report.warnings)


class CutOff(Callback):
    """Interrupts the scoring of the weight step's round."""

    def on_progress(self, event: Any) -> None:
        if event["phase"] == "score w" and event["done"] == 3:
            raise KeyboardInterrupt


def test_a_training_whose_round_was_not_scored_yet_is_kept(engine: FakeEngine, tmp_path: Path) -> None:
    compiled(engine, "w", run_dir=tmp_path, callbacks=[CutOff()])
    assert compiled(engine, "w", run_dir=tmp_path).report.rounds[-1].status == "complete"
    assert len(engine.trainings) == 1


class Asks(Teleprompter):
    """Runs the very program that it was given."""

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        student(**trainset[0].inputs())
        return student


def test_what_a_program_remembers_of_another_optimizers_runs_is_a_change_that_stays(engine: FakeEngine) -> None:
    student = chat(engine)
    options: dict[str, Any] = {"optimizers": {"x": Asks()}}
    best = compiled(engine, "x", student, **options)
    (asked,) = (each["program"] for each in best.candidate_programs if each["strategy"] == "x")
    assert [len(asked.asked), len(asked.turns.messages), student.memory] == [1, 1, EMPTY]
    assert "Round 'x' changed more of the program" in " ".join(best.report.warnings)
