"""`BetterTogether.compile`: arguments, run directories, budgets, and what goes on or starts anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import (
    TwoSteps,
    api_lm,
    learner,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    two_step_engine,
    two_step_program,
    with_lm,
)

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.errors import (
    ConfigError,
    DataError,
    NotTrainableError,
    ProgramError,
    RunDirectoryError,
    StrategyError,
)
from bettertogether.files import cache_folder
from bettertogether.testing import FakeEngine

TRAIN, VAL = numbers(24, start=40), numbers(10)


class Same(Teleprompter):
    """Gives the student back."""

    def __init__(self, option: int = 1) -> None:
        self.option = option

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        return student


def compile_(engine: FakeEngine, optimizers: dict[str, Teleprompter] | None = None, **options: Any) -> dspy.Module:
    arguments: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "strategy": "s", "progress": False} | options
    student = arguments.pop("student", None) or parity_program(engine)
    return BetterTogether(parity_match, **(optimizers or {"s": Same()})).compile(student, **arguments)


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "x"}, StrategyError, "invalid optimizer keys"),
        ({"trainset": "text"}, DataError, "trainset must be a list"),
        ({"trainset": [dspy.Example(number=1)]}, DataError, "does not say which fields are inputs"),
        ({"valset": [dspy.Example(number=1)]}, DataError, r"valset\[0\] does not say"),
        ({"valset_ratio": 2}, DataError, "valset_ratio must be in range"),
        ({"student": TwoSteps()}, ProgramError, r"these have none: \['remark', 'decide'\]"),
        ({"student": with_lm("openai/gpt-4o")}, ProgramError, "Predictor 'self' of the student has a str"),
        ({"student": with_lm(parity_engine(learner))}, ProgramError, "has a FakeEngine for its language model"),
        ({"teacher": TwoSteps()}, ProgramError, "teacher program must have a language model"),
        ({"on_step_error": "ignore"}, ConfigError, 'give "return" or "raise"'),
        ({"max_rounds": 0}, ConfigError, "give a whole number, 1 or more"),
        ({"optimizer_compile_args": {"s": {"nope": 1}}}, ConfigError, r"Same.compile\(\) accepts"),
    ],
)
def test_every_argument_is_checked_before_any_work(
    engine: FakeEngine, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_(engine, run_dir=tmp_path / "run", **options)
    assert engine.requests == []
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_structure_is_an_error(engine: FakeEngine) -> None:
    with pytest.raises(ProgramError, match=r"must have the student's predictors \['self'\], this one has \['decide',"):
        compile_(engine, teacher=two_step_program(two_step_engine(learner)))


def test_a_metric_that_is_no_function_is_an_error() -> None:
    with pytest.raises(ConfigError, match="metric='accuracy' is not allowed: give a function"):
        BetterTogether("accuracy")  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [LoRAFinetune(parity_match), dspy.BootstrapFinetune(metric=parity_match)])
def test_an_lm_that_cannot_be_trained_is_an_error_before_any_work(step: Teleprompter) -> None:
    program = parity_program(parity_engine(learner))
    program.set_lm(lm := api_lm(lambda _: ""))
    with pytest.raises(NotTrainableError, match=r"local/api"):
        compile_(parity_engine(learner), {"s": step}, student=program)
    assert lm.engine.fake.requests == []


def test_dspys_finetuning_under_a_json_adapter_is_an_error_before_any_work(engine: FakeEngine) -> None:
    with (
        dspy.context(adapter=dspy.JSONAdapter()),
        pytest.raises(NotTrainableError, match=r"no training data under a JSONAdapter .*adapter=dspy\.ChatAdapter"),
    ):
        compile_(engine, {"s": dspy.BootstrapFinetune(metric=parity_match)})
    assert engine.requests == []


def test_dspys_finetuning_without_an_adapter_for_an_lm_is_an_error_before_any_work(engine: FakeEngine) -> None:
    step = dspy.BootstrapFinetune(metric=parity_match, adapter={parity_program(engine).lm: dspy.ChatAdapter()})
    with pytest.raises(NotTrainableError, match="adapter= has none for the LM of predictor 'self'"):
        compile_(engine, {"s": step})


def test_an_unused_optimizer_is_not_checked(engine: FakeEngine) -> None:
    program = parity_program(engine)
    program.set_lm(api_lm(lambda _: "no"))
    compiled = compile_(engine, {"s": Same(), "w": LoRAFinetune(parity_match)}, student=program)
    assert compiled.report.rounds[-1].strategy == "s"


def test_without_run_dir_every_call_is_a_new_run_under_the_cache(engine: FakeEngine) -> None:
    for count in (1, 2):
        compile_(engine)
        assert len(list((cache_folder() / "runs").iterdir())) == count


def test_an_unfinished_run_without_run_dir_goes_on_only_where_its_directory_is_named(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="bettertogether"):
        first = compile_(engine, {"s": BootstrapFewShotRS(parity_match)}, budget=Budget(metric_calls=15))
    (folder,) = (cache_folder() / "runs").iterdir()
    assert f"The same call with run_dir={str(folder)!r} goes on with this run." in caplog.text
    used = "The budget is used up: 15 of 15 metric calls."
    on = f"The same call with run_dir={str(folder)!r} and a larger budget goes on after the last finished step."
    assert first.report.warnings[-1] == f"The run ended at 's': BudgetExceeded: {used} {on}"
    assert first.report.rounds[-1].error == f"{used} {on}"
    scored = len(engine.requests)
    again = compile_(engine, {"s": BootstrapFewShotRS(parity_match)}, budget=Budget(metric_calls=15))
    assert again.report.rounds[0].ledger.lm_calls == len(VAL)
    assert len(engine.requests) >= scored + len(VAL)
    engine.requests.clear()
    named = compile_(engine, {"s": BootstrapFewShotRS(parity_match)}, run_dir=folder)
    assert [record.status for record in named.report.rounds] == ["complete", "complete"]
    assert named.report.rounds[0].to_dict() == first.report.rounds[0].to_dict()


def test_a_budget_that_ends_while_the_student_is_scored_returns_the_student(engine: FakeEngine, tmp_path: Path) -> None:
    compiled = compile_(engine, budget=Budget(metric_calls=5), run_dir=tmp_path / "run")
    assert [(r.strategy, r.status, r.score) for r in compiled.report.rounds] == [("", "skipped", None)]
    assert compiled.report.rounds[0].error.startswith("The budget is used up: 5 of 5 metric calls. ")
    assert [(c["strategy"], c["score"]) for c in compiled.candidate_programs] == [("", None)]
    assert "The run ended while the untouched student was scored: The budget is used up" in compiled.report.warnings[-1]
    assert compiled.flag_compilation_error_occurred is False
    whole = compile_(engine, run_dir=tmp_path / "run")
    assert [record.score for record in whole.report.rounds] == [0.4, 0.4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"strategy": "auto"}, "strategy"),
        ({"trainset": numbers(24, start=41)}, "trainset"),
        ({"valset": numbers(9)}, "valset"),
        ({"optimizers": {"s": Same(option=2)}}, "optimizers.s.option"),
        ({"metric": lambda e, p, trace=None: 1.0}, "metric"),
    ],
)
def test_a_run_directory_of_another_call_is_refused_with_what_differs(
    engine: FakeEngine, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    compile_(engine, run_dir=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    options = {"trainset": TRAIN, "valset": VAL, "strategy": "s", "run_dir": tmp_path / "run", **change}
    optimizer = BetterTogether(options.pop("metric", parity_match), **options.pop("optimizers", {"s": Same()}))
    with pytest.raises(RunDirectoryError, match=f"holds another run.*\n.*{named}"):
        optimizer.compile(parity_program(engine), progress=False, **options)
    after = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {p: c for p, c in after.items() if p.name != "lock"} == {p: c for p, c in before.items() if p.name != "lock"}


def test_a_run_directory_of_another_student_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    compile_(engine, run_dir=tmp_path / "run")
    other = parity_program(engine)
    other.signature = other.signature.with_instructions("Other.")
    with pytest.raises(RunDirectoryError, match=r"student\.prompts"):
        compile_(engine, student=other, run_dir=tmp_path / "run")


def test_a_run_directory_in_use_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    class Inner(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            with pytest.raises(RunDirectoryError, match="in use by another run"):
                compile_(engine, run_dir=tmp_path / "run")
            return student

    compiled = compile_(engine, {"s": Inner()}, run_dir=tmp_path / "run")
    assert compiled.flag_compilation_error_occurred is False


def test_run_json_says_what_was_asked(engine: FakeEngine, tmp_path: Path) -> None:
    compile_(engine, {"s": BootstrapFewShotRS(parity_match, num_candidates=3)}, run_dir=tmp_path / "run", seed=4)
    asked = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert (asked["strategy"], asked["seed"]) == ("s", 4)
    assert asked["optimizers"]["s"]["class"] == "BootstrapFewShotRS"
    assert asked["optimizers"]["s"]["num_candidates"] == "3"
    assert asked["student"]["models"] == {"self": "local/fake"}
    assert {"dspy", "bettertogether", "torch"} <= asked["versions"].keys()


def test_an_optimizer_that_was_used_before_asks_the_same_again(engine: FakeEngine, tmp_path: Path) -> None:
    optimizer = BetterTogether(
        parity_match, p=BootstrapFewShotRS(parity_match), f=dspy.BootstrapFewShot(metric=parity_match)
    )
    for _ in range(2):
        compiled = optimizer.compile(
            parity_program(engine),
            trainset=TRAIN,
            valset=VAL,
            strategy="p -> f",
            run_dir=tmp_path / "run",
            progress=False,
        )
        assert compiled.flag_compilation_error_occurred is False


def test_the_report_prints_as_a_table(engine: FakeEngine) -> None:
    text = str(compile_(engine).report)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_progress_is_shown_unless_it_is_turned_off(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    compile_(engine)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_compiled_program_is_optimized_further_when_its_mark_is_taken_off(engine: FakeEngine) -> None:
    first = compile_(engine, {"s": dspy.LabeledFewShot(k=2)})
    with pytest.raises(ProgramError, match="should not be compiled"):
        compile_(engine, student=first)
    first._compiled = False
    second = compile_(engine, student=first)
    assert second.report.rounds[0].program["self"]["demos"]


def test_a_program_with_a_frozen_sub_module_is_compiled_without_touching_it() -> None:
    engine = two_step_engine(learner)

    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_step_program(engine)
            self.check = dspy.Predict("number: int, guess: str -> parity: str")

        def forward(self, number: int) -> dspy.Prediction:
            return self.check(number=number, guess=self.inner(number=number).parity)

    program = Outer()
    program.set_lm(program.inner.decide.lm)
    program.inner._compiled = True
    compiled = BetterTogether(parity_match).compile(
        program, trainset=numbers(24), valset=VAL, strategy="p -> w", progress=False
    )
    assert compiled.report.rounds[-1].status == "complete"
    assert list(compiled.report.rounds[-1].models) == ["check"]
    assert compiled.inner.decide.lm.model == "local/fake"
    assert compiled.inner.decide.demos == []


def test_an_async_only_program_is_compiled() -> None:
    class Async(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict("number: int -> parity: str")

        async def aforward(self, number: int) -> dspy.Prediction:
            return await self.p.acall(number=number)

    engine = parity_engine(learner)
    program = Async()
    program.set_lm(parity_program(engine).lm)
    compiled = BetterTogether(parity_match).compile(
        program, trainset=numbers(24), valset=VAL, strategy="p -> w", progress=False
    )
    assert [record.status for record in compiled.report.rounds] == ["complete"] * 3
    assert compiled.report.rounds[-1].score == 1.0
