"""A program may have attributes by the names that DSPy's predictors and optimizers' results have."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import Parity, learner, numbers, parity_engine, parity_match, plain_lm

from bettertogether import BetterTogether, BootstrapFewShotRS, CompileReport, evaluate, load, save
from bettertogether.programs.behaviour import program_key
from bettertogether.programs.copies import copy_program
from bettertogether.programs.program import modules_of
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, collect_traces
from bettertogether.rollouts.tries import Sampling

NAMES = ["report", "candidate_programs", "detailed_results", "lm", "train", "traces", "demos", "signature", "stage"]
TRAIN, VAL = numbers(24, start=40), numbers(20)


class Named(dspy.Module):
    """Its only predictor has a name that the library knows of elsewhere."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, dspy.Predict(Parity))

    def forward(self, number: int) -> dspy.Prediction:
        return getattr(self, self.name)(number=number)


class Outer(dspy.Module):
    def __init__(self, inner: dspy.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, number: int) -> dspy.Prediction:
        return self.inner(number=number)


def program(name: str, *, nested: bool = False) -> dspy.Module:
    made = Outer(Named(name)) if nested else Named(name)
    made.set_lm(plain_lm(parity_engine(learner)))
    return made


def compile_(student: dspy.Module, **options: Any) -> dspy.Module:
    p = BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False)
    return BetterTogether(parity_match, p=p).compile(
        student, trainset=TRAIN, valset=VAL, strategy="p", progress=False, **options
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_copies_and_keys_hold_a_predictor_of_any_name(name: str, nested: bool) -> None:
    made = program(name, nested=nested)
    (predictor,) = made.predictors()
    copied = copy_program(made)
    assert copied.predictors()[0] is not predictor
    assert id(predictor) in [id(module) for _, module in modules_of(made)]
    key = program_key(made)
    assert program_key(copied) == key
    copied.predictors()[0].demos = numbers(1)
    assert program_key(copied) != key
    assert predictor.demos == []


@pytest.mark.parametrize("nested", [False, True])
def test_a_program_with_a_report_module_is_compiled_and_not_changed(nested: bool) -> None:
    student = program("report", nested=nested)
    compiled = compile_(student)
    assert student.predictors()[0].demos == []
    assert compiled.predictors()[0].demos != []
    result = evaluate(compiled, VAL, parity_match, progress=False).mean
    assert result > evaluate(student, VAL, parity_match, progress=False).mean
    assert isinstance(getattr(compiled, "report", None), dspy.Module if not nested else CompileReport)


def test_a_report_of_its_own_stays_and_a_warning_says_where_that_of_the_run_is(tmp_path: Any) -> None:
    compiled = compile_(program("report"), run_dir=tmp_path / "run")
    text = (tmp_path / "run" / "report.json").read_text()
    assert "The student has a `report` of its own, which stays" in text
    assert isinstance(compiled.report, dspy.Predict)
    loaded = load(save(compiled, tmp_path / "saved"), into=Named("report"), base_model=compiled.report.lm.engine)
    assert loaded.report.demos == compiled.report.demos


@pytest.mark.parametrize("name", ["core", "lm", "train"])
def test_a_hint_is_seen_in_its_own_run_alone_and_tries_are_sampled_whatever_the_name(name: str) -> None:
    engine = parity_engine(lambda *_: False)
    made = program(name)
    made.set_lm(plain_lm(engine))
    options = ExamplePass(parity_match, settings=RunSettings(num_threads=1))
    collect_traces(made, numbers(6), options, sampling=Sampling(num_samples=2))
    assert max(request.system.count("right final result") for request in engine.requests) == 1
    assert {request.temperature for request in engine.requests} >= {0.0, 0.3, 0.6}
