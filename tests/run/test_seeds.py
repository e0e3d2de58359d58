"""A seed that is given to `compile` is that of all steps; without one each step has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, PolicyFinetune, TrainingConfig
from bettertogether.engines.protocol import FinetuneResult
from bettertogether.errors import RunDirectoryError
from bettertogether.steps.step import StepContext
from bettertogether.testing import FakeEngine

RIGHT = parity_engine(lambda *_: True).answer


class Noting(FakeEngine):
    """Notes the seeds of its trainings."""

    seeds: list[int]

    def finetune(self, *args: Any, **options: Any) -> FinetuneResult:
        self.seeds = [*getattr(self, "seeds", []), options["training"].seed]
        return super().finetune(*args, **options)


class Seeded(Teleprompter):
    """An optimizer that notes the seed it is given, and may have one of its own."""

    def __init__(self, seed: int | None) -> None:
        self.seed, self.given = seed, list[int | None]()

    def compile(self, student: dspy.Module, *, trainset: Any, seed: int | None = None) -> dspy.Module:
        self.given.append(seed)
        return student


def compile_(strategy: str, engine: FakeEngine | None = None, **options: Any) -> dspy.Module:
    optimizers = {name: options.pop(name) for name in ("p", "w", "s") if name in options}
    arguments: dict[str, Any] = {"trainset": numbers(30), "valset": numbers(10, start=30), "progress": False} | options
    student = parity_program(engine or FakeEngine(RIGHT))
    return BetterTogether(parity_match, **optimizers).compile(student, strategy=strategy, **arguments)


def found(own: int, **options: Any) -> Any:
    p = BootstrapFewShotRS(parity_match, num_candidates=3, num_samples=0, seed=own)
    compiled = compile_("p", parity_engine(learner), p=p, shuffle_trainset_between_steps=False, **options)
    return compiled.report.rounds[1].details


@pytest.mark.parametrize(("given", "seed"), [(None, 7), (3, 3), (0, 0)])
def test_a_training_has_the_seed_of_its_configuration_unless_one_is_given(given: int | None, seed: int) -> None:
    engine = Noting(RIGHT)
    w = LoRAFinetune(parity_match, training=TrainingConfig(seed=7), num_samples=0, seed=5)
    compile_("w", engine, w=w, seed=given)
    assert engine.seeds == [seed]


def test_a_prompt_step_draws_by_its_own_seed_unless_one_is_given() -> None:
    assert found(1) == found(0, seed=1) != found(0)
    assert found(1, seed=0) == found(0)


@pytest.mark.parametrize(("own", "given", "seen"), [(None, None, [0]), (9, None, [None]), (None, 4, [4]), (9, 4, [4])])
def test_another_optimizer_is_given_0_where_nobody_says_a_seed(
    own: int | None, given: int | None, seen: list[int | None]
) -> None:
    step = Seeded(own)
    compile_("s", s=step, seed=given)
    assert step.given == seen


def test_a_run_without_a_seed_is_another_than_one_with_0(tmp_path: Path) -> None:
    compile_("s", s=Seeded(5), run_dir=tmp_path)
    with pytest.raises(RunDirectoryError, match="seed"):
        compile_("s", s=Seeded(5), run_dir=tmp_path, seed=0)


def test_a_policy_step_trains_by_the_seed_of_its_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Asked(Exception):
        pass

    def sessions(self: Any, starts: Any, training: TrainingConfig, *rest: Any) -> Any:
        raise Asked(training.seed)

    monkeypatch.setattr(PolicyFinetune, "_sessions", sessions)
    monkeypatch.setattr(PolicyFinetune, "trainable", lambda self, student: {})
    step = PolicyFinetune(parity_match, training=TrainingConfig(seed=7), folder=tmp_path)
    with pytest.raises(Asked, match="7"):
        step.run(parity_program(FakeEngine(RIGHT)), StepContext(numbers(30)))
