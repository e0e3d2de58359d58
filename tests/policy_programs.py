"""Programs that learn from rewards, and how their training is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import dspy

from bettertogether import PolicyConfig, PolicyFinetune
from bettertogether.engines import TransformersEngine
from bettertogether.lm import engine_lm
from bettertogether.records import PolicyDetails
from bettertogether.training.config import LoRAConfig, TrainingConfig

POLICY: dict[str, Any] = {"steps": 3, "examples_per_step": 2, "group_size": 6, "most_draws": 1, "score_every": 3}
QUICK: dict[str, Any] = {
    "policy": PolicyConfig(**POLICY),
    "lora": LoRAConfig(rank=4),
    "training": TrainingConfig(learning_rate=0.01, warmup_ratio=0.0, dtype="float32"),
}
FADING = {**QUICK, "policy": PolicyConfig(**{**POLICY, "fade_demos": True})}
SHORT = {**QUICK, "policy": PolicyConfig(**{**POLICY, "steps": 2})}


class Pick(dspy.Signature):
    """Pick."""

    word: str = dspy.InputField()
    letter: Literal["a", "b", "c", "d"] = dspy.OutputField()


class Picks(dspy.Module):
    """Has a predictor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = dspy.Predict(Pick)


class Twice(dspy.Module):
    """A letter, and another one that is picked by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(Pick)
        self.second = dspy.Predict(Pick)

    def forward(self, word: str) -> dspy.Prediction:
        first = self.first(word=word).letter
        return dspy.Prediction(first=first, letter=self.second(word=first).letter)


def words(count: int, start: int = 0) -> list[dspy.Example]:
    return [dspy.Example(word=f"w{number}").with_inputs("word") for number in range(start, start + count)]


def program_of(
    engine: TransformersEngine, kind: Callable[[], dspy.Module] = lambda: dspy.Predict(Pick), **options: Any
) -> dspy.Module:
    program = kind()
    program.set_lm(engine_lm(engine, cache=False, max_tokens=40, **options))
    return program


def is_a(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(prediction.letter == "a")


def tuned(step: PolicyFinetune, program: dspy.Module, **options: Any) -> dspy.Module:
    return step.compile(program, **{"trainset": words(4), "valset": words(4, start=4), **options})


def details_of(step: PolicyFinetune) -> PolicyDetails:
    assert step.last is not None
    assert isinstance(step.last.details, PolicyDetails)
    return step.last.details


def rewards_of(step: PolicyFinetune) -> list[float | None]:
    return [line.reward for line in details_of(step).history]
