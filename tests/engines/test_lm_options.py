"""What `local_lm` takes is checked when it is called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from small_models import byte_tokenizer, save_adapter, save_model
from transformers import BertConfig, BertForMaskedLM

from bettertogether import local_lm, vllm_lm
from bettertogether.engines import TransformersEngine
from bettertogether.engines.lm_options import REQUEST, SAMPLING
from bettertogether.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("device", "cpu", r"device goes into engine_options=\{'device': \.\.\.\}"),
        ("dtype", "float32", r"dtype goes into engine_options=\{'dtype': \.\.\.\}"),
        ("max_batch_size", 4, "max_batch_size goes into engine_options="),
        ("max_new_tokens", 5, "For max_new_tokens give max_tokens="),
        ("do_sample", True, "For do_sample give temperature="),
        ("torch_dtype", "auto", r"For torch_dtype give engine_options=\{'dtype'"),
        ("repetition_penalty", 1.1, r"\['repetition_penalty'\] are not known\. Allowed: \['cache'"),
        ("frequency_penalty", 1.1, "are not known"),
        ("load_in_4bit", True, "are not known"),
        ("min_p", 0.1, "are not known"),
        ("extra_body", {}, "are not known"),
        ("adapters", [], "are not known"),
        ("engine", "auto", "are not known"),
        ("api_base", "http://x", "are not known"),
    ],
)
@pytest.mark.parametrize("make", [local_lm, vllm_lm])
def test_an_option_that_is_not_known_is_refused_at_once_with_what_to_give(
    folder: Path, make: Any, name: str, value: Any, advice: str
) -> None:
    if make is vllm_lm and name in ("device", "dtype", "max_batch_size"):
        advice = "are not known"
    with pytest.raises(ConfigError, match=advice):
        make(folder, **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"}, {"temperature": -1}, {"temperature": float("nan")}, {"max_tokens": "5"},
        {"max_tokens": 0}, {"max_tokens": True}, {"top_p": 1.5}, {"top_k": 0.5}, {"seed": -1}, {"n": 0},
        {"stop": 5}, {"stop": [""]}, {"callbacks": [5]}, {"callbacks": 5}, {"num_retries": -1}, {"cache": "yes"},
        {"engine_options": 5}, {"engine_options": {"load_in_4bit": True}}, {"engine_options": {"dtype": ["float32"]}},
        {"engine_options": {"device": 5}}, {"engine_options": {"device": "meta"}},
        {"engine_options": {"device": "cuda:99"}}, {"engine_options": {"device": "xpu"}}, {"adapter": 5},
        {"logprobs": "x"}, {"logprobs": -1}, {"logprobs": 3}, {"logprobs": 1}, {"top_logprobs": 0.5},
        {"top_logprobs": 2},
        {"top_logprobs": 0, "logprobs": False}, {"temperature": 2.5}, {"max_completion_tokens": 7, "max_tokens": 6},
        {"user": ""}, {"user": 5}, {"response_format": 5}, {"response_format": int}, {"response_format": {"type": "x"}},
        {"response_format": {"type": "object", "properties": {}}}, {"tools": [{"type": "function"}]}, {"tools": 5},
    ],
)  # fmt: skip
def test_a_value_that_an_option_can_not_have_is_refused_at_once(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"not allowed|not known|is not there"):
        local_lm(folder, **options)


@pytest.mark.parametrize("model", [5, None, "", ["tiny"]])
def test_a_model_that_is_no_path_or_id_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"model=.* give the folder of a model, or a hub id"):
        local_lm(model)


class Colour(pydantic.BaseModel):
    name: str


SCHEMA = {"type": "json_schema", "json_schema": {"name": "Colour", "schema": Colour.model_json_schema()}}


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "temperature": 1, "num_retries": 0},
        {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"logprobs": False}, {"logprobs": 0},
        {"temperature": 2.0}, {"temperature": None}, {"temperature": np.float32(2)}, {"user": "me"}, {"stop": "x"},
        {"max_tokens": None, "max_completion_tokens": 2}, {"max_completion_tokens": np.int64(2)}, {"tools": []},
        {"response_format": Colour}, {"response_format": SCHEMA}, {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}}, {"top_p": 0}, {"model_type": "responses", "logprobs": True},
        {name: None for name in (*SAMPLING, *REQUEST) if name not in ("max_tokens", "model_type")},
    ],
)  # fmt: skip
def test_what_dspy_takes_is_taken(folder: Path, options: dict[str, Any]) -> None:
    lm = local_lm(folder, **{"max_tokens": 2, "cache": False, "n": 2, **options})
    assert len(lm("hi", n=2)) == 2
    lm.engine.close()


def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "models" / "tiny")
    adapter = save_adapter(tmp_path / "adapter", 1)
    lm = local_lm("~/models/tiny", adapter="~/adapter")
    assert lm.model.startswith("local/tiny-")
    assert lm.engine.adapter_folder(lm.model) == adapter
    assert local_lm(Path("~/models/tiny")).engine is lm.engine is local_lm(tmp_path / "models" / "tiny").engine
    lm.engine.close()
    engine = TransformersEngine(folder, cache_folder=Path("~/kept"))
    assert engine._adapters_folder() == tmp_path / "kept"
    engine.close()


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is a BertForMaskedLM, which writes no text"):
        local_lm(tmp_path / "bert")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_folder_with_a_damaged_or_missing_file_is_an_error_at_once(tmp_path: Path, file: str) -> None:
    folder = save_model(tmp_path / "tiny")
    (folder / file).write_text("{")
    with pytest.raises(ModelError, match="tiny"):
        local_lm(folder)
    (folder / file).unlink()
    if file == "config.json":
        with pytest.raises(ModelError, match=r"config\.json missing"):
            local_lm(folder)


def test_a_folder_that_may_not_be_read_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "tiny")

    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match=r"can't be read.*Permission denied"):
        TransformersEngine(folder)
