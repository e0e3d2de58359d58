"""Options, folders and models that an engine can not use are errors that say why, at the start where that can be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_models import SIZES, byte_tokenizer, save_adapter, save_model, tiny_model
from tiny_requests import ask, labels
from transformers import LlamaConfig, T5Config

from bettertogether.engines import TransformersEngine
from bettertogether.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
    ],
)
def test_an_option_that_is_not_allowed_is_an_error(folder: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEngine(folder, **option)


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        TransformersEngine(tmp_path / "gone")


def test_a_folder_without_a_model_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json and model\.safetensors missing"):
        TransformersEngine(tmp_path)


def test_an_adapters_folder_is_told_from_a_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds an adapter"):
        TransformersEngine(save_adapter(tmp_path / "adapter", 1))


def test_an_adapter_beside_the_weights_is_not_put_into_the_model_unasked(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    adapter = save_adapter(tmp_path / "adapter", 1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder / name)
    with pytest.raises(ModelError, match="holds an adapter beside the model"):
        TransformersEngine(folder)


def test_an_id_that_can_not_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'nobody/nothing' is not in the hub's cache, and the hub can't be reached"):
        TransformersEngine("nobody/nothing")


def test_a_model_of_another_kind_is_an_error(tmp_path: Path) -> None:
    T5Config(d_model=16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"of type 't5', which is no causal language model"):
        TransformersEngine(tmp_path)


def test_a_token_without_an_embedding_is_told_at_load_and_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "tiny")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(folder)
    engine = TransformersEngine(folder)
    assert "has tokens up to 261, the model embeddings for 261: texts with '<call>'" in caplog.text
    assert engine.complete(ask("plain", max_tokens=2)).usage.output_tokens == 2
    called = engine.complete(ask("plain", max_tokens=40, response_format=labels("<call>")))
    assert called.text == '{\n  "label": "<call>"\n}'
    with pytest.raises(ModelError, match=r"'<call>', which is token 261.*embeddings for tokens 0 to 260"):
        engine.complete(ask("a <call> here"))
    engine.close()


def test_a_chat_template_of_tokens_without_an_embedding_is_an_error_at_load(tmp_path: Path) -> None:
    tiny_model(LlamaConfig(**{**SIZES, "vocab_size": 259})).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelError, match=r"'<\|im_start\|>', which is token 259.*embeddings for tokens 0 to 258"):
        TransformersEngine(tmp_path / "tiny")


def test_code_that_comes_with_a_model_is_not_run_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    with pytest.raises(ModelError, match="code of its own, which is not run"):
        TransformersEngine(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_damaged_fail_the_request(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tiny_model().save_pretrained(broken)
    byte_tokenizer().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    engine = TransformersEngine(broken)
    with pytest.raises(ModelError, match=r"weights of .*broken.* can't be loaded"):
        engine.complete(ask(model="local/broken"))
    engine.close()
