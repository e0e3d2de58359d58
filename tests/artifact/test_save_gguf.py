"""A saved program's tuned model as GGUF, for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import gguf
import pytest
from small_models import PACKED, save_adapter, save_model

from bettertogether import local_lm, save, save_gguf
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


def test_a_model_that_llama_cpp_has_not_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    program = saved(tmp_path, "mistral with a window")
    with pytest.raises(ArtifactError, match=r"can't be merged: base has \{'sliding_window': 24\}: llama.cpp would"):
        save_gguf(program, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "program"]
