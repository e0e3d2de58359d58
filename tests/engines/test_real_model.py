"""The default model, where this machine holds it already: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
import torch
from small_models import generated
from transformers import AutoModelForCausalLM, AutoTokenizer

from bettertogether.engines import TransformersEngine
from bettertogether.lm import engine_lm

FOLDER = os.environ.get("BETTERTOGETHER_TEST_MODEL")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="BETTERTOGETHER_TEST_MODEL names no SmolLM2-135M-Instruct folder"
)

QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one line about the sea.")


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    made = TransformersEngine(Path(FOLDER or ""))
    yield made
    made.close()


def test_greedy_answers_are_those_of_generate(engine: TransformersEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(FOLDER or ""), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(Path(FOLDER or ""))
    lm = engine_lm(engine, max_tokens=24, cache=False)
    answers = dspy.Parallel(num_threads=3, disable_progress_bar=True)([(lambda q=q: lm(q), {}) for q in QUESTIONS])
    for question, (answer,) in zip(QUESTIONS, answers, strict=True):
        prompt_ids = engine.prompt_tokens([{"role": "user", "content": question}])
        expected = generated(model, prompt_ids, 24)
        end = engine.completion_tokens("")[0]
        expected = expected[: expected.index(end)] if end in expected else expected
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_classification_costs_one_pass_after_its_prefix(engine: TransformersEngine) -> None:
    class Topic(dspy.Signature):
        """Name the topic of the sentence."""

        sentence: str = dspy.InputField()
        topic: Literal["sport", "weather", "food"] = dspy.OutputField()

    lm: Any = engine_lm(engine, max_tokens=50, cache=False)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        predict = dspy.Predict(Topic)
        predict(sentence="It rained all day.")
        before = engine.counters()
        assert predict(sentence="The match ended in a draw.").topic in ("sport", "weather", "food")
    after = engine.counters()
    assert after["forward_passes"] - before["forward_passes"] <= 2
    assert after["prefix_tokens_reused"] - before["prefix_tokens_reused"] > 100
