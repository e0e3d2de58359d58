"""A key that a service quotes where it refuses it is masked, in whatever form it is and whoever asked."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, parity_engine, parity_match, parity_program, with_lm
from parity_run import TRAIN, VAL

from bettertogether import BetterTogether, BootstrapFewShotRS, evaluate

SAID = "Invalid API key: ***"
ASKS = ("forward", "list", "made")
"""Where a program that asks an LM itself has it from."""


@pytest.fixture
def key() -> str:
    """Another for each test: what is known of one stays so in a process."""
    return uuid.uuid4().hex


class RefusingLM(dspy.BaseLM):
    """Stands for a service that takes no key."""

    def __init__(self, key: str, **options: Any) -> None:
        super().__init__("openai/refuses", cache=False, **(options or {"api_key": key}))
        self._said = f"Invalid API key: {key}"

    def forward(self, *arguments: Any, **options: Any) -> Any:
        raise ValueError(self._said)


class Asks(dspy.Module):
    """Asks an LM itself, which is none of its predictor's."""

    def __init__(self, lm: dspy.BaseLM, held: str) -> None:
        super().__init__()
        self.predict = parity_program(parity_engine(learner))
        self.asked = lm if held == "forward" else None
        self.lms = [lm] if held == "list" else []
        self.made = (lambda: lm.copy()) if held == "made" else None

    def forward(self, number: int) -> Any:
        asked = self.made() if self.made else [*self.lms, self.asked][0]
        return asked("?") or self.predict(number=number)


class Proposes(Teleprompter):
    def __init__(self, lm: dspy.BaseLM) -> None:
        self.lm = lm

    def compile(self, student: dspy.Module, **_: Any) -> Any:
        return self.lm.copy()("?")


def metric_of(lm: dspy.BaseLM) -> Any:
    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> Any:
        return lm("?")

    return metric


@pytest.mark.parametrize("asked_by", ["predictor", *ASKS, "metric", "optimizer"])
def test_it_gets_neither_into_a_file_of_a_run_nor_into_the_log(
    asked_by: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = RefusingLM(key)
    programs = {"predictor": with_lm(lm), **{held: Asks(lm, held) for held in ASKS}}
    metric = metric_of(lm) if asked_by == "metric" else parity_match
    optimizer = Proposes(lm) if asked_by == "optimizer" else BootstrapFewShotRS(metric, num_candidates=1, num_samples=0)
    BetterTogether(metric, p=optimizer).compile(
        programs.get(asked_by, parity_program(parity_engine(learner))),
        trainset=TRAIN,
        valset=VAL,
        strategy="p",
        run_dir=tmp_path,
        max_errors=1_000,
        progress=False,
    )
    texts = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name, text in texts.items() if SAID in text} >= {"records.jsonl", "report.json", "report.html"}
    assert [name for name, text in texts.items() if key in text] == []
    assert SAID in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize("asked_by", ["predictor", *ASKS, "metric"])
def test_it_gets_not_into_the_log_of_an_evaluation(asked_by: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    lm = RefusingLM(key)
    programs = {"predictor": with_lm(lm), **{held: Asks(lm, held) for held in ASKS}}
    program = programs.get(asked_by, parity_program(parity_engine(learner)))
    evaluation = evaluate(program, VAL, metric_of(lm), progress=False, max_errors=1_000)
    assert SAID in str(evaluation.traces[0].reason)
    assert SAID in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize("form", ["{}", "Bearer {}", "Token {}"])
def test_it_is_known_from_a_header(form: str, key: str) -> None:
    program = with_lm(RefusingLM(key, extra_headers={"X-Service": form.format(key)}))
    (trace,) = evaluate(program, VAL[:1], parity_match, progress=False).traces
    assert SAID in str(trace.reason)
