"""A GGUF file of Gemma 3, whose conventions differ from Llama's, becomes the model and the tokenizer that it was made
from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from small_models import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from bettertogether.engines.gguf import convert_gguf
from bettertogether.engines.rendering import PromptRenderer
from bettertogether.errors import ModelError

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS = ["\n\n", "\u2581\u2581"]
PIECES = ["ab", "\u2581ab", "\n", "\u2581", *map(chr, range(33, 127))]
TOKENS = [*SPECIAL, *RUNS, *BYTES, *PIECES]
CONFIG = Gemma3TextConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=8, max_position_embeddings=128,
    rms_norm_eps=1e-6, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gemma() -> Any:
    model = random_model(CONFIG)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # Multiples of 1/64, to which one is added and taken away again without rounding.
            parameter.data = torch.randint(-32, 32, parameter.shape) / 64
    return model


def write_gguf(path: Path, model: Any, scaling: Mapping[str, Any] | None = None) -> None:
    writer = gguf.GGUFWriter(str(path), "gemma3")
    for name, value in {
        "block_count": 7, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "head_count": 4,
        "head_count_kv": 1, "key_length": 256, "value_length": 256, "sliding_window": 8, "layer_norm_rms_eps": 1e-6,
        "rope_freq_base": 1e6, "tokenizer_model": "llama", "tokenizer_pre": "default", "token_list": TOKENS,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unk_token_id": 3, "add_bos_token": True,
        "add_space_prefix": False, "chat_template": TEMPLATE,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    for name, value in (scaling or {}).items():
        writer.add_key_value(f"gemma3.rope.scaling.{name}", value, gguf.GGUFValueType.get_type(value))
    writer.add_token_scores([-1000.0] * (len(TOKENS) - len(PIECES)) + [-float(place) for place in range(len(PIECES))])
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.USER_DEFINED] * 2 + [gguf.TokenType.BYTE] * 256
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(PIECES))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy() + 1 if "norm" in name else tensor.numpy()
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            _, layer, part = part.split(".", 2)
            writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", weight)
        else:
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[part] + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma")
    write_gguf(path / "tiny.gguf", gemma())
    convert_gguf(path / "tiny.gguf", path / "converted")
    return path / "converted"


def test_gemmas_weights_are_those_before_the_conversion(folder: Path) -> None:
    expected, loaded = gemma().state_dict(), AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_gemma_computes_the_same_past_its_window(folder: Path) -> None:
    ids_1_T = torch.arange(40)[None] + 100
    with torch.no_grad():
        logits, expected = AutoModelForCausalLM.from_pretrained(folder)(ids_1_T).logits, gemma()(ids_1_T).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab ab", ["ab", "\u2581ab"]),
        (" 12  7", ["\u2581", "1", "2", "\u2581\u2581", "7"]),
        ("a\n\nb\n", ["a", "\n\n", "b", "\n"]),
        ("\u00e9", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_gemmas_tokens_hold_every_space_digit_and_line_break(folder: Path, text: str, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def test_a_prompt_for_gemma_begins_with_one_bos_and_an_answer_ends_with_eos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    renderer = PromptRenderer(tokenizer, [1], None)
    prompt_ids = renderer.prompt_tokens([{"role": "user", "content": "ab <bos>"}])
    assert (prompt_ids[0], prompt_ids.count(2)) == (2, 1)
    assert tokenizer.decode(prompt_ids) == "<bos>### User:\nab <bos>\n\n### Assistant:\n"
    assert renderer.completion_tokens("ab") == [TOKENS.index("ab"), 1]


def test_a_turn_ends_with_the_control_token_that_the_template_writes_after_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert PromptRenderer(tokenizer, [1], None).completion_tokens("ab") == [TOKENS.index("ab"), 5]
    assert tokenizer.decode([TOKENS.index("ab"), 5], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none", "factor": 8.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_positions_are_scaled_as_the_file_says_where_a_layer_attends_to_everything(
    scaling: Mapping[str, Any], expected: Mapping[str, Any], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", gemma(), scaling)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert Gemma3TextConfig.from_pretrained(tmp_path / "converted").rope_parameters == {
        "full_attention": {"rope_theta": 1e6, **expected},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


@pytest.mark.parametrize("scaling", [{"type": "longrope", "factor": 4.0}, {"attn_factor": 1.2}])
def test_a_scaling_of_positions_that_is_not_known_is_refused(scaling: Mapping[str, Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", gemma(), scaling)
    with pytest.raises(ModelError, match=r"^The file's rotary scaling \{.*factor': .* is not known here. Allowed are "):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
