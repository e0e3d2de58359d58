"""From a model of transformers to a GGUF file, which llama.cpp and Ollama run.

gguf has the names of tensors and settings. What else llama.cpp expects of an architecture is as in its
`convert_hf_to_gguf.py`, which is in no package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, LlamaFileType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ModelError
from ..training.layers import head_width
from .gguf_vocabulary import add_vocabulary
from .rendering import PromptRenderer

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}
"""By model type of transformers."""
_PAIRED = ("llama", "mistral", "smollm3")
"""llama.cpp has the two numbers that are rotated together beside one another, transformers half a head apart."""
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Of so many layers the last attends to everything, the others to a window."""
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""The size, in layers, at which llama.cpp scales attention by the width of the model instead of the head's."""
_DTYPES = {
    torch.float32: (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    torch.float16: (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    torch.bfloat16: (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
}


def write_gguf(path: Path, model: Any, tokenizer: Any, renderer: PromptRenderer, name: str) -> None:
    """Write a model with its tokenizer, special tokens and chat template, in the model's own precision.

    `renderer` knows how the model is asked and what ends its answers. Raises ModelError for an architecture, a setting
    or a tokenizer that llama.cpp doesn't have.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is of type {config.model_type!r}, which can't be written as GGUF here. Allowed are "
            f"{', '.join(ARCHITECTURES)}; for others use merge(...) and llama.cpp's convert_hf_to_gguf.py."
        )
    if unknown := _unlike_llama_cpp(config):
        raise ModelError(
            f"{name} has {unknown}: llama.cpp would compute something else than transformers. Serve the folder that "
            "merge(...) writes, or the adapter with vLLM."
        )
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_DTYPES[model.dtype][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, config)
    add_vocabulary(writer, tokenizer, renderer, config.vocab_size)
    for tensor_name, tensor in _tensors(model):
        # numpy has no bfloat16, but its bits may go through it.
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        writer.add_tensor(tensor_name, bits.numpy(), raw_dtype=_DTYPES[tensor.dtype][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _unlike_llama_cpp(config: Any) -> dict[str, Any]:
    """The settings with a value other than those which llama.cpp takes for granted."""
    kind, layers = config.model_type, range(config.num_hidden_layers)
    gelu = ("gelu_pytorch_tanh", "gelu", None)
    fixed: dict[str, Sequence[Any]] = {
        "hidden_act": gelu if kind.startswith("gemma") else ("silu",),
        "hidden_activation": gelu,
        "attention_bias": (True, False) if kind == "llama" else (False, None),
        "use_bidirectional_attention": (False, None),
        "no_rope_layers": (None, [int((layer + 1) % 4 != 0) for layer in layers]),
    }
    if kind in _FULL_ATTENTION_EVERY:
        every, by_width = _FULL_ATTENTION_EVERY[kind], _SCALED_BY_WIDTH[kind] == len(layers)
        kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in layers]
        fixed["layer_types"] = (kinds,)
        width = config.hidden_size // config.num_attention_heads if by_width else head_width(config)
        fixed["query_pre_attn_scalar"] = (width,)
    elif (getattr(config, "sliding_window", None) or config.max_position_embeddings) < config.max_position_embeddings:
        fixed["sliding_window"] = (None,)
    found = {name: getattr(config, name, None) for name in fixed}
    unlike = {name: value for name, value in found.items() if value not in fixed[name]}
    rope_type = _rope(config).get("rope_type", "default")
    return unlike if rope_type in ("default", "linear", "llama3") else {**unlike, "rope_type": rope_type}


def _rope(config: Any) -> Mapping[str, Any]:
    """The rotary parameters, of the layers that attend to everything where there are others."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim, rope = head_width(config), _rope(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in _FULL_ATTENTION_EVERY:
        writer.add_sliding_window(config.sliding_window)
        local = config.rope_parameters.get("sliding_attention", rope)
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by their names in GGUF, laid out as llama.cpp expects them."""
    config = model.config
    kind = config.model_type
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = name.split(".")[-2]
        if kind in _PAIRED and layer in heads:
            tensor = tensor.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).reshape(tensor.shape)
        if tensor.ndim == 1:
            tensor = tensor.float() + (kind.startswith("gemma") and layer.endswith("norm"))
        found = names.get_name(name, (".weight", ".bias"))
        if found is None:
            raise ModelError(f"The weights {name!r} of a {kind!r} model have no name in GGUF, so it can't be written.")
        yield found, tensor.contiguous()
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", rotary_factors(config)


def rotary_factors(config: Any) -> torch.Tensor:
    """By how much each rotary frequency of a Llama 3 is slowed down."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, head_width(config), 2).float() / head_width(config)
    return 1.0 / _rope(config)["rope_theta"] ** exponents / scaled
