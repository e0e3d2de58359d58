"""The seam between the loop and its own steps: what goes in, what comes out, and which `compile` counts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.callback import BaseCallback
from fakes import careful, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.errors import ConfigError
from bettertogether.records import Ledger
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.rollouts.settings import RunSettings
from bettertogether.steps.rows import Row
from bettertogether.steps.step import StepContext, as_step

TRAIN = numbers(20)
KINDS = [BootstrapFewShotRS, LoRAFinetune]


def row(number: int) -> Row:
    return Row(({"role": "user", "content": str(number)},), "odd", "self", number)


@pytest.mark.parametrize("kind", KINDS)
def test_run_gives_what_compile_gives_and_keeps(kind: Any) -> None:
    program, store = parity_program(parity_engine(careful)), RolloutStore()
    optimizer = kind(parity_match)
    result = optimizer.run(program, StepContext(TRAIN, settings=RunSettings(seed=3, store=store)))
    assert (optimizer.last, optimizer.ledger, optimizer.step_gain) == (None, Ledger(), None)
    compiled = optimizer.compile(program, trainset=TRAIN, seed=3, store=RolloutStore())
    assert compiled is optimizer.last.program
    assert (optimizer.ledger, optimizer.details) == (optimizer.last.ledger, asdict(optimizer.last.details))
    assert optimizer.ledger.with_seconds(0) == result.ledger.with_seconds(0)
    assert optimizer.step_gain == result.step_gain


def test_what_a_step_found_is_read_and_not_set() -> None:
    with pytest.raises(AttributeError):
        LoRAFinetune().step_gain = 1.0  # type: ignore[misc]


def test_the_users_own_arguments_for_compile_win_over_the_runs() -> None:
    program, other = parity_program(parity_engine(careful)), parity_program(parity_engine(careful))
    context = StepContext(
        TRAIN, TRAIN[:3], [program], program, folder="a", settings=RunSettings(2, 3, 4, RolloutStore())
    )
    assert context.with_arguments({}) == context
    changed = context.with_arguments(
        {"trainset": TRAIN[:2], "valset": None, "teacher": other, "restart_from": other, "seed": None, "max_errors": 9}
    )
    assert (changed.trainset, changed.valset, changed.teachers) == (TRAIN[:2], None, [other])
    assert changed.restart_from is other
    assert changed.settings == RunSettings(2, 9, None, context.settings.store)
    assert context.with_arguments({"rows": [row(1)], "folder": None}).rows == [row(1)]


def test_rows_given_for_a_weight_step_are_trained_on_as_they_are() -> None:
    engine = parity_engine(careful)
    BetterTogether(parity_match, w=LoRAFinetune(parity_match)).compile(
        parity_program(engine),
        trainset=TRAIN,
        valset=numbers(4),
        strategy="w",
        optimizer_compile_args={"w": {"rows": [row(1), row(2)]}},
        progress=False,
    )
    (training,) = engine.trainings
    assert [each.completion for each in training] == ["odd", "odd"]


def test_wrong_settings_are_an_error_when_they_are_made() -> None:
    with pytest.raises(ConfigError, match="num_threads=0 is not allowed"):
        RunSettings(num_threads=0)
    with pytest.raises(ConfigError, match="store=5 is not allowed"):
        RunSettings(store=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_that_overrides_compile_is_run_by_it_like_any_optimizer(kind: Any) -> None:
    class Counted(kind):
        times = 0

        def compile(self, student: dspy.Module, **arguments: Any) -> dspy.Module:
            Counted.times += 1
            assert sorted(arguments) == ["trainset", "valset"]
            return super().compile(student, trainset=arguments["trainset"])

    class Options(kind):
        """Only other options."""

    assert as_step(Counted(parity_match)) is None
    assert as_step(Options(parity_match)) is not None
    compiled = BetterTogether(parity_match, s=Counted(parity_match)).compile(
        parity_program(parity_engine(careful)), trainset=TRAIN, valset=numbers(4), strategy="s", progress=False
    )
    assert [record.status for record in compiled.report.rounds] == ["complete", "complete"]
    assert Counted.times == 1


def test_a_step_at_work_in_two_threads_gives_each_its_own_result() -> None:
    step, both = LoRAFinetune(parity_match, num_samples=0, rescue=False), threading.Barrier(2)

    class Slow(BaseCallback):
        """As a tracker whose call takes a while."""

        def on_compile_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            both.wait(60)

    def model_of(name: str) -> str:
        program = parity_program(parity_engine(careful, base_name=name))
        with dspy.context(callbacks=[Slow()]):
            result = step.run_seen(program, StepContext(TRAIN, settings=RunSettings(seed=3)))
        return str(result.program.lm.model)

    with ThreadPoolExecutor(2) as pool:
        assert [model.split("@")[0] for model in pool.map(model_of, ["a", "b"])] == ["local/a", "local/b"]


def test_a_subclass_that_overrides_run_is_a_step() -> None:
    class Quiet(LoRAFinetune):
        def run(self, student: dspy.Module, context: StepContext) -> Any:
            return super().run(student, context)

    class Compiled(LoRAFinetune):
        def compile(self, student: dspy.Module, **arguments: Any) -> dspy.Module:
            return student

    class Both(Compiled):
        def run(self, student: dspy.Module, context: StepContext) -> Any:
            return super().run(student, context)

    assert [as_step(kind()) is not None for kind in (Quiet, Compiled, Both)] == [True, False, True]


def test_a_teleprompter_with_a_method_of_the_same_name_is_no_step() -> None:
    class Runs(Teleprompter):
        def run(self) -> None:
            raise AssertionError

    assert as_step(Runs()) is None
