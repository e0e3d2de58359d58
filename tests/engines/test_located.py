"""Models come from folders, GGUF files and the hub; what can't be had says why and what to do."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gguf_files import byte_level, model_of, write
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_models import generated, save_adapter, save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from bettertogether import local_lm
from bettertogether.engines import loading
from bettertogether.errors import ConfigError, ModelError


@pytest.fixture
def gguf_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "given"
    folder.mkdir()
    write(folder / "tiny.gguf", model_of("qwen2"), byte_level())
    return folder


def test_a_gguf_file_answers_and_so_does_the_folder_that_holds_it(gguf_folder: Path) -> None:
    lm = local_lm(gguf_folder / "tiny.gguf", max_tokens=4, cache=False)
    assert lm.engine.short_name == "tiny"
    assert local_lm(str(gguf_folder)).engine is lm.engine
    plain = gguf_folder.parent / "plain"
    model_of("qwen2").save_pretrained(plain)
    byte_level().save_pretrained(plain)
    assert lm("One  1 22?") == local_lm(plain, max_tokens=4, cache=False)("One  1 22?")


def test_a_gguf_file_is_converted_once(gguf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loading.located(gguf_folder)
    monkeypatch.setattr("bettertogether.engines.gguf.convert_gguf", None)
    assert loading.located(gguf_folder / "tiny.gguf") == found


def test_a_gguf_file_is_converted_again_where_conversions_have_changed(
    gguf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = loading.located(gguf_folder)
    monkeypatch.setattr("bettertogether.engines.gguf.VERSION", 3)
    assert loading.located(gguf_folder) != found


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), SafetensorError("No space (os error 28)")])
def test_a_full_disk_is_not_told_as_a_file_that_can_not_be_read(
    gguf_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as filling:
        filling.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ModelError, match=r"tiny can't be written: .*No space.* set BETTERTOGETHER_CACHE"):
            loading.located(gguf_folder)
    assert (Path(loading.located(gguf_folder)) / "config.json").is_file()


def test_what_is_no_whole_gguf_file_is_refused(gguf_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"other\.gguf is not there: give the path of a GGUF file"):
        local_lm(gguf_folder / "other.gguf")
    (gguf_folder / "big-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is a part of a model: join the parts with `llama-gguf-split --merge` first"):
        local_lm(gguf_folder / "big-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"given holds big-00001-of-00002\.gguf, tiny\.gguf: give the path of one"):
        local_lm(gguf_folder)
    (gguf_folder / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"damaged\.gguf can't be read as a model \("):
        local_lm(gguf_folder / "damaged.gguf")
    assert not list((gguf_folder.parent / "cache" / "models").rglob("damaged"))


def test_a_model_and_an_adapter_are_found_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = save_model(tmp_path / "models" / "tiny"), save_adapter(tmp_path / "adapter", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    lm = local_lm("models/tiny", adapter="adapter", max_tokens=4, cache=False)
    assert local_lm(model).engine is lm.engine
    state = lm.engine.dump_state()
    assert (state["model"], state["adapters"]) == (str(model), [str(adapter)])
    monkeypatch.chdir("elsewhere")
    assert lm("One?") == local_lm(model, adapter=adapter, max_tokens=4, cache=False)("One?")


def hub_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    response: Any = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    return kind("403 Client Error", response=response)


ANSWERS = [
    (hub_error(GatedRepoError), r"'me/tiny' is gated: accept its terms on https://huggingface\.co/me/tiny, and log in"),
    (hub_error(RepositoryNotFoundError), r"'me/tiny' is not on the hub, or is private: correct the name, or log in"),
    (hub_error(RevisionNotFoundError), r"'me/tiny' has no revision '(v2|main)': give a branch, tag or commit of it"),
    (
        LocalEntryNotFoundError("offline"),
        r"'me/tiny' is not in the hub's cache, and the hub can't be reached: go online",
    ),
]


@pytest.mark.parametrize(("error", "said"), ANSWERS)
@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, {"token": "hf_secret"}])
def test_what_the_hub_answers_is_said_with_what_to_do(
    error: Exception, said: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # As transformers passes it on.
        raise OSError("You are trying to access a gated repo.") from error

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr(loading, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=f"^{said}") as caught:
        local_lm("me/tiny", **options)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_revision_is_fetched_with_the_token_and_named_after_its_repository(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    repo, snapshot = save_model(tmp_path / "repo"), tmp_path / "models--me--tiny" / "snapshots" / "0123"
    torch.save(load_file(repo / "model.safetensors"), repo / "pytorch_model.bin")
    if weights == "pytorch_model.bin":
        (repo / "model.safetensors").unlink()
    for name in ("additional_chat_templates/rag.jinja", "onnx/config.json"):
        (repo / name).parent.mkdir()
        (repo / name).write_text("{}")

    def download(repo_id: str, *, revision: str, token: str, **patterns: Any) -> str:
        asked.append((repo_id, revision, token))
        names = [path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, **patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, snapshot / name)
        return os.fspath(snapshot)

    monkeypatch.setattr(loading, "snapshot_download", download)
    lm = local_lm("me/tiny", revision="v2", token="hf_secret", max_tokens=4, cache=False)
    assert asked == [("me/tiny", "v2", "hf_secret"), ("me/tiny", "0123", "hf_secret")]
    assert lm.engine.short_name == "tiny"
    assert "hf_secret" not in repr(lm.dump_state())
    assert [path.name for path in snapshot.rglob("*") if path.suffix in (".bin", ".safetensors")] == [weights]
    assert [path.name for path in snapshot.iterdir() if path.is_dir()] == ["additional_chat_templates"]
    assert lm("One?") == local_lm(repo, max_tokens=4, cache=False)("One?")


@pytest.mark.parametrize("options", [{"revision": 3}, {"token": 3}])
def test_a_revision_or_token_of_another_type_is_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="revision= or token= is not allowed as given: give text, or None"):
        local_lm("me/tiny", **options)


def test_torchs_own_dtype_is_taken(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    lm = local_lm(folder, engine_options={"dtype": torch.bfloat16})
    assert local_lm(folder, engine_options={"dtype": "bfloat16"}).engine is lm.engine


@pytest.mark.parametrize(
    ("method", "options", "package"),
    [
        ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
        ("gptq", {"bits": 4, "group_size": 32}, "optimum"),
        ("awq", {"bits": 4, "group_size": 32}, "gptqmodel"),
    ],
)
def test_a_quantized_model_whose_package_is_missing_says_which(
    method: str, options: dict[str, Any], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    folder = save_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **options}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"^The weights of '{folder}' can't be loaded: .*{package}"):
        loading.load_model(loading.read_card(folder), torch.device("cpu"), torch.float32)


def test_a_4_bit_model_answers_as_transformers_does(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    folder = save_model(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=bits)
    model.save_pretrained(folder)
    engine = local_lm(folder).engine
    prompt_ids = engine.prompt_tokens([{"role": "user", "content": "One?"}])
    expected = engine._writer.decode(generated(model, prompt_ids, 8))
    assert local_lm(folder, max_tokens=8, cache=False)("One?") == [expected]
