from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bettertogether.engines.merging import merge_adapter
from bettertogether.errors import ModelError

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
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
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
    model.save_pretrained(folder)
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
