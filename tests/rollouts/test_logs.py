"""What DSPy logs in our runs is told once, by us, and what it logs in any other call is left alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import dspy
import pytest
from fakes import ONE, CutEngine, number_of, numbers, parity_match, parity_program, reply, right

from bettertogether import BetterTogether, BootstrapFewShotRS
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.rollout import Attempt
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.names.append(record.name)


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What DSPy logs."""
    handler = Lines()
    logging.getLogger("dspy").addHandler(handler)
    yield handler
    logging.getLogger("dspy").removeHandler(handler)


def cut_engine() -> CutEngine:
    return CutEngine(lambda request: reply(request, parity=right(number_of(request))))


CUT = "answers were cut at max_tokens, also where they read as whole ones: give the LM a larger max_tokens."


def test_answers_that_were_cut_are_counted_in_one_line(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    program = parity_program(cut_engine())
    assert evaluate(program, numbers(6), parity_match, num_threads=2).mean == 1.0
    assert caplog.messages == [f"evaluate: 2 of 6 {CUT}"]
    assert lines.names == []
    program(number=3)
    assert lines.names == ["dspy.clients.lm"]


def test_a_round_says_how_many_answers_were_cut(lines: Lines) -> None:
    p = BootstrapFewShotRS(parity_match, num_candidates=1, num_samples=0)
    compiled = BetterTogether(parity_match, p=p).compile(
        parity_program(cut_engine()), trainset=numbers(6, 40), valset=numbers(20), strategy="p", progress=False
    )
    told = [warning for warning in compiled.report.warnings if "cut at max_tokens" in warning]
    assert told == [f"student: 7 of 20 {CUT}", f"p: 7 of 20 {CUT}"]
    assert lines.names == []


class InParallel(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decide = parity_program(FakeEngine(lambda _: "no"))

    def forward(self, number: int) -> dspy.Prediction:
        example = dspy.Example(number=number).with_inputs("number")
        pool = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return dspy.Prediction(parity=str(pool([(self.decide, example)])))


def test_what_dspy_catches_in_a_further_try_is_not_logged_again(lines: Lines) -> None:
    program = InParallel()
    runner = Runner(program)
    runner.run(ONE)
    assert lines.names == ["dspy.utils.parallelizer"]
    runner.run(ONE, Attempt("sample", 1, 0.5))
    runner.run(ONE, Attempt("rescue", 1, narrow={"parity": "odd"}))
    assert lines.names == ["dspy.utils.parallelizer"]
    program(number=1)
    assert lines.names == ["dspy.utils.parallelizer"] * 2


class Matches(dspy.Module):
    def forward(self, example: dspy.Example, pred: dspy.Prediction) -> bool:
        return bool(example.parity == pred.parity)


def test_of_a_metric_that_is_a_module_no_call_of_forward_is_told(lines: Lines) -> None:
    assert evaluate(parity_program(cut_engine()), numbers(2), Matches()).mean == 1.0
    assert lines.names == []
