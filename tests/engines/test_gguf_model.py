"""A model written as GGUF is the same model where it is read again, and llama.cpp asks and answers as transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import CONFIGS, RULES, SIZES, WINDOW, byte_level, model_of, sentencepiece, write
from small_models import CHATML, generated, prompts, random_model, save_adapter
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from bettertogether.engines.gguf import convert_gguf
from bettertogether.engines.loading import read_card
from bettertogether.engines.merging import merge_adapter, merge_to_gguf
from bettertogether.engines.ollama import modelfile
from bettertogether.engines.rendering import PromptRenderer
from bettertogether.errors import ModelError

READ_BY_TRANSFORMERS = ("llama", "llama 3", "mistral", "qwen2", "qwen2 scaled", "qwen3", "gemma2", "gemma3")
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One  1 22?"}]


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(str(path)).get_field(name)
    return None if found is None else found.contents()


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_the_weights_and_what_they_compute_come_back_from_the_file(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    write(tmp_path / "tiny.gguf", model, byte_level())
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    for key, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], weight), key
    if name not in ("gemma2", "gemma3"):  # their scale of attention is no setting of GGUF's
        ids_1_T = torch.tensor(prompts(1, 90, 1))
        with torch.no_grad():
            torch.testing.assert_close(found(ids_1_T).logits, model(ids_1_T).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_answers_as_transformers(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is built from source")
    model, prompt_ids = model_of(name), prompts(1, 90, 5)[0]
    write(tmp_path / "tiny.gguf", model, byte_level())
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), n_ctx=256, n_threads=1, verbose=False, **exact)
    found = [token for token, _ in zip(llama.generate(prompt_ids, temp=0.0), range(24), strict=False)]
    llama.close()
    assert found == generated(model, prompt_ids, 24)


@pytest.mark.parametrize("name", RULES)
def test_texts_are_split_by_the_same_rule(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(RULES[name])
    # transformers takes a Qwen's rule from its type.
    write(tmp_path / "tiny.gguf", model_of("qwen2" if name == "qwen2" else "llama 3"), tokenizer)
    assert field(tmp_path / "tiny.gguf", "tokenizer.ggml.pre") == name
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    text = "ab  ab's 1234\n\n a\u00e9 <|im_end|><tool>12"
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")(text).input_ids == tokenizer(text).input_ids


def test_a_sentencepiece_tokenizer_merges_in_the_same_order(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    write(tmp_path / "tiny.gguf", model_of("gemma3"), tokenizer)
    assert field(tmp_path / "tiny.gguf", "tokenizer.ggml.model") == "llama"
    assert field(tmp_path / "tiny.gguf", "tokenizer.ggml.add_space_prefix") is False
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    text = "ab ab  a\n12 \u00e9<eos>"
    found = AutoTokenizer.from_pretrained(tmp_path / "folder")(text, add_special_tokens=False).input_ids
    assert found == tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens_and_the_chat_template_are_in_the_file(tmp_path: Path) -> None:
    thinking = "{% if not enable_thinking %}{{ strftime_now('%d %b') }}{% endif %}" + CHATML
    write(tmp_path / "tiny.gguf", model_of("qwen2"), byte_level(template=thinking))
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "add_bos_token")
    found = [field(tmp_path / "tiny.gguf", f"tokenizer.ggml.{name}") for name in names]
    assert found == [264, 265, 267, 263, False]
    template = field(tmp_path / "tiny.gguf", "tokenizer.chat_template")
    fixed = '{%- set enable_thinking = false %}{% if not enable_thinking %}{{ "26 Jul" }}{% endif %}'
    assert template == fixed + CHATML


def test_an_answer_ends_where_it_did_before_the_file(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", model_of("qwen2"), byte_level())
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    card = read_card(tmp_path / "folder")
    assert card.eos_ids == (265, 267)
    assert PromptRenderer(card.tokenizer, [265], None).end_id == 267


def test_a_model_without_a_template_gets_one_that_writes_the_prompts_it_was_trained_on(tmp_path: Path) -> None:
    renderer = write(tmp_path / "tiny.gguf", model_of("qwen2"), byte_level(template=None))
    tokenizer = byte_level(template=field(tmp_path / "tiny.gguf", "tokenizer.chat_template"))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == renderer.text(CHAT)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPTNeoXConfig(**SIZES), "tiny is of type 'gpt_neox', which can't be written as GGUF here"),
        (MistralConfig(**SIZES, sliding_window=24), r"tiny has \{'sliding_window': 24\}: llama.cpp would compute"),
        (LlamaConfig(**SIZES, hidden_act="relu"), r"tiny has \{'hidden_act': 'relu'\}"),
        (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), r"tiny has \{'attention_bias': True\}"),
        (Gemma3TextConfig(**SIZES, head_dim=16), r"tiny has \{'query_pre_attn_scalar': 256\}"),
        (Gemma2Config(**SIZES, **WINDOW, layer_types=["full_attention"] * 2), r"tiny has \{'layer_types': "),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            r"tiny has \{'rope_type': 'dynamic'\}",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^{said}"):
        write(tmp_path / "tiny.gguf", random_model(config), byte_level())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_splits_by_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"splits texts by \[None, '\{\"type\": \"Whitespace\"\}'\], for which"):
        write(tmp_path / "tiny.gguf", model_of("qwen2"), byte_level(pre_tokenizers.Whitespace()))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**{**SIZES, "vocab_size": 266}))
    with pytest.raises(ModelError, match=r"tokens up to 268 \('<tool>'\), the model embeddings for 266; llama.cpp"):
        write(tmp_path / "tiny.gguf", model, byte_level())


def test_ollama_is_told_to_ask_as_the_engine_does(tmp_path: Path) -> None:
    tokenizer = byte_level()
    renderer = PromptRenderer(tokenizer, [265], None)
    assert modelfile("model.gguf", renderer, tokenizer, 4096, {"temperature": 0.0}) == (
        "FROM ./model.gguf\nPARAMETER temperature 0\nPARAMETER top_p 1\nPARAMETER top_k 0\n"
        "PARAMETER repeat_penalty 1\nPARAMETER num_ctx 4096\n"
        'TEMPLATE """{{ $after := "" }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq $after "system" }}<|im_end|>\n<|im_start|>user\n'
        '{{ else if eq $after "assistant" }}<|im_end|>\n<|im_start|>user\n'
        "{{ else }}<|im_start|>user\n"
        '{{ end }}{{ .Content }}{{ $after = .Role }}{{ end }}<|im_end|>\n<|im_start|>assistant\n"""\n'
    )


def test_a_template_that_ollama_cant_have_is_left_to_it() -> None:
    counting = CHATML.replace("{{ message['content'] }}", "{{ loop.index }} {{ message['content'] }}")
    tokenizer = byte_level(template=counting)
    sampling = {"temperature": 0.5, "top_p": 0.0, "top_k": 20, "seed": 1}
    text = modelfile("model.gguf", PromptRenderer(tokenizer, [265], None), tokenizer, 99999, sampling)
    assert text.splitlines()[1:6] == [
        "PARAMETER temperature 0.5",
        "PARAMETER top_p 0.0",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 8192",
    ]
    assert text.splitlines()[6].startswith("# No TEMPLATE: ")


def test_an_adapter_is_merged_into_the_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    random_model(LlamaConfig(**SIZES)).save_pretrained(base)
    byte_level().save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", seed=1)
    merge_to_gguf(base, adapter, tmp_path / "out", None, {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    convert_gguf(tmp_path / "out" / "model.gguf", tmp_path / "found")
    merge_adapter(base, adapter, tmp_path / "expected")
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("found", "expected"))
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in expected.state_dict().items())
