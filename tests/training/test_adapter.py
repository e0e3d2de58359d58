"""A LoRA adapter is put on and taken off a model that is as before, and loads with PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import fingerprint, tiny_model

from bettertogether.errors import ConfigError, ModelError, NotTrainableError
from bettertogether.training.adapter import read_adapter, save_adapter, training_adapter
from bettertogether.training.config import LoRAConfig


def peft_model(adapters: tuple[str, ...] = ("first", "second")) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.set_adapter(adapters[-1])
    model.eval()
    return model


def test_a_plain_model_is_as_before_afterwards() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with training_adapter(model, LoRAConfig(), seed=0) as adapter:
        assert len(adapter.parameters) == 2 * 7 * 2
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_a_plain_model_is_as_before_after_an_exception() -> None:
    model = tiny_model()
    before = fingerprint(model)

    def interrupted() -> None:
        with training_adapter(model, LoRAConfig(), seed=0):
            model.train()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fingerprint(model) == before


def test_other_adapters_of_a_peft_model_are_kept_and_the_active_one_stays_active() -> None:
    model = peft_model()
    before, output = fingerprint(model), model(torch.tensor([[3, 4, 5]])).logits
    with training_adapter(model, LoRAConfig(), seed=0) as adapter:
        assert len(adapter.parameters) == 2 * 7 * 2
        assert all("lora_A.weight" in key or "lora_B.weight" in key for key in adapter.parameters)
    assert fingerprint(model) == before
    assert (model.active_adapter, list(model.peft_config)) == ("second", ["first", "second"])
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, output)


def test_an_adapter_that_was_switched_off_stays_off() -> None:
    model = peft_model()
    with model.disable_adapter():
        before = fingerprint(model)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        with training_adapter(model, LoRAConfig(), seed=0):
            assert not layer.disable_adapters
        assert layer.disable_adapters
        assert fingerprint(model) == before


def test_only_the_new_adapter_is_trained_and_used() -> None:
    model = peft_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with model.disable_adapter():
        base_output = model(torch.tensor([[3, 4, 5]])).logits
    with training_adapter(model, LoRAConfig(), seed=0) as adapter:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trained) == len(adapter.parameters)
        assert all("bettertogether_training" in name for name in trained)
        assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, base_output)


def test_initial_weights_depend_on_the_seed_alone_and_the_random_state_is_kept() -> None:
    states = []
    for noise, seed, alpha in ((1, 0, 32), (2, 0, 32), (3, 1, 32), (1, 0, 16)):
        model = tiny_model()
        torch.manual_seed(noise)
        expected = torch.rand(1)
        torch.manual_seed(noise)
        with training_adapter(model, LoRAConfig(alpha=alpha), seed) as adapter:
            states.append(adapter.digest())
        assert torch.equal(torch.rand(1), expected)
    assert states[0] == states[1]
    assert len(set(states)) == 3


def test_adapter_weights_are_float32_over_a_bfloat16_base() -> None:
    with training_adapter(tiny_model().bfloat16(), LoRAConfig(), seed=0) as adapter:
        assert {parameter.dtype for parameter in adapter.parameters.values()} == {torch.float32}


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, ids = tiny_model(), torch.tensor([[3, 4, 5, 6]])
    model.name_or_path = "some/base"
    with training_adapter(model, LoRAConfig(rank=4), seed=0) as adapter, torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.normal_()
        expected = model(ids).logits
        save_adapter(tmp_path, adapter.config, adapter.state())
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert torch.equal(loaded(ids).logits, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_adapter_config_names_the_base_and_the_layers_briefly(tmp_path: Path) -> None:
    model = tiny_model()
    model.name_or_path = "some/base"
    with training_adapter(model, LoRAConfig(rank=4, alpha=8, dropout=0.25), seed=0) as adapter:
        save_adapter(tmp_path, adapter.config, adapter.state())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["peft_type"]) == (4, 8, 0.25, "LORA")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_start_from_brings_weights_and_shape_and_another_rank_that_was_asked_for_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoRAConfig(rank=3, target_modules=("v_proj",))
    with training_adapter(tiny_model(), lora, seed=0) as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.normal_()
        state = adapter.state()
        save_adapter(tmp_path, adapter.config, state)
    with training_adapter(tiny_model(), LoRAConfig(), seed=5, start_from=tmp_path):
        assert caplog.messages == []
    with training_adapter(tiny_model(), LoRAConfig(rank=8), seed=5, start_from=tmp_path) as adapter:
        assert "is trained further, and keeps its rank 3: LoRAConfig(rank=8) is for a new adapter" in caplog.text
        assert adapter.config.r == 3
        assert adapter.state().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in adapter.state().items())


def test_an_adapter_of_another_model_is_refused_and_the_model_is_as_before(tmp_path: Path) -> None:
    with training_adapter(tiny_model(), LoRAConfig(), seed=0) as adapter:
        state = {key: value[:, :5].contiguous() for key, value in adapter.state().items()}
        save_adapter(tmp_path, adapter.config, state)
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ModelError, match="does not fit"), training_adapter(model, LoRAConfig(), 0, tmp_path):
        pass
    assert fingerprint(model) == before


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json and no adapter_model"):
        read_adapter(tmp_path)


def test_target_modules_that_fit_no_layer_are_refused_with_those_that_do() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=r"target_modules=\('nope',\) can't be used .*'v_proj'"):
        training_adapter(model, LoRAConfig(target_modules=("nope",)), seed=0).__enter__()
    assert fingerprint(model) == before


def test_a_merged_adapter_is_refused() -> None:
    model = peft_model()
    model.merge_adapter()
    with pytest.raises(NotTrainableError, match="unmerge_adapter"):
        training_adapter(model, LoRAConfig(), seed=0).__enter__()


def test_a_model_loaded_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = tiny_model()
    with pytest.raises(NotTrainableError, match="inference_mode"):
        training_adapter(model, LoRAConfig(), seed=0).__enter__()
