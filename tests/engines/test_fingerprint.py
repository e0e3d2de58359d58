"""A base model's name holds its content: whatever changes answers changes the name, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import huggingface_hub
import pytest
from dspy.lm15 import Config, Message, Request
from huggingface_hub.errors import LocalEntryNotFoundError
from small_models import byte_tokenizer, save_adapter, save_model, tiny_model

from bettertogether import local_lm
from bettertogether.engines import TransformersEngine, VLLMEngine, fingerprint
from bettertogether.engines.fingerprint import file_hash, model_hash
from bettertogether.errors import ModelError, UnknownAdapterError
from bettertogether.files import sha256_of
from bettertogether.lm import LocalLM


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_remembered", {})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read for their hash."""
    names: list[str] = []

    def spy(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(fingerprint, "sha256_of", spy)
    return names


@pytest.fixture
def named() -> Callable[..., str]:
    """The model name that `local_lm` gives; its engine is closed afterwards."""

    def name(folder: Path, **engine_options: Any) -> str:
        lm = local_lm(folder, engine_options=engine_options)
        lm.engine.close()
        return str(lm.model)

    return name


def rewrite(folder: Path, seed: int) -> None:
    tiny_model(seed=seed).save_pretrained(folder)


def test_two_models_in_folders_of_one_name_have_different_names(tmp_path: Path, named: Callable[..., str]) -> None:
    for seed in (0, 1):
        save_model(tmp_path / str(seed) / "merged")
        rewrite(tmp_path / str(seed) / "merged", seed)
    names = {named(tmp_path / str(seed) / "merged") for seed in (0, 1)}
    assert len(names) == 2
    assert all(name.startswith("local/merged-") for name in names)


def test_the_same_model_has_the_same_name_wherever_its_folder_is(tmp_path: Path, named: Callable[..., str]) -> None:
    first = save_model(tmp_path / "a" / "tiny")
    shutil.copytree(first, tmp_path / "b" / "tiny")
    assert named(first) == named(tmp_path / "b" / "tiny")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_each_file_that_changes_answers_changes_the_name(tmp_path: Path, named: Callable[..., str], file: str) -> None:
    folder = save_model(tmp_path / "tiny")
    before = named(folder)
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert named(folder) != before


def test_a_file_that_no_one_loads_does_not_change_the_name(tmp_path: Path, named: Callable[..., str]) -> None:
    folder = save_model(tmp_path / "tiny")
    before = named(folder)
    (folder / "README.md").write_text("new")
    (folder / "optimizer.pt").write_bytes(b"new")
    assert named(folder) == before


def test_precision_and_template_options_and_kind_of_engine_are_in_the_name(
    tmp_path: Path, named: Callable[..., str]
) -> None:
    folder = save_model(tmp_path / "tiny")
    plain = named(folder)
    assert named(folder, dtype="float32", max_batch_size=3, cache_bytes=1 << 20) == plain
    assert named(folder, chat_template_kwargs={"enable_thinking": False}) == plain
    options: list[dict[str, Any]] = [
        {"dtype": "bfloat16"}, {"chat_template_kwargs": {}}, {"chat_template_kwargs": {"enable_thinking": True}},
    ]  # fmt: skip
    served = VLLMEngine(folder)
    assert len({plain, f"local/{served.base_name}", *(named(folder, **each) for each in options)}) == 5
    more_memory = VLLMEngine(folder, server_options={"gpu_memory_utilization": 0.5})
    quantized = VLLMEngine(folder, server_options={"quantization": "fp8"})
    assert more_memory.base_name == served.base_name != quantized.base_name
    for engine in (served, more_memory, quantized):
        engine.close()


def test_weights_of_the_same_size_written_in_their_place_are_another_model_and_engine(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    old = local_lm(folder, cache=False, max_tokens=6)
    answer = old("hello")
    size = (folder / "model.safetensors").stat().st_size
    rewrite(folder, 1)
    assert (folder / "model.safetensors").stat().st_size == size
    new = local_lm(folder, cache=False, max_tokens=6)
    assert new.model != old.model
    assert new.engine is not old.engine
    assert new("hello") != answer == old("hello")
    for lm in (old, new):
        lm.engine.close()


def test_weights_that_change_before_they_are_loaded_are_an_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    lm = local_lm(folder, cache=False)
    rewrite(folder, 1)
    with pytest.raises(dspy.LMError, match="have changed since tiny-"):
        lm("hello")
    lm.engine.close()


def test_dspys_cache_does_not_answer_for_another_model_of_the_same_name(tmp_path: Path) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        lms = []
        for seed in (0, 1):
            save_model(tmp_path / str(seed) / "merged")
            rewrite(tmp_path / str(seed) / "merged", seed)
            lms.append(local_lm(tmp_path / str(seed) / "merged", max_tokens=6))
        assert lms[0]("hello") != lms[1]("hello") == lms[1].copy(cache=False)("hello")
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    for lm in lms:
        lm.engine.close()


def test_an_adapters_name_holds_the_name_of_its_base(tmp_path: Path) -> None:
    engine = TransformersEngine(save_model(tmp_path / "tiny"))
    name = engine.add_adapter(save_adapter(tmp_path / "adapter", 1))
    assert name.startswith(f"local/{engine.base_name}@r1-")
    engine.close()


def test_names_of_older_versions_stand_for_the_same_base_and_adapters(tmp_path: Path) -> None:
    engine = TransformersEngine.shared(save_model(tmp_path / "tiny"))
    name = engine.add_adapter(save_adapter(tmp_path / "adapter", 1))
    old = "local/tiny@" + name.partition("@")[2]
    assert engine.canonical("local/tiny") == f"local/{engine.base_name}"
    assert engine.adapter_folder(old) == tmp_path / "adapter"
    ask = [Request(model, (Message.user("hello"),), config=Config(max_tokens=6)) for model in (old, name, "local/tiny")]
    answers = [engine.complete(request).text for request in ask]
    assert answers[0] == answers[1] != answers[2]
    state = local_lm(tmp_path / "tiny").dump_state() | {"model": old}
    assert LocalLM.load_state(state, allow_custom_lm_class=True).model == name
    with pytest.raises(UnknownAdapterError, match="'local/tiny-00000000' is not served"):
        engine.adapter_folder("local/tiny-00000000")
    engine.close()


def test_a_base_in_a_folder_named_like_an_adapter_is_a_base(tmp_path: Path) -> None:
    engine = TransformersEngine(save_model(tmp_path / "tiny@r2-12345678"))
    assert engine.short_name == "tiny_r2-12345678"
    assert engine.adapter_folder(f"local/{engine.base_name}") is None
    engine.close()


def test_a_file_is_read_once_for_its_hash_whatever_the_number_of_processes(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(fingerprint, "SETTLED_S", -1.0)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [file_hash(path) for _ in range(3)] == [expected] * 3
    monkeypatch.setattr(fingerprint, "_remembered", {})
    assert file_hash(path) == expected
    assert reads == ["model.safetensors"]


@pytest.mark.parametrize("keeps_times", [False, True])
def test_a_file_that_was_written_anew_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_times: bool
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(fingerprint, "SETTLED_S", -1.0)
    before, status = file_hash(path), path.stat()
    path.write_bytes(b"WEIGHTS")
    if keeps_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_hash(path) == hashlib.sha256(b"WEIGHTS").hexdigest() != before


def test_the_hash_of_a_file_that_has_just_changed_is_not_kept(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    file_hash(path)
    file_hash(path)
    assert reads == ["model.safetensors"] * 2


@pytest.mark.parametrize("damage", ["", "[]", '{"file": 3}', "\x00"])
def test_a_damaged_note_of_a_hash_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_S", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    expected = file_hash(path)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text(damage)
    monkeypatch.setattr(fingerprint, "_remembered", {})
    assert file_hash(path) == expected
    assert json.loads(note.read_text())["sha256"] == expected


def test_a_user_without_a_home_has_hashes_that_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_S", -1.0)
    monkeypatch.setenv("BETTERTOGETHER_CACHE", "~nobody of this name/cache")
    caplog.set_level("INFO", logger="bettertogether")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert file_hash(path) == hashlib.sha256(b"weights").hexdigest()
    assert caplog.messages == [
        f"The hash of {path} can't be kept for the next process: The cache folder ~nobody of this name/cache can't be "
        "found (Could not determine home directory.): set BETTERTOGETHER_CACHE to a folder, or HOME."
    ]


def test_a_folder_whose_weights_can_not_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"can't be read.*gone\.safetensors"):
        local_lm(folder)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of "org/tiny" in a cache of the hub, in its layout: links to blobs named by their hash."""
    root = tmp_path / "hub"
    repository = root / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    plain = save_model(tmp_path / "plain" / "tiny")
    for file in plain.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_blob_that_was_written_to_after_it_was_linked_is_read(hub: Path, tmp_path: Path) -> None:
    rewrite(tmp_path / "other", 7)
    weights = hub / "model.safetensors"
    shutil.copyfile(tmp_path / "other" / "model.safetensors", weights.resolve())
    os.utime(weights.resolve(), ns=(0, weights.lstat().st_mtime_ns + 1))
    assert file_hash(weights) == file_hash(tmp_path / "other" / "model.safetensors")


def test_the_names_of_files_count_for_nothing_outside_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_hash(tmp_path / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()


def test_a_further_chat_template_changes_the_hash(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    before = model_hash(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    assert model_hash(folder) != before


def test_the_parts_of_a_tokenizer_count_where_it_is_not_in_one_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    hashes = []
    for whole in (True, False):
        for text in ("{}", "[]"):
            (folder / "vocab.json").write_text(text)
            hashes.append(model_hash(folder))
        if whole:
            (folder / "tokenizer.json").unlink()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_model_of_the_hub_has_the_hash_of_the_same_model_in_a_folder(hub: Path, tmp_path: Path) -> None:
    assert model_hash("org/tiny", COMMIT) == model_hash(hub) == model_hash(tmp_path / "plain" / "tiny")


def test_a_further_chat_template_counts_for_a_model_of_the_hub_as_for_a_folder(hub: Path) -> None:
    before = model_hash("org/tiny", COMMIT)
    (hub / "additional_chat_templates").mkdir()
    (hub / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert before != model_hash("org/tiny", COMMIT) == model_hash(hub)


def test_weights_in_the_hubs_cache_are_not_read_for_their_hash(hub: Path, reads: list[str]) -> None:
    model_hash("org/tiny", COMMIT)
    assert "config.json" in reads
    assert not {"model.safetensors", (hub / "model.safetensors").resolve().name} & set(reads)


def test_weights_that_are_not_here_yet_are_known_by_the_hubs_record(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sha256 = model_hash("org/tiny", COMMIT), (hub / "model.safetensors").resolve().name
    (hub / "model.safetensors").unlink()
    asked: list[str] = []

    def metadata(url: str) -> SimpleNamespace:
        asked.append(url)
        return SimpleNamespace(etag=sha256)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    assert model_hash("org/tiny", COMMIT) == expected
    assert [url.rpartition("/")[2] for url in asked] == ["model.safetensors"]
    assert COMMIT in asked[0]


def test_without_the_hub_the_commit_stands_for_weights_that_are_not_here(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "model.safetensors").unlink()

    def unreachable(url: str) -> Any:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    assert model_hash("org/tiny", COMMIT) == model_hash("org/tiny", COMMIT) != model_hash("org/tiny", "0" * 40)


def test_the_template_of_a_tokenizer_saved_beside_the_weights_counts(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    before = model_hash(folder)
    byte_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(folder)
    assert model_hash(folder) != before
