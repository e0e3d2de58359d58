"""The memory plan has the numbers of known models, and says what doesn't fit before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from small_models import PACKED, bank, save_model, tiny_model
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from bettertogether.engines.loading import read_card
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.engines.memory_plan import MemoryPlan, announce_memory
from bettertogether.errors import ModelError
from bettertogether.training import LoRAConfig, TrainingConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def sizes(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


SMOLLM2_135M = LlamaConfig(**sizes(576, 1536, 30, 9, 3, 49_152), tie_word_embeddings=True)
LLAMA_31_8B = LlamaConfig(**sizes(4096, 14_336, 32, 32, 8, 128_256), tie_word_embeddings=False)
QWEN25_7B = Qwen2Config(**sizes(3584, 18_944, 28, 28, 4, 152_064), tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("config", "parameters", "token", "adapter", "papers_adapter"),
    [
        (SMOLLM2_135M, 134_515_008, 23_040, 4_884_480, 1_843_200),
        (LLAMA_31_8B, 8_030_261_248, 131_072, 41_943_040, 13_631_488),
        (QWEN25_7B, 7_615_616_512, 57_344, 40_370_176, 10_092_544),
    ],
    ids=["SmolLM2-135M", "Llama-3.1-8B", "Qwen2.5-7B"],
)
def test_known_models_have_their_numbers(
    config: PretrainedConfig, parameters: int, token: int, adapter: int, papers_adapter: int
) -> None:
    plan = MemoryPlan.of(config, CUDA, torch.bfloat16)
    assert (plan.parameters, plan.weights, plan.token) == (parameters, 2 * parameters, token)
    # Of rank 16 on all linear layers; the paper's has 32 on queries and keys.
    assert plan.adapter_parameters == adapter
    assert MemoryPlan.of(config, CUDA, torch.bfloat16, lora=LoRAConfig.paper()).adapter_parameters == papers_adapter


def test_a_training_takes_the_adapters_state_and_a_pass_of_which_checkpointing_keeps_a_part() -> None:
    def training(checkpointing: bool | str) -> int:
        options = TrainingConfig(gradient_checkpointing=checkpointing, max_tokens_per_batch=1000)  # type: ignore[arg-type]
        return MemoryPlan.of(LLAMA_31_8B, CUDA, torch.bfloat16, training=options).training

    state, layer = 20 * 41_943_040, 14 * 4096 + 6 * 14_336
    assert training(False) == state + 1000 * 2 * 32 * layer
    assert training(True) == training("auto") == state + 1000 * 2 * (32 * 4096 + layer)


@pytest.mark.parametrize("family", [name for name in PACKED if name != "gpt-neox"])
def test_a_token_takes_what_the_decoder_measures(family: str) -> None:
    model = tiny_model(PACKED[family])
    decoder = PackedDecoder(model, bank(model), cache_bytes=1 << 20)
    assert MemoryPlan.of(model.config, CPU, torch.float32).token == decoder._token_bytes


def fake_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))


def announced(caplog: pytest.LogCaptureFixture, folder: Path, device: torch.device, **options: Any) -> Sequence[str]:
    """The levels of what is said."""
    with caplog.at_level(logging.INFO, logger="bettertogether"):
        announce_memory(read_card(folder), device, torch.float32, **options)
    return [record.levelname for record in caplog.records if "memory_plan" in record.name]


@pytest.fixture
def weights(folder: Path) -> int:
    return MemoryPlan.of(AutoConfig.from_pretrained(folder), CPU, torch.float32).weights


def test_what_fits_is_only_logged(
    folder: Path, weights: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_free(monkeypatch, weights + 1000)
    assert announced(caplog, folder, CUDA, cache_bytes=1000) == ["INFO"]
    assert "0.1 million parameters: 0.00 GiB in float32 of 0.00 GiB free on cuda:0" in caplog.text


def test_caches_that_are_sized_by_what_is_free_fit(
    folder: Path, weights: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_free(monkeypatch, weights + (10 << 30))
    assert announced(caplog, folder, CUDA, cache_bytes=None) == ["INFO"]
    assert "Caches take up to 8.00 GiB" in caplog.text


@pytest.mark.parametrize(("device", "short"), [(CUDA, 0), (CPU, 0), (CPU, 2000)])
def test_what_may_not_fit_is_a_warning(
    folder: Path,
    weights: int,
    device: torch.device,
    short: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_free(monkeypatch, weights - short)
    assert announced(caplog, folder, device, cache_bytes=1000) == ["INFO", "WARNING"]
    assert "a smaller cache_bytes, or a smaller model" in caplog.text


def test_weights_that_a_gpu_cannot_hold_are_an_error(
    folder: Path, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_free(monkeypatch, weights - 1)
    with pytest.raises(ModelError, match=r"take 0.00 GiB in float32, and 0.00 GiB of cuda:0 are free. Free memory"):
        announce_memory(read_card(folder), CUDA, torch.float32)


def test_of_a_quantized_model_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantized: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = LlamaConfig(**PACKED["llama"].to_diff_dict(), **quantized)
    fake_free(monkeypatch, 0)
    assert announced(caplog, save_model(tmp_path / "quantized", config), CUDA) == []
