"""Precision, checkpointing and the size of a pass follow from the device and what was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import SIZES, tiny_model
from transformers import LlamaConfig

from bettertogether.errors import ConfigError
from bettertogether.training import LoRAConfig, TrainingConfig, precision
from bettertogether.training.precision import checkpoint_gradients, compute_dtype, tokens_in_memory
from bettertogether.training.stepper import ready_to_step


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compute_dtype(tiny_model(), TrainingConfig()) == expected


def test_what_was_asked_for_is_taken_whatever_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compute_dtype(tiny_model(), TrainingConfig(dtype="float32")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert compute_dtype(tiny_model(), TrainingConfig(dtype="bfloat16")) == torch.bfloat16


def test_checkpointing_is_off_by_default_on_the_processor() -> None:
    model = tiny_model()
    checkpoint_gradients(model, TrainingConfig())
    assert not model.is_gradient_checkpointing


def test_checkpointing_of_a_family_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM doesn't support it"):
        checkpoint_gradients(model, TrainingConfig(gradient_checkpointing=True))
    monkeypatch.setattr(precision, "wants_checkpointing", lambda *_: True)
    checkpoint_gradients(model, TrainingConfig(gradient_checkpointing="auto"))
    assert not model.is_gradient_checkpointing


def test_passes_on_the_processor_are_bounded_by_half_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * 10**9))
    config, cpu = LlamaConfig(**SIZES), torch.device("cpu")
    a_token = 2 * (14 * 64 + 6 * 96) * 4
    assert tokens_in_memory(config, cpu, torch.float32) == 10**9 // a_token
    assert tokens_in_memory(config, cpu, torch.bfloat16) == 10**9 // (a_token // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tokens_in_memory(config, cpu, torch.float32) == 10**9 // 2 // a_token


def test_a_pass_has_no_more_tokens_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bettertogether.training.stepper.tokens_in_memory", lambda *_: 60)
    for asked, found in ((50, 50), (70, 60)):
        with ready_to_step(tiny_model(), LoRAConfig(), TrainingConfig(max_tokens_per_batch=asked), None, 40) as stepper:
            assert stepper.max_tokens == found
