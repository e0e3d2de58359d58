"""A wrong option or argument is an error at once that says what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    Budget,
    LoRAConfig,
    LoRAFinetune,
    TrainingConfig,
    stratified_split,
)
from bettertogether.errors import BetterTogetherError, ConfigError, DataError, ProgramError

NAN = float("nan")
SHARED = [
    ("metric", "x"),
    ("threshold", "x"),
    ("threshold", NAN),
    ("threshold", True),
    ("num_threads", "x"),
    ("num_threads", 0),
    ("num_threads", 2.0),
    ("num_threads", True),
    ("max_errors", "x"),
    ("max_errors", -1),
    ("seed", "x"),
    ("seed", 0.5),
    ("num_samples", "x"),
    ("num_samples", True),
    ("temperature", "x"),
    ("temperature", None),
    ("temperature", [1.0, "x"]),
    ("temperature", NAN),
    ("rescue", "yes"),
]
PROMPTS = [
    ("num_candidates", "x"),
    ("max_bootstrapped_demos", -1),
    ("max_bootstrapped_demos", None),
    ("max_labeled_demos", 1.5),
    ("max_labeled_demos", True),
    ("train_size", 0),
    ("val_size", "x"),
    ("restart", 1),
    ("race", None),
]
WEIGHTS = [
    ("branches", -1),
    ("lora", 5),
    ("lora", {"rank": 4}),
    ("lora", None),
    ("training", 5),
    ("training", None),
    ("train_prompt", "x"),
    ("train_prompt", ["vanilla"]),
    ("max_rescue_share", "x"),
    ("max_rescue_share", 2),
    ("max_traces_per_example", "x"),
    ("max_traces_per_example", 0),
    ("sample_passing", 1),
    ("balance", "x"),
    ("label_field", 5),
    ("multitask", "x"),
    ("start_from", 5),
    ("frozen", 5),
    ("frozen", "step"),
    ("frozen", [5]),
    ("validation_share", "x"),
    ("validation_share", -0.1),
    ("folder", 5),
]
LORA = [
    ("rank", 0),
    ("rank", "x"),
    ("rank", True),
    ("alpha", "x"),
    ("alpha", 0),
    ("alpha", NAN),
    ("dropout", None),
    ("dropout", 1),
    ("target_modules", 5),
    ("target_modules", ()),
    ("target_modules", ""),
    ("target_modules", (5,)),
    ("target_modules", "(q_proj"),
    ("target_modules", None),
]
TRAINING = [
    ("learning_rate", "x"),
    ("learning_rate", float("inf")),
    ("learning_rate", 0),
    ("epochs", 1.5),
    ("epochs", "x"),
    ("epochs", 0),
    ("patience", 0),
    ("patience", "auto"),
    ("max_minutes", 0),
    ("max_minutes", "x"),
    ("skeleton_weight", 0),
    ("skeleton_weight", "x"),
    ("form_share", 1.1),
    ("form_share", -0.1),
    ("form_share", None),
    ("epochs", True),
    ("batch_size", "x"),
    ("max_tokens_per_batch", 0),
    ("beta", 0),
    ("nll_weight", -1),
    ("num_processes", None),
    ("accelerate_config", 5),
    ("launch_command", "srun"),
    ("launch_command", ("srun", 2)),
    ("scheduler", 5),
    ("warmup_ratio", "x"),
    ("weight_decay", -1),
    ("max_grad_norm", "x"),
    ("keep_best", "x"),
    ("dtype", 5),
    ("gradient_checkpointing", "x"),
    ("gradient_checkpointing", 1),
    ("quantize_base", "8bit"),
    ("seed", "x"),
    ("seed", -1),
]
CASES = [
    *((BootstrapFewShotRS, *case) for case in [*SHARED, *PROMPTS]),
    *((LoRAFinetune, *case) for case in [*SHARED, *WEIGHTS]),
    *((LoRAConfig, *case) for case in LORA),
    *((TrainingConfig, *case) for case in TRAINING),
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_wrong_option_is_an_error_at_once_that_says_what_is_allowed(kind: Any, name: str, value: Any) -> None:
    options = {"metric": parity_match} if kind in (BootstrapFewShotRS, LoRAFinetune) else {}
    with pytest.raises(ConfigError) as raised:
        kind(**{**options, name: value})
    assert str(raised.value).startswith(f"{name}=")
    assert "is not allowed: give " in str(raised.value)


COMPILE = [
    ({"num_threads": "x"}, ConfigError, "num_threads='x'"),
    ({"max_errors": -1}, ConfigError, "max_errors=-1"),
    ({"seed": "x"}, ConfigError, "seed='x'"),
    ({"teacher": 5}, ProgramError, "teacher must be a dspy.Module"),
    ({"teacher": [5]}, ProgramError, "teacher must be a dspy.Module"),
    ({"teacher": "x"}, ProgramError, "teacher must be a dspy.Module"),
    ({"trainset": 5}, DataError, "trainset must be a list of dspy.Example, got int"),
    ({"trainset": "x"}, DataError, "trainset must be a list of dspy.Example, got str"),
    ({"trainset": [5, 6]}, DataError, r"trainset\[0\] is a int: give a dspy.Example"),
    (
        {"trainset": [dspy.Example(number=1), dspy.Example(number=2)]},
        DataError,
        r"trainset\[0\] does not say which fields",
    ),
    ({"student": 5}, ProgramError, "student must be a dspy.Module, got int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), COMPILE)
@pytest.mark.parametrize("kind", [BootstrapFewShotRS, LoRAFinetune])
def test_a_wrong_argument_of_compile_is_an_error_before_any_call(
    kind: Any, arguments: dict[str, Any], error: type[BetterTogetherError], message: str
) -> None:
    engine = parity_engine(learner)
    given = {"student": parity_program(engine), "trainset": numbers(8), **arguments}
    with pytest.raises(error, match=message):
        kind(parity_match).compile(**given)
    assert engine.requests == []


def test_arguments_of_one_step_alone_are_checked_too() -> None:
    program = parity_program(engine := parity_engine(learner))
    with pytest.raises(DataError, match=r"valset\[1\] is a str: give a dspy.Example"):
        BootstrapFewShotRS(parity_match).compile(program, trainset=numbers(8), valset=[numbers(1)[0], "x"])
    with pytest.raises(ProgramError, match=r"restart_from must be a dspy\.Module, got int"):
        BootstrapFewShotRS(parity_match).compile(program, trainset=numbers(8), restart_from=5)
    with pytest.raises(ConfigError, match="rows=5 is not allowed: give a list of rows, or a file of them"):
        LoRAFinetune(parity_match).compile(program, trainset=numbers(8), rows=5)  # type: ignore[arg-type]
    assert engine.requests == []


def test_a_label_field_that_no_example_has_is_an_error_before_any_call() -> None:
    program = parity_program(engine := parity_engine(learner))
    with pytest.raises(ConfigError, match=r"label_field='nope' is no field of the examples"):
        LoRAFinetune(parity_match, label_field="nope").compile(program, trainset=numbers(8))
    assert engine.requests == []


def test_a_run_with_numbers_of_numpy_is_that_with_pythons(tmp_path: Path) -> None:
    engine = parity_engine(learner)

    def run(whole: Any, real: Any) -> None:
        prompts = {
            "num_candidates": whole(1),
            "max_labeled_demos": whole(2),
            "strengths": (real(0.5),),
            "seed": whole(2),
        }
        training = TrainingConfig(epochs=whole(1), learning_rate=real(0.5), seed=whole(1))
        sampling = {"num_samples": whole(1), "temperature": [real(0.5)], "max_rescue_share": real(0.5)}
        p = BootstrapFewShotRS(parity_match, threshold=real(1), **prompts)
        w = LoRAFinetune(parity_match, training=training, lora=LoRAConfig(rank=whole(4), alpha=real(8)), **sampling)
        arguments = {"seed": whole(3), "valset_ratio": real(0.5), "num_threads": whole(1), "max_rounds": whole(2)}
        BetterTogether(parity_match, p=p, w=w).compile(
            parity_program(engine, max_tokens=whole(50)),
            trainset=numbers(6),
            strategy="p -> w",
            run_dir=tmp_path / "run",
            progress=False,
            two_by_two=False,
            budget=Budget(minutes=real(5), tokens=whole(10**8)),
            **arguments,
        )

    run(np.int64, np.float32)
    calls = len(engine.requests)
    run(int, float)
    assert len(engine.requests) == calls
    assert engine.trainings
    assert len(stratified_split(numbers(8), np.int64(2), np.int64(1))[0]) == 2  # type: ignore[arg-type]
