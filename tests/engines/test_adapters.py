"""An adapter that is served answers as PEFT does, beside the base model and others, and is named by its content."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import SIZES, decode, generated, prompts, save_adapter, tiny_model
from transformers import LlamaConfig

from bettertogether.engines import adapters
from bettertogether.engines.adapters import AdaptedSpan, AdapterBank, linear_shapes
from bettertogether.engines.loading import meta_model
from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.engines.local.plain_decoder import PlainDecoder
from bettertogether.errors import ModelError, UnknownAdapterError
from bettertogether.training.adapter_folder import content_hash, read_tensors, write_round


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(parent / "all", 1),
        save_adapter(parent / "queries", 2, target_modules=["q_proj", "k_proj"], r=8),
        save_adapter(parent / "rslora", 3, use_rslora=True, alpha_pattern={"v_proj": 3}, rank_pattern={"o_proj": 2}),
    ]


def make_bank(model: Any, folders: list[Path]) -> tuple[AdapterBank, list[str]]:
    adapters = AdapterBank("tiny", lambda: linear_shapes(model))
    names = [adapters.add(folder) for folder in folders]
    adapters.attach(model)
    return adapters, names


def test_an_adapter_answers_while_another_is_read(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    bank, (name,) = make_bank(model, folders[:1])
    reading, read = threading.Event(), threading.Event()

    def slow(path: Path) -> dict[str, torch.Tensor]:
        reading.set()
        assert read.wait(10)
        return read_tensors(path)

    def answer() -> None:
        bank.check(name)
        with bank.active([AdaptedSpan(name, 0, None)]):
            model(torch.tensor([[1]]))

    monkeypatch.setattr(adapters, "read_tensors", slow)
    with ThreadPoolExecutor(2) as pool:
        added = pool.submit(bank.add, folders[1])
        assert reading.wait(10)
        pool.submit(answer).result(timeout=5)
        read.set()
        bank.check(added.result())


@pytest.mark.parametrize("kind", [lambda m, b: PackedDecoder(m, b, cache_bytes=1 << 30), PlainDecoder])
def test_the_base_and_all_adapters_answer_as_peft_does(folders: list[Path], kind: Any, device: str) -> None:
    model = tiny_model().to(device)
    adapters, names = make_bank(model, folders)
    texts = prompts(3, 70)
    rows = [BatchRow(text, 6, adapter) for text in texts for adapter in ("", *names)]
    decode(kind(model, adapters), rows)
    adapters.attach(None)
    for name, folder in zip(names, folders, strict=True):
        tuned = PeftModel.from_pretrained(tiny_model().to(device), folder)
        expected = [generated(tuned, text, 6) for text in texts]
        assert [row.output_ids for row in rows if row.adapter == name] == expected
    assert [row.output_ids for row in rows if not row.adapter] == [generated(model, text, 6) for text in texts]


def test_the_logits_under_an_adapter_are_pefts(folders: list[Path]) -> None:
    ids_1_T = torch.tensor([prompts(1, 40)[0]])
    for folder in folders:
        model = tiny_model().double()
        adapters, (name,) = make_bank(model, [folder])
        with torch.inference_mode(), adapters.active([AdaptedSpan(name, 0, None)]):
            found = model(ids_1_T).logits
        with torch.inference_mode():
            expected = PeftModel.from_pretrained(tiny_model(), folder).double().eval()(ids_1_T).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_the_output_layer_beside_others_answers_as_peft_does(folders: list[Path], tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "head", 4, target_modules=["q_proj", "lm_head"])
    model = tiny_model()
    adapters, names = make_bank(model, [folder, *folders[:1]])
    rows = [BatchRow(text, 6, adapter) for text in prompts(3, 70) for adapter in (names[0], "", names[1])]
    decode(PackedDecoder(model, adapters, cache_bytes=1 << 30), rows)
    tuned = PeftModel.from_pretrained(tiny_model(), folder)
    expected = [generated(tuned, text, 6) for text in prompts(3, 70)]
    assert [row.output_ids for row in rows if row.adapter == names[0]] == expected


def test_a_layer_that_sees_a_part_of_the_tokens_is_not_served_in_a_batch(folders: list[Path]) -> None:
    model = tiny_model()
    adapters, (name, *_) = make_bank(model, folders)
    spans = [AdaptedSpan("", 0, 3), AdaptedSpan(name, 3, 7)]
    with adapters.active(spans, kept=[2, 6]), pytest.raises(ModelError, match=r"q_proj, which sees 5 of 7 tokens"):
        model(torch.tensor([[1, 2, 3, 4, 5]]))


class EightBit(torch.nn.Linear):
    """A linear layer that holds its weight in 8 bits, as quantized models do."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = float(layer.weight.abs().max()) / 127
        integers = (layer.weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(integers, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype) * self.scale)


def eight_bit_model() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = EightBit(layer.self_attn.q_proj)
    return model


def test_the_matrices_beside_a_quantized_layer_keep_their_numbers(folders: list[Path]) -> None:
    ids_1_T = torch.tensor([prompts(1, 40)[0]])
    model = eight_bit_model()
    adapters, (name,) = make_bank(model, folders[1:2])
    with torch.inference_mode(), adapters.active([AdaptedSpan(name, 0, None)]):
        found = model(ids_1_T).logits
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(eight_bit_model(), folders[1]).eval()(ids_1_T).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_outside_of_its_passes_the_model_is_the_base(folders: list[Path]) -> None:
    ids_1_T = torch.tensor([prompts(1, 40)[0]])
    model = tiny_model()
    expected = model(ids_1_T).logits
    adapters, (name,) = make_bank(model, folders[:1])
    with torch.inference_mode(), adapters.active([AdaptedSpan(name, 0, None)]):
        model(ids_1_T)
    assert torch.equal(model(ids_1_T).logits, expected)


def test_adapters_share_no_prefix(folders: list[Path]) -> None:
    model = tiny_model()
    adapters, names = make_bank(model, folders[:1])
    decoder = PackedDecoder(model, adapters, cache_bytes=1 << 30)
    text = prompts(1, 80)[0]
    first, second = BatchRow(text, 1), BatchRow(text, 1, names[0])
    decode(decoder, [first])
    decode(decoder, [second])
    assert (first.reused_tokens, second.reused_tokens) == (0, 0)


def test_the_name_tells_base_round_and_content(folders: list[Path]) -> None:
    adapters, (name, *_) = make_bank(tiny_model(), folders)
    assert name == f"local/tiny@r1-{content_hash(folders[0])[:8]}"
    assert adapters.folder(name) == folders[0]
    assert adapters.folder("local/tiny") is None
    assert adapters.folders() == folders


def test_the_round_comes_from_the_folder(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    write_round(folder, 3, "tiny")
    assert make_bank(tiny_model(), [folder])[1][0].startswith("local/tiny@r3-")


def test_the_same_content_has_the_same_name_wherever_it_lies_and_is_found_where_it_still_is(tmp_path: Path) -> None:
    one, two = save_adapter(tmp_path / "one", 1), save_adapter(tmp_path / "two", 1)
    config = json.loads((two / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere"
    config["target_modules"] = config["target_modules"][::-1]
    (two / "adapter_config.json").write_text(json.dumps(config))
    assert content_hash(one) == content_hash(two)
    adapters, (name, same) = make_bank(tiny_model(), [one, two])
    assert (name, adapters.folder(name)) == (same, one)
    shutil.rmtree(one)
    assert adapters.add(two) == name
    assert adapters.folder(name) == two


@pytest.mark.parametrize("change", [{"lora_alpha": 17}, {"use_rslora": True}])
def test_another_setting_is_another_content(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    before = content_hash(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    assert content_hash(folder) != before


def test_a_name_that_is_not_held_is_an_error_that_names_those_that_are(folders: list[Path]) -> None:
    adapters, (name,) = make_bank(tiny_model(), folders[:1])
    with pytest.raises(UnknownAdapterError, match=rf"'local/tiny@r9-0' is not served.*local/tiny, {name}"):
        adapters.folder("local/tiny@r9-0")


def test_a_pass_under_an_adapter_that_was_removed_is_an_error_that_names_it(folders: list[Path]) -> None:
    adapters, (name,) = make_bank(tiny_model(), folders[:1])
    adapters.remove(name)
    with pytest.raises(UnknownAdapterError, match=name), adapters.active([AdaptedSpan(name, 0, None)]):
        pass


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json and no adapter_model\.safetensors"):
        make_bank(tiny_model(), [tmp_path])


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"bias": "all"}, {"use_dora": True}, {"modules_to_save": ["x"]}]
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match="plain LoRA"):
        make_bank(tiny_model(), [folder])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_adapter_whose_start_changed_the_base_is_refused(tmp_path: Path, start: str) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    with pytest.raises(ModelError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        make_bank(tiny_model(), [folder])


def test_an_adapter_of_another_base_is_refused(folders: list[Path]) -> None:
    other = tiny_model(LlamaConfig(**{**SIZES, "hidden_size": 32}))
    with pytest.raises(ModelError, match="does not fit the base model"):
        make_bank(other, folders[:1])


def test_weights_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelError, match=r"lm_head\.weight'"):
        make_bank(tiny_model(), [folder])


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", 1)
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="can't be read"):
        make_bank(tiny_model(), [folder])


def test_the_layers_of_a_model_are_known_without_its_weights() -> None:
    model = tiny_model()
    assert linear_shapes(meta_model(model.config)) == linear_shapes(model)
