"""An option by another library's name is told ours, whether the class has it or a configuration that it takes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bettertogether import (
    BootstrapFewShotRS,
    LoRAConfig,
    LoRAFinetune,
    PolicyConfig,
    PolicyFinetune,
    PreferenceFinetune,
    TrainingConfig,
)
from bettertogether.errors import ConfigError


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: LoRAConfig(r=8, lora_alpha=16, size=1),  # type: ignore[call-arg]
            "LoRAConfig has no option lora_alpha, r, size. For lora_alpha give alpha=. For r give rank=. "
            "Its options: rank, alpha, dropout, target_modules.",
        ),
        (lambda: TrainingConfig(bf16=True), 'For bf16 give dtype="bfloat16".'),  # type: ignore[call-arg]
        (lambda: LoRAFinetune(metric, exclude_demos=True), 'For exclude_demos give train_prompt="vanilla".'),  # type: ignore[call-arg]
        (lambda: LoRAFinetune(metric, r=8), "For r give lora=LoRAConfig(rank=...)."),  # type: ignore[call-arg]
        (lambda: PreferenceFinetune(metric, epochs=3), "For epochs give training=TrainingConfig(epochs=...)."),  # type: ignore[call-arg]
        (
            lambda: PolicyFinetune(metric, beta=0.1),  # type: ignore[call-arg]
            "no option beta. For beta give policy=PolicyConfig(kl_weight=...). Its options",
        ),
        (
            lambda: BootstrapFewShotRS(metric, num_candidate_programs=8),  # type: ignore[call-arg]
            "For num_candidate_programs give num_candidates=.",
        ),
    ],
)
def test_an_option_that_is_not_known_is_an_error_with_ours(made: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made()
    assert said in str(caught.value)


def test_options_that_are_known_are_taken_as_ever() -> None:
    config = LoRAConfig(8, alpha=16)
    assert (config, config.rank) == (pickle.loads(pickle.dumps(replace(config, dropout=0.0))), 8)
    assert LoRAFinetune(metric, lora=config).lora is config
    assert PolicyConfig(steps=3).steps == 3
