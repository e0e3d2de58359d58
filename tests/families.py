"""Tiny configs of the model families that transformers has, and how each is answered and trained here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bettertogether.engines.loading import ModelCard, load_model

VOCABULARY = 97
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **IDS,
}
HEAD = {"head_dim": 8}
EQUAL_HEADS = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    **ROUTED, **EQUAL_HEADS, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
CHUNKED = {
    "intermediate_size_mlp": 48, "attention_chunk_size": 16, "moe_layers": [1],
    "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **IDS}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
THREE_N = {
    **HEAD, "laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "altup_num_inputs": 2, "activation_sparsity_pattern": None, "num_kv_shared_layers": 0, **WINDOW,
}  # fmt: skip
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": WINDOW["layer_types"] * 2, "sliding_window": 12}
FOUR = {**HEAD, **WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip

QUANTIZATION: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False},
    "awq": {"bits": 4, "group_size": 32},
    "compressed-tensors": {
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "all": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
    },
}
"""quantization_config of models, by method."""


@dataclass(frozen=True)
class Family:
    """How a family is served and trained: packed, or in padded batches."""

    kind: str
    """transformers' model_type."""
    options: dict[str, Any] = field(default_factory=dict)
    fast: bool = True
    """Answered by the packed decoder."""
    packed: bool = True
    """Trained on packed rows."""
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)

    def config(self) -> PretrainedConfig:
        """A tiny config; skips the test where this transformers has no such family."""
        if self.kind not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {self.kind}")
        return AutoConfig.for_model(self.kind, **{**self.sizes, **self.options})

    def model(self) -> PreTrainedModel:
        """A random model, with weights large enough that every token matters."""
        model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=numbers))
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Quantized(Family):
    """A llama whose linear layers, but for the output's, hold random 4-bit numbers."""

    kind: str = "llama"
    sizes: dict[str, Any] = field(default_factory=lambda: {**SIZES, "hidden_size": 64, "intermediate_size": 64})
    method: str = "gptq"

    def model(self) -> PreTrainedModel:
        """Loaded from files, as quantized models are; skips the test without the package that transformers asks for."""
        package = "compressed_tensors" if self.method == "compressed-tensors" else "gptqmodel"
        pytest.importorskip(package, reason=f"needs {package}")
        numbers, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
        for name, weight in super().model().state_dict().items():
            layer, dot, _ = name.rpartition("_proj.weight")
            if dot:
                parts = quantized_layer(self.method, weight.shape[0], weight.shape[1], numbers)
                tensors |= {f"{layer}_proj.{part}": tensor for part, tensor in parts.items()}
            else:
                tensors[name] = weight.clone()
        config = self.config()
        config.quantization_config = {"quant_method": self.method, **QUANTIZATION[self.method]}
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
            card = ModelCard(folder, config, tokenizer=None, eos_ids=(), max_length=512)
            return load_model(card, torch.device("cpu"), torch.float32)


def quantized_layer(method: str, outputs: int, inputs: int, numbers: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of a linear layer in 4 bits and groups of 32, named and shaped as the method's files have them."""

    def packed(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=numbers).to(torch.int32)

    groups = inputs // 32
    scales = 0.05 * torch.rand(groups, outputs, generator=numbers)
    if method == "compressed-tensors":
        weight = packed(outputs, inputs // 8)
        shape = torch.tensor([outputs, inputs])
        return {"weight_packed": weight, "weight_scale": scales.t().contiguous(), "weight_shape": shape}
    common = {"qzeros": packed(groups, outputs // 8), "scales": scales.half()}
    if method == "awq":
        return {"qweight": packed(inputs, outputs // 8), **common}
    return {"qweight": packed(inputs // 8, outputs), **common, "g_idx": torch.arange(inputs, dtype=torch.int32) // 32}


def _slow(kind: str, options: dict[str, Any], *, packed: bool = False, sizes: dict[str, Any] = SIZES) -> Family:
    return Family(kind, options, fast=False, packed=packed, sizes=sizes)


FAMILIES = {
    "llama": Family("llama"),
    "llama, tied": Family("llama", {"tie_word_embeddings": True}),
    "llama, biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": Family("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": Family("llama", {"rope_parameters": YARN}),
    "llama, dynamic rope": Family("llama", {"rope_parameters": DYNAMIC}),
    "llama, gptq": Quantized(),
    "llama, awq": Quantized(method="awq"),
    "llama, compressed-tensors": Quantized(method="compressed-tensors"),
    "mistral, window": Family("mistral", {"sliding_window": 12}),
    "ministral": Family("ministral", {**HEAD, **WINDOW}),
    "ministral3": Family("ministral3", HEAD),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", HEAD),
    "qwen2_moe": Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("qwen3_moe", {**HEAD, **EXPERTS}),
    "mixtral": Family("mixtral", EXPERTS),
    "olmoe": Family("olmoe", EXPERTS),
    "phimoe": Family("phimoe", EXPERTS),
    "phimoe, window": _slow("phimoe", {**EXPERTS, "sliding_window": 20}),
    "gemma": Family("gemma", HEAD),
    "gemma2": Family(
        "gemma2", {**HEAD, **WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}, packed=False
    ),
    "gemma3": Family("gemma3_text", {**HEAD, **WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3, multimodal": Family(
        "gemma3",
        {"text_config": {**SIZES, **HEAD, **WINDOW, "query_pre_attn_scalar": 8}, "vision_config": TOWER,
         "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, **IDS},
        sizes={},
    ),
    "gemma3n": Family("gemma3n_text", THREE_N),
    "gemma3n, shared keys": Family("gemma3n_text", {**THREE_N, **FOUR_LAYERS, "num_kv_shared_layers": 2}),
    "gemma4": Family("gemma4_text", FOUR),
    "gemma4, shared keys": Family("gemma4_text", {**FOUR, **FOUR_LAYERS, "num_kv_shared_layers": 2}),
    "gemma4, multimodal": Family("gemma4", {"text_config": {**SIZES, **FOUR}}, sizes={}),
    "phi": Family("phi"),
    "phi3": Family("phi3"),
    "phi3, longrope": Family("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "gpt2": Family("gpt2", GPT2, packed=False, sizes={}),
    "gpt2 without dropout": Family("gpt2", {**GPT2, "attn_pdrop": 0.0}, sizes={}),
    "gpt_neo": _slow(
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 12,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512, **IDS},
        sizes={},
    ),
    "gptj": Family("gptj", {**GPT2, "rotary_dim": 4}, sizes={}),
    "gpt_neox": Family("gpt_neox", EQUAL_HEADS),
    "gpt_bigcode": Family("gpt_bigcode", GPT2, packed=False, sizes={}),
    "codegen": Family("codegen", {**GPT2, "rotary_dim": 4}, sizes={}),
    "opt": Family(
        "opt", {**FALCON, "ffn_dim": 48, "max_position_embeddings": 512, "word_embed_proj_dim": 32}, sizes={}
    ),
    "falcon": _slow("falcon", FALCON, sizes={}),
    "falcon, alibi": _slow("falcon", {**FALCON, "alibi": True}, sizes={}),
    "falcon, new decoder": _slow("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, sizes={}),
    "stablelm": _slow("stablelm", {}),
    "starcoder2": Family("starcoder2", {"sliding_window": None}),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", WINDOW),
    "granite": Family("granite"),
    "granitemoe": Family("granitemoe", EXPERTS),
    "granitemoehybrid, attention": Family(
        "granitemoehybrid",
        {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["attention", "attention"]},
    ),
    "granitemoehybrid, mamba": _slow(
        "granitemoehybrid", {**EXPERTS, **MAMBA, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}
    ),
    "granitemoeshared": Family("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 16}),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "gpt_oss": _slow("gpt_oss", {**HEAD, **EXPERTS, **WINDOW}),
    "cohere": Family("cohere"),
    "cohere2": Family("cohere2", {**HEAD, **WINDOW}),
    "deepseek_v2": Family("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": Family("deepseek_v3", {**LATENT, "q_lora_rank": 8}),
    "glm": Family("glm", HEAD),
    "glm4": Family("glm4", HEAD),
    "glm4_moe": Family("glm4_moe", {**HEAD, **ROUTED}),
    "glm4_moe_lite": Family("glm4_moe_lite", {**LATENT, "q_lora_rank": 8}),
    "dots1": Family("dots1", {**HEAD, **ROUTED, "n_shared_experts": 1}),
    "exaone4": Family("exaone4", {**HEAD, **WINDOW}),
    "nemotron": _slow("nemotron", HEAD),
    "ernie4_5": Family("ernie4_5", HEAD),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
         "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", HEAD),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**HEAD, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 16}),
    "seed_oss": Family("seed_oss", HEAD, packed=False),
    "apertus": Family("apertus"),
    "arcee": Family("arcee", HEAD),
    "helium": Family("helium", HEAD),
    "llama4": _slow("llama4_text", {**HEAD, **EXPERTS, **CHUNKED}),
    "llama4, multimodal": _slow("llama4", {"text_config": {**SIZES, **HEAD, **EXPERTS, **CHUNKED}}, sizes={}),
    "lfm2": _slow("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": _slow("lfm2_moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "qwen3_next": _slow("qwen3_next", {**HEAD, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen3_5": _slow("qwen3_5_text", {**HEAD, **LINEAR}),
    "qwen3_5, multimodal": _slow("qwen3_5", {"text_config": {**SIZES, **HEAD, **LINEAR}}, sizes={}),
    "qwen3_5_moe": _slow("qwen3_5_moe_text", {**HEAD, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}),
    "falcon_h1": _slow("falcon_h1", {**HEAD, **MAMBA, "mamba_d_ssm": 64}),
    "jamba": _slow(
        "jamba",
        {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "bamba": _slow("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "zamba2": _slow(
        "zamba2",
        {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16,
         "mamba_ngroups": 1, "num_mem_blocks": 1, "hybrid_layer_ids": [1], "adapter_rank": 4},
    ),
    "nemotron_h": _slow(
        "nemotron_h",
        {**HEAD, "hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
         "n_groups": 1},
    ),
    "recurrent_gemma": _slow(
        "recurrent_gemma",
        {**HEAD, "lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    ),
    "minimax_m2": Family("minimax_m2", {**HEAD, **EXPERTS}),
    "diffllama": _slow("diffllama", {}, packed=True),
    "bitnet": Family("bitnet"),
    "persimmon": Family("persimmon", EQUAL_HEADS),
    "modernbert-decoder": Family(
        "modernbert-decoder", {**EQUAL_HEADS, "local_attention": 16, "global_attn_every_n_layers": 2}
    ),
    "xglm": _slow(
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
         "max_position_embeddings": 512, **IDS},
        sizes={},
    ),
    "biogpt": Family("biogpt", EQUAL_HEADS, packed=False),
    "nanochat": Family("nanochat"),
    "vaultgemma": Family("vaultgemma", {**HEAD, **WINDOW}, packed=False),
    "jetmoe": Family("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cwm": Family("cwm", {**HEAD, **WINDOW}),
    "flex_olmo": Family("flex_olmo", EXPERTS),
}  # fmt: skip

REFUSED = {
    "bloom": "names no max_position_embeddings",
    "mpt": "names no max_position_embeddings",
    "mamba": "names no max_position_embeddings",
    "mamba2": "names no max_position_embeddings",
    "mistral3": "no causal language model",
    "qwen2_5_vl": "no causal language model",
    "qwen3_vl": "no causal language model",
}
"""Families that are refused when a model's card is read, and why."""
