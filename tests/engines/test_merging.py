"""A merged folder is a plain model that computes what base and adapter compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bettertogether.engines.merging import merge_adapter
from bettertogether.errors import ModelError
from bettertogether.training.adapter import read_adapter
from bettertogether.training.adapter_folder import read_adapter_config
from bettertogether.training.adapter_settings import is_bounded

IDS_B_T = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", *"abcdefghijklmno"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template="{{ messages }}"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "r1-12345678"
    model.save_pretrained(str(folder))
    return folder


def test_the_merged_model_computes_what_base_and_adapter_compute(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        base_logits = plain(IDS_B_T).logits
        merged_logits = merged(IDS_B_T).logits
        tuned_logits = PeftModel.from_pretrained(plain, str(adapter))(IDS_B_T).logits
    # The merged weights are rounded to the base's bfloat16: 8 bits of mantissa.
    torch.testing.assert_close(merged_logits, tuned_logits, atol=2e-2, rtol=2e-2)
    assert (merged_logits - base_logits).abs().max() > 0.1


def test_the_merged_folder_is_a_plain_model_in_the_bases_precision(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_base_that_is_no_model_is_an_error_that_says_what_to_give(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="base_model="):
        merge_adapter(tmp_path / "nowhere", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def damaged(adapter: Path, folder: Path, change: dict[str, Any]) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    return folder


def test_a_bfloat16_base_is_merged_with_one_rounding(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(base, adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, weight in found.items():
        torch.testing.assert_close(weight, exact[name].to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_output_layer_leaves_the_embedding_as_it_was(base: Path, tmp_path: Path, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    tuned.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS_B_T).logits, tuned(IDS_B_T).logits, rtol=0, atol=1e-5)


def test_no_pickle_is_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = damaged(adapter, tmp_path / "a", {})
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        merge_adapter(base, folder, tmp_path / "merged")


def test_damaged_weights_are_not_blamed_on_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = damaged(adapter, tmp_path / "a", {})
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ModelError, match=rf"^The weights in {folder}/adapter_model\.safetensors can't be read"):
        merge_adapter(base, folder, tmp_path / "merged")


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "alpha_pattern", "rank_pattern"]
)
@pytest.mark.parametrize(
    "pattern",
    [
        "((.+)+)+!", "(a|a)*b", "(?=x)", r"(.)\1+", "x{1,9}{1,9}", ".*.*.*.*x", "[^a]*", "(a)?" * 30, "(a|aa)" * 30,
        "a?" * 30, "(", "[", "a**", "(?#" + "x" * 3000,
    ],
)  # fmt: skip
def test_a_pattern_that_could_hang_a_match_is_refused(adapter: Path, tmp_path: Path, field: str, pattern: str) -> None:
    value: Any = {pattern: 8} if field in ("alpha_pattern", "rank_pattern") else pattern
    folder = damaged(adapter, tmp_path / "a", {field: value})
    for read in (read_adapter_config, read_adapter):
        with pytest.raises(ModelError, match=r"adapter_config\.json holds the pattern"):
            read(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "v_proj", "model.layers.0.self_attn.q_proj", r".*\.self_attn\.(q|k|v|o)_proj", r"model\.layers\.\d+\.mlp\..*",
        r"^model\.layers\.(?:0|1)\.mlp\.down_proj$", "q_proj|v_proj", r".*layers\.[0-9]+\..*proj",
        r".*language_model.*\.(q_proj|v_proj)$", r".*\.layers\.\d+\..*(q|k|v|o)_proj", "all-linear",
    ],
)  # fmt: skip
def test_the_usual_patterns_are_taken(pattern: str) -> None:
    assert is_bounded(pattern)


@pytest.mark.parametrize(
    "change",
    [
        {"r": None}, {"r": 0}, {"r": "4"}, {"lora_alpha": "x"}, {"lora_alpha": None}, {"lora_alpha": float("inf")},
        {"alpha_pattern": [1]}, {"alpha_pattern": {"x": "y"}}, {"target_modules": 5}, {"target_modules": [5]},
        {"layers_to_transform": "x"}, {"use_rslora": "yes"}, {"rank_pattern": {f"l{n}": 2 for n in range(3000)}},
    ],
)  # fmt: skip
def test_settings_of_a_wrong_type_name_the_file(adapter: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = damaged(adapter, tmp_path / "a", change)
    with pytest.raises(ModelError, match=rf"^{folder}/adapter_config\.json"):
        read_adapter_config(folder)


def test_a_place_that_cant_be_written_is_an_error_of_ours(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="can't be written"):
        merge_adapter(base, adapter, tmp_path / "file" / "merged")
