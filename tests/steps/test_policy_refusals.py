"""What can't be learned from by rewards, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.experimental import Noul
from fakes import numbers, parity_engine, parity_match, parity_program
from policy_programs import QUICK, SHORT, Pick, Twice, details_of, is_a, program_of, tuned, words

from bettertogether import BetterTogether, PolicyFinetune
from bettertogether.engines import TransformersEngine
from bettertogether.errors import ConfigError, NoTrainingDataError, NotTrainableError
from bettertogether.training.config import LoRAConfig, TrainingConfig


def same(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return 0.5


def test_a_metric_that_gives_all_runs_the_same_is_an_error_after_the_first_draws(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    with pytest.raises(NoTrainingDataError, match=r"12 runs of 2 examples, 6 of each, and all .*rewards: \[0\.5\]"):
        tuned(PolicyFinetune(same, folder=tmp_path, **QUICK), program_of(engine))


@pytest.mark.parametrize("worst", ["w1", "w5"], ids=["of a run to learn from", "of an example held out"])
def test_a_metric_that_gives_less_than_failing_does_is_refused(
    engine: TransformersEngine, tmp_path: Path, worst: str
) -> None:
    def negative(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return -0.25 if example.word == worst else is_a(example, prediction)

    step = PolicyFinetune(negative, folder=tmp_path, **SHORT)
    with pytest.raises(ConfigError, match=r"The metric gave -0\.25, and an example that fails scores 0"):
        tuned(step, program_of(engine))


def test_a_decision_is_refused(engine: TransformersEngine) -> None:
    program = program_of(engine)
    program.signature = dspy.Signature("word: str -> is_a: Noul", custom_types={"Noul": Noul})
    with pytest.raises(NotTrainableError, match=r"\['self'\] make decisions"):
        PolicyFinetune(is_a).trainable(program)


def test_answers_that_can_not_be_read_are_told_by_their_reward(engine: TransformersEngine, tmp_path: Path) -> None:
    with (
        dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)),
        pytest.raises(NoTrainingDataError, match=r"rewards: \[-1\.0\]"),
    ):
        tuned(PolicyFinetune(is_a, folder=tmp_path, **QUICK), program_of(engine))


def test_an_engine_that_can_not_learn_from_rewards_is_refused_before_any_run() -> None:
    engine = parity_engine(lambda *_: True)
    optimizer = BetterTogether(parity_match, r=PolicyFinetune(parity_match))
    with pytest.raises(NotTrainableError, match=r"engine \(FakeEngine\) can't learn from rewards: use local_lm"):
        optimizer.compile(parity_program(engine), trainset=numbers(8), valset=numbers(4), strategy="r", progress=False)
    assert engine.requests == []


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"n": 2}])
def test_an_lm_that_does_not_draw_from_all_it_might_say_is_refused(
    engine: TransformersEngine, option: dict[str, Any]
) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=rf"has {name}={value}: .* Make them without {name}"):
        PolicyFinetune(is_a).trainable(program_of(engine, **option))


class Asking(dspy.Module):
    """Asks with options of its own."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.first = dspy.Predict(Pick)
        self.config = config

    def forward(self, word: str) -> dspy.Prediction:
        return self.first(word=word, config=dict(self.config))


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"n": 2}])
def test_a_call_that_does_not_draw_from_all_it_might_say_is_refused(
    engine: TransformersEngine, tmp_path: Path, option: dict[str, Any]
) -> None:
    ((name, value),) = option.items()
    step = PolicyFinetune(is_a, folder=tmp_path, validation_share=0, **SHORT)
    with pytest.raises(ConfigError, match=rf"A call of predictor 'first' has {name}={value}: .*frozen=\['first'\]"):
        tuned(step, program_of(engine, lambda: Asking(**option)))


def test_a_call_of_a_frozen_predictor_may_be_drawn_as_it_likes(engine: TransformersEngine, tmp_path: Path) -> None:
    class Narrow(Twice):
        def forward(self, word: str) -> dspy.Prediction:
            return self.second(word=self.first(word=word, config={"top_p": 0.9}).letter)

    step = PolicyFinetune(is_a, folder=tmp_path, frozen=["first"], validation_share=0, **SHORT)
    tuned(step, program_of(engine, Narrow))
    assert [line.groups for line in details_of(step).history] == [0, 2, 2]


def test_a_temperature_and_a_seed_of_a_call_do_not_hinder_its_draws(engine: TransformersEngine, tmp_path: Path) -> None:
    step = PolicyFinetune(is_a, folder=tmp_path, validation_share=0, **SHORT)
    tuned(step, program_of(engine, lambda: Asking(temperature=0.0, seed=7)))
    assert [line.kept_groups for line in details_of(step).history] == [0, 1, 2]


def test_a_call_of_an_lm_that_the_program_made_greedy_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    class Greedy(Asking):
        def forward(self, word: str) -> dspy.Prediction:
            return self.first(word=word, lm=self.first.lm.copy(temperature=0.0))

    with pytest.raises(ConfigError, match="A call of predictor 'first' was answered at temperature=0"):
        tuned(PolicyFinetune(is_a, folder=tmp_path, **SHORT), program_of(engine, Greedy))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": None}, "metric"),
        ({"metric": is_a, "policy": {"steps": 3}}, "give a PolicyConfig"),
        ({"metric": is_a, "lora": LoRAConfig(dropout=0.1)}, "Leave dropout out"),
        ({"metric": is_a, "training": TrainingConfig(num_processes=2)}, "leave out num_processes"),
    ],
)
def test_arguments_that_can_not_be_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PolicyFinetune(**options)


def test_a_teacher_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ConfigError, match="teacher= is not allowed"):
        PolicyFinetune(is_a).compile(program_of(engine), trainset=words(4), teacher=program_of(engine))
