"""A saved program's tuned model as GGUF, for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import gguf
import pytest
from gguf_files import byte_level, model_of
from small_models import PACKED, save_adapter, save_model

from bettertogether import local_lm, save, save_gguf
from bettertogether.engines.gguf_model import write_gguf
from bettertogether.engines.rendering import PromptRenderer
from bettertogether.errors import ArtifactError


def saved(tmp_path: Path, kind: str, **options: Any) -> Path:
    base = save_model(tmp_path / "base", PACKED[kind], template="{{ enable_thinking }}" + PLAIN)
    program = dspy.Predict("question -> answer")
    program.set_lm(local_lm(base, adapter=save_adapter(tmp_path / "adapter", seed=1), **options))
    return save(program, tmp_path / "program")


PLAIN = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def test_the_file_is_asked_as_the_program_asks(tmp_path: Path) -> None:
    out = save_gguf(saved(tmp_path, "llama", temperature=0.5, top_p=0.9, top_k=20), tmp_path / "out")
    template = gguf.GGUFReader(str(out / "model.gguf")).get_field("tokenizer.chat_template")
    assert template is not None
    assert template.contents() == "{%- set enable_thinking = false %}{{ enable_thinking }}" + PLAIN
    asked = {"temperature": "0.5", "top_p": "0.9", "top_k": "20"}
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[1:4] == [f"PARAMETER {name} {value}" for name, value in asked.items()]


def test_a_gguf_file_as_base_gives_its_name_and_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))
    base, tokenizer = tmp_path / "tiny.gguf", byte_level(template=PLAIN.replace("<|im_end|>", "<tool>"))
    # transformers reads a GGUF file's tokenizer as one that has this token.
    tokenizer.add_special_tokens({"unk_token": "<|endoftext|>"})
    model, end = model_of("mistral"), tokenizer.get_vocab()["<tool>"]
    model.resize_token_embeddings(len(tokenizer))
    write_gguf(base, model, tokenizer, PromptRenderer(tokenizer, [end], None), "tiny")
    program = dspy.Predict("question -> answer")
    program.set_lm(local_lm(base, adapter=save_adapter(tmp_path / "adapter", seed=1)))
    out = save_gguf(save(program, tmp_path / "program"), tmp_path / "out", base_model=base)
    written = gguf.GGUFReader(str(out / "model.gguf"))
    fields = [written.get_field(name) for name in ("general.name", "tokenizer.ggml.eot_token_id")]
    assert [field and field.contents() for field in fields] == ["tiny", end]


def test_a_model_that_llama_cpp_has_not_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    program = saved(tmp_path, "mistral with a window")
    with pytest.raises(ArtifactError, match=r"can't be merged: base has \{'sliding_window': 24\}: llama.cpp would"):
        save_gguf(program, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "program"]
