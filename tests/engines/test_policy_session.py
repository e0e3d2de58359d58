"""An engine's model learns from rewards while it answers, and is left as it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request, Response
from small_models import save_model

from bettertogether.engines import TransformersEngine
from bettertogether.engines.answers import SampledAnswer
from bettertogether.engines.protocol import PolicyEngine, PolicySession, RewardedAnswer
from bettertogether.errors import ConfigError, UnknownAdapterError
from bettertogether.testing import FakeEngine
from bettertogether.training.config import LoRAConfig, PolicyConfig, TrainingConfig

LETTERS = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"letter": {"enum": ["a", "b", "c", "d"]}},
        "required": ["letter"],
        "additionalProperties": False,
    },
}
POLICY = PolicyConfig(steps=8)
OPTIONS: dict[str, Any] = {
    "policy": POLICY,
    "lora": LoRAConfig(rank=4),
    "training": TrainingConfig(learning_rate=0.01, warmup_ratio=0.0, dtype="float32"),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TransformersEngine]:
    made = TransformersEngine(save_model(tmp_path / "tiny"))
    yield made
    made.close()


def ask(engine: TransformersEngine, model: str, prompt: str = "Which letter?", **config: Any) -> Response:
    options = {"max_tokens": 40, "response_format": LETTERS, "store": True, **config}
    return engine.complete(Request(model, (Message.user(prompt),), config=Config(**options)))


def sampled(engine: TransformersEngine, session: PolicySession, seed: int, prompt: str = "Which letter?") -> Any:
    response = ask(engine, session.model, prompt, temperature=1.0, seed=seed)
    return response.text, SampledAnswer(**response.provider_data or {})


def step(engine: TransformersEngine, session: PolicySession, number: int, best: str) -> Counter[str]:
    """One step: 12 answers, of which those with one letter are rewarded."""
    answers = [sampled(engine, session, 100 * number + seed) for seed in range(12)]
    rewards = [float(f'"{best}"' in text) for text, _ in answers]
    mean = sum(rewards) / len(rewards)
    session.update([RewardedAnswer(each, reward - mean) for (_, each), reward in zip(answers, rewards, strict=True)])
    return Counter(re.findall(r': "(.)"', " ".join(text for text, _ in answers)))


def base(engine: TransformersEngine) -> str:
    return f"local/{engine.base_name}"


def test_the_engine_of_a_model_can_learn_from_rewards_and_the_fake_one_can_not(engine: TransformersEngine) -> None:
    assert isinstance(engine, PolicyEngine)
    assert not isinstance(FakeEngine(lambda request: ""), PolicyEngine)


def test_a_bandit_learns_the_letter_that_is_rewarded(engine: TransformersEngine, tmp_path: Path) -> None:
    untouched = ask(engine, base(engine)).text
    with engine.policy_session(folder=tmp_path, **OPTIONS) as session:
        counts = [step(engine, session, number, best="a") for number in range(POLICY.steps)]
        during = ask(engine, base(engine)).text
        name, folder = session.finish()
    assert counts[0]["a"] == 0
    assert counts[-1]["a"] == 12
    assert re.findall(r': "(.)"', ask(engine, name).text or "") == ["a"]
    assert (engine.adapter_folder(name), folder.parent) == (folder, tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert untouched == during == ask(engine, base(engine)).text


def test_each_change_of_the_weights_has_a_name_of_its_own_and_nothing_is_written(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    with engine.policy_session(folder=tmp_path / "adapters", **OPTIONS) as session:
        first = session.model
        step(engine, session, 0, best="d")
        assert session.model != first
        assert [path for path in (tmp_path / "adapters").rglob("*") if path.is_file()] == []
        (scratch,) = (tmp_path / "adapters").iterdir()
        assert re.fullmatch(r"\.policy-\w+\.tmp", scratch.name)
        with pytest.raises(UnknownAdapterError):
            engine.adapter_folder(first)
    with pytest.raises(UnknownAdapterError):
        engine.adapter_folder(session.model)
    assert engine.adapter_folders() == []


def test_the_adapter_in_memory_answers_as_the_one_that_is_written(engine: TransformersEngine, tmp_path: Path) -> None:
    with engine.policy_session(folder=tmp_path, **OPTIONS) as session:
        for number in range(2):
            step(engine, session, number, best="d")
        scored = ask(engine, session.model, response_format=None, logprobs=1).logprobs
        name, _ = session.finish()
        assert ask(engine, name, response_format=None, logprobs=1).logprobs == scored


def test_two_sessions_on_one_model_learn_apart(engine: TransformersEngine, tmp_path: Path) -> None:
    with (
        engine.policy_session(folder=tmp_path, **OPTIONS) as one,
        engine.policy_session(folder=tmp_path, **OPTIONS) as other,
    ):
        for number in range(3):
            together = [step(engine, one, number, best="c"), step(engine, other, number, best="d")]
    with engine.policy_session(folder=tmp_path, **OPTIONS) as alone:
        apart = [step(engine, alone, number, best="d") for number in range(3)]
    assert together[1] == apart[-1]
    assert together[0]["c"] > together[1]["c"]


def test_a_session_that_is_loaded_goes_on_as_the_saved_one(engine: TransformersEngine, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    with engine.policy_session(folder=tmp_path, **OPTIONS) as session:
        step(engine, session, 0, best="d")
        session.save(saved, "run")
        step(engine, session, 1, best="c")
        expected = session.model
    with engine.policy_session(folder=tmp_path, **OPTIONS) as session:
        session.load(saved, "run")
        step(engine, session, 1, best="c")
        assert session.model == expected


@pytest.mark.parametrize("training", [TrainingConfig(num_processes=2), TrainingConfig(quantize_base="4bit")])
def test_a_training_in_other_processes_or_on_a_model_of_its_own_is_refused(
    engine: TransformersEngine, training: TrainingConfig
) -> None:
    options = {**OPTIONS, "training": training}
    with pytest.raises(ConfigError, match=r"num_processes|quantize_base"), engine.policy_session(**options):
        pass
