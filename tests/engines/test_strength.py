"""An adapter at another strength is a PEFT adapter of its own: the original's update, times the strength."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.lm15 import Config, Message, Request
from peft import PeftModel
from small_models import prompts, save_adapter, save_model, tiny_model

from bettertogether.artifact import load, save
from bettertogether.engines import TransformersEngine
from bettertogether.engines.adapters import AdaptedSpan, AdapterBank, linear_shapes
from bettertogether.engines.strength import scaled_folder
from bettertogether.errors import ConfigError, RunDirectoryError, UnknownAdapterError
from bettertogether.lm import engine_lm
from bettertogether.steps.strengths import TriedAdapters
from bettertogether.training.adapter_folder import round_of, write_round

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries": {"target_modules": ["q_proj", "k_proj"], "r": 8},
    "rslora": {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"o_proj": 2}},
}


def logits_by_peft(folder: Path, strength: float = 1.0) -> torch.Tensor:
    tuned = PeftModel.from_pretrained(tiny_model(), folder).double().eval()
    for module in tuned.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling.update({name: scale * strength for name, scale in scaling.items()})
    with torch.inference_mode():
        found: torch.Tensor = tuned(torch.tensor([prompts(1, 40)[0]])).logits
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


def answer(engine: TransformersEngine, model: str) -> str:
    config = Config(max_tokens=8, temperature=0.0)
    return engine.complete(Request(model, (Message.user("What is red?"),), config=config)).text or ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 0.3, 2])
def test_it_computes_what_peft_does_with_its_scaling_times_the_strength(
    kind: str, strength: float, tmp_path: Path
) -> None:
    source = save_adapter(tmp_path / "source", 1, **KINDS[kind])
    expected = logits_by_peft(source, strength)
    scaled = scaled_folder(source, strength, tmp_path / "scaled", "tiny")
    model = tiny_model().double()
    bank = AdapterBank("tiny", lambda: linear_shapes(model))
    name = bank.add(scaled)
    bank.attach(model)
    with torch.inference_mode(), bank.active([AdaptedSpan(name, 0, None)]):
        found = model(torch.tensor([prompts(1, 40)[0]])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_by_peft(scaled), expected, rtol=0, atol=1e-4)
    assert (expected - logits_by_peft(source)).abs().max() > 0.1


def test_it_keeps_its_round_and_the_original_as_it_was(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "source", 1)
    write_round(source, 3, "tiny")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    scaled = scaled_folder(source, 0.5, tmp_path, "tiny")
    assert round_of(scaled) == 3
    assert scaled.name.startswith("tiny@r3-")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert json.loads((scaled / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_a_damaged_folder_of_its_name_is_written_anew(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "source", 1)
    scaled = scaled_folder(source, 0.5, tmp_path, "tiny")
    weights = (scaled / "adapter_model.safetensors").read_bytes()
    (scaled / "adapter_model.safetensors").write_bytes(b"")
    assert scaled_folder(source, 0.5, tmp_path, "tiny") == scaled
    assert (scaled / "adapter_model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", scaled.name]


def test_a_place_that_can_not_be_written_is_our_error(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "source", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="can't be written"):
        scaled_folder(source, 0.5, tmp_path / "file", "tiny")


def test_an_engine_serves_it_beside_the_original_and_another_finds_it_again(base: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(base)
    model = engine.add_adapter(save_adapter(tmp_path / "adapters" / "source", 1))
    half = engine.scaled(model, 0.5)
    folder = engine.adapter_folder(half)
    assert folder == tmp_path / "adapters" / half.removeprefix("local/")
    assert engine.scaled(half, 2) == model
    assert engine.scaled(model, 1) == model
    shutil.copytree(folder, tmp_path / "moved")
    other = TransformersEngine(base)
    assert other.add_adapter(tmp_path / "moved") == half
    assert answer(other, half) == answer(engine, half) != answer(engine, model)
    engine.close()
    other.close()


def test_of_adapters_that_are_tried_the_one_kept_answers_on_from_its_folder(base: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(base)
    model = engine.add_adapter(save_adapter(tmp_path / "source", 1))
    lm = engine_lm(engine, model)
    program = dspy.Predict("thing -> colour")
    with TriedAdapters(tmp_path / "adapters") as tried:
        half, more = tried.scaled(lm, 0.5), tried.scaled(lm, 0.75)
        before = answer(engine, half)
        assert before != answer(engine, more)
        program.set_lm(lm.copy(model=half))
        tried.keep(program)
    folder = tmp_path / "adapters" / half.removeprefix("local/")
    assert engine.adapter_folders() == [tmp_path / "source", folder]
    assert list((tmp_path / "adapters").iterdir()) == [folder]
    assert answer(engine, half) == before
    save(program, tmp_path / "saved")
    engine.close()


def test_a_program_that_runs_it_is_saved_with_it_and_loads(base: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(base)
    half = engine.scaled(engine.add_adapter(save_adapter(tmp_path / "source", 1)), 0.5)
    program = dspy.Predict("thing -> colour")
    program.set_lm(engine_lm(engine, half))
    save(program, tmp_path / "saved")
    other = TransformersEngine(base)
    loaded = load(tmp_path / "saved", base_model=other)
    assert loaded.lm.model == half
    assert answer(other, half) == answer(engine, half)
    engine.close()
    other.close()


def test_strengths_that_are_none_and_models_that_have_none_are_errors(base: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(base)
    model = engine.add_adapter(save_adapter(tmp_path / "source", 1))
    with pytest.raises(ConfigError, match=r"strength=0 is not allowed: give a number above 0, 2 at most"):
        engine.scaled(model, 0)
    with pytest.raises(ConfigError, match=r"is a base model, which has no strength: give the name of an adapter"):
        engine.scaled(f"local/{engine.base_name}", 0.5)
    with pytest.raises(UnknownAdapterError):
        engine.scaled(f"local/{engine.base_name}@r1-00000000", 0.5)
    engine.close()
