"""What other processes of `test_kill.py` do: each trains a tiny model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

import dspy
from killed_run import be_alone, tell
from small_models import PACKED, byte_tokenizer, random_model

from bettertogether import BetterTogether, PolicyFinetune, PreferenceFinetune
from bettertogether.callbacks import Callback
from bettertogether.engines import TransformersEngine
from bettertogether.lm import engine_lm
from bettertogether.training.config import LoRAConfig, PolicyConfig, TrainingConfig

POLICY = PolicyConfig(steps=2, examples_per_step=2, group_size=4, most_draws=1)
OPTIONS: dict[str, Any] = {
    "lora": LoRAConfig(rank=4),
    "training": TrainingConfig(
        learning_rate=0.01, warmup_ratio=0.0, scheduler="constant", epochs=2, batch_size=8, dtype="float32"
    ),
}


class Deadly(Callback):
    """Kills the process when a step of the training is told; 0 never is."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def on_training(self, event: Any) -> None:
        if self.last_step and event["progress"].step == self.last_step:
            os.kill(os.getpid(), signal.SIGKILL)


class Pick(dspy.Signature):
    """Pick."""

    word: str = dspy.InputField()
    letter: Literal["a", "b", "c", "d"] = dspy.OutputField()


def is_a(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(prediction.letter == "a")


def run(kind: str, run_dir: Path, last_step: int) -> None:
    """With a "policy" or a "preference" step. When it is done, what it ended with is in RUN_DIR.json: the name of an
    adapter says its weights."""
    be_alone()
    policy = PolicyFinetune(is_a, policy=POLICY, **OPTIONS)
    step = policy if kind == "policy" else PreferenceFinetune(is_a, temperature=1.0, **OPTIONS)
    folder = run_dir.parent / "tiny"
    if not folder.exists():
        random_model(PACKED["llama"], std=0.05).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    program = dspy.Predict(Pick)
    program.set_lm(engine_lm(TransformersEngine(folder), cache=False, max_tokens=40))
    words = [dspy.Example(word=f"w{number}").with_inputs("word") for number in range(6)]
    with dspy.context(adapter=dspy.JSONAdapter()):
        compiled = BetterTogether(is_a, r=step).compile(
            program,
            trainset=words[:4],
            valset=words[4:],
            strategy="r",
            num_threads=4,
            run_dir=run_dir,
            callbacks=[Deadly(last_step)],
            progress=False,
        )
    tell(compiled, run_dir)
