"""What can't be trained is refused before the student is scored, and so before there are rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from small_models import save_adapter

from bettertogether import BetterTogether, LoRAFinetune, PolicyFinetune, PreferenceFinetune
from bettertogether.engines import TransformersEngine
from bettertogether.errors import ConfigError
from bettertogether.lm import engine_lm
from bettertogether.training.config import LoRAConfig, TrainingConfig

TRAINSET = [dspy.Example(question=f"word {number}", answer="x").with_inputs("question") for number in range(10)]


def never(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    raise AssertionError("nothing is judged")


def student(engine: TransformersEngine, model: str | None = None) -> dspy.Predict:
    program = dspy.Predict("question -> answer")
    program.set_lm(engine_lm(engine, model))
    return program


@pytest.mark.parametrize("kind", [LoRAFinetune, PreferenceFinetune, PolicyFinetune])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoRAConfig(target_modules="q_projj")}, r"target_modules=\('q_projj',\) can't be used .*'q_proj'"),
        ({"training": TrainingConfig(quantize_base="4bit")}, "quantize_base='4bit' needs a CUDA device"),
    ],
)
def test_a_training_that_can_not_be_is_refused_before_the_student_is_scored(
    engine: TransformersEngine, tmp_path: Path, kind: Any, options: dict[str, Any], message: str
) -> None:
    optimizer = BetterTogether(never, w=kind(never, **options))
    with pytest.raises(ConfigError, match=message):
        optimizer.compile(student(engine), trainset=TRAINSET, strategy="w", run_dir=tmp_path / "run", progress=False)
    assert engine.counters()["requests"] == 0
    assert not (tmp_path / "run").exists()


def test_the_layers_of_an_adapter_that_is_trained_further_are_its_own(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    tuned = student(engine, engine.add_adapter(save_adapter(tmp_path / "a", 1)))
    lora = LoRAConfig(target_modules="q_projj")
    assert [*LoRAFinetune(never, lora=lora, start_from="current").trainable(tuned)] == ["self"]
    with pytest.raises(ConfigError, match="q_projj"):
        LoRAFinetune(never, lora=lora, start_from="base").trainable(tuned)


def test_4_bits_are_not_asked_of_this_process_where_others_train(engine: TransformersEngine) -> None:
    engine.check_training(None, TrainingConfig(quantize_base="4bit", num_processes=2))
