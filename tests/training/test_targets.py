"""Which layers are trained: those that text reaches, that the model really uses, and that can be served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SIZES, tiny_model
from transformers import (
    FalconH1Config,
    Gemma3Config,
    Gemma3nTextConfig,
    GPT2Config,
    MixtralConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from bettertogether.engines.loading import meta_model
from bettertogether.errors import ConfigError
from bettertogether.training.config import LoRAConfig
from bettertogether.training.targets import check_targets, chosen_layers

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
NO_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MIXTRAL = MixtralConfig(**SIZES, **EXPERTS)
PHIMOE = PhimoeConfig(**NO_HEAD_DIM, **EXPERTS)
GEMMA3 = Gemma3Config(text_config=dict(SIZES), vision_config=TOWER)
FALCON_H1 = FalconH1Config(**SIZES, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_expand=2)
QWEN3_MOE = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
GPT2 = GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)


def ends(config: PretrainedConfig, targets: str | tuple[str, ...] = "all-linear") -> list[str]:
    return sorted({name.rpartition(".")[2] for name in chosen_layers(tiny_model(config), targets)})


@pytest.mark.parametrize("config", [MIXTRAL, PHIMOE])
def test_routers_and_stacked_experts_are_left_out(config: PretrainedConfig) -> None:
    assert ends(config) == ATTENTION


def test_dense_layers_whose_names_peft_takes_for_the_experts_are_left_out() -> None:
    assert ends(QWEN3_MOE) == ATTENTION


def test_towers_that_text_never_reaches_are_left_out_by_default_and_by_name() -> None:
    model = tiny_model(GEMMA3)
    chosen = [*chosen_layers(model, "all-linear"), *chosen_layers(model, ("q_proj",))]
    assert len(chosen) == 2 * 7 + 2
    assert all(name.startswith("model.language_model.layers.") for name in chosen)


def test_layers_that_state_space_kernels_bypass_are_left_out() -> None:
    assert "out_proj" not in ends(FALCON_H1)
    assert "in_proj" in ends(FALCON_H1)


def test_layers_that_the_model_bypasses_in_training_are_left_out() -> None:
    options: dict[str, Any] = {"laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    config = Gemma3nTextConfig(
        **SIZES, **options, altup_num_inputs=2, num_kv_shared_layers=0, activation_sparsity_pattern=None
    )
    chosen = ends(config)
    assert "prediction_coefs" in chosen
    assert "correction_coefs" not in chosen


def test_transposed_layers_are_chosen() -> None:
    assert ends(GPT2) == ["c_attn", "c_fc", "c_proj"]


def test_the_output_layer_is_chosen_only_by_name() -> None:
    assert chosen_layers(tiny_model(), ("lm_head",)) == ["lm_head"]
    assert "lm_head" not in chosen_layers(tiny_model(), "all-linear")


def test_a_pattern_chooses_as_in_peft() -> None:
    assert chosen_layers(tiny_model(), r".*\.1\..*\.[qk]_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (None, ("q_proj", "embed_tokens"), r"model\.embed_tokens is no linear layer but Embedding.*'q_proj'"),
        (MIXTRAL, ("q_proj", "w1"), "w1 means experts"),
        (MIXTRAL, ("experts",), r"mlp\.experts is no linear layer but MixtralExperts"),
        (QWEN3_MOE, ("down_proj",), "down_proj means experts"),
        (PHIMOE, ("router",), r"mlp\.router"),
        (FALCON_H1, ("out_proj",), "is bypassed"),
        (GEMMA3, (r"fc1",), "text never reaches model.vision_tower"),
        (None, ("nope",), "no layer has such a name"),
    ],
)
def test_layers_asked_for_that_can_not_be_trained_and_served_are_named(
    config: PretrainedConfig | None, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_layers(tiny_model(config), targets)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (None, ("nope",), r"\(no layer has such a name\): give \"all-linear\" or some of \['down_proj', .*'q_proj'"),
        (None, r".*\.2\..*_proj", "no layer has such a name"),
        (None, ("embed_tokens",), r"model\.embed_tokens is no linear layer but Embedding"),
        (QWEN3_MOE, ("down_proj",), "down_proj means experts"),
    ],
)
def test_what_is_no_layer_to_train_is_known_without_weights(
    config: PretrainedConfig | None, targets: str | tuple[str, ...], message: str
) -> None:
    model = meta_model(tiny_model(config).config)
    with pytest.raises(ConfigError, match=message):
        check_targets(model, targets)
    for fine in ("all-linear", ("q_proj",), r".*\.1\..*_proj"):
        check_targets(model, fine)


def test_a_name_that_is_no_sequence_is_one_name() -> None:
    assert LoRAConfig(target_modules="q_proj") == LoRAConfig(target_modules=("q_proj",))
    assert LoRAConfig(target_modules="layers.1.self_attn.q_proj").target_modules == ("layers.1.self_attn.q_proj",)
    assert LoRAConfig(target_modules=r".*q_proj").target_modules == r".*q_proj"
    assert LoRAConfig(target_modules="all-linear") == LoRAConfig()


def test_the_look_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    model.train()
    chosen_layers(model, "all-linear")
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
