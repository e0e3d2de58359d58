"""Models are loaded and saved without bars of other libraries, and those are back afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub.utils.tqdm import tqdm as hub_bar
from small_models import save_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

from bettertogether.engines.loading import load_model, read_card
from bettertogether.training.bars import no_bars


def test_a_model_is_loaded_without_a_bar_but_elsewhere_transformers_keeps_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path)
    card = read_card(folder)
    capsys.readouterr()
    load_model(card, torch.device("cpu"), torch.float32)
    assert capsys.readouterr().err == ""
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capsys.readouterr().err


def test_a_gguf_file_is_converted_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with no_bars():
        assert list(vars(modeling_gguf_pytorch_utils)["tqdm"]("ab", desc="Converting")) == ["a", "b"]
    assert capsys.readouterr().err == ""
    assert list(vars(modeling_gguf_pytorch_utils)["tqdm"]("ab", desc="Converting")) == ["a", "b"]
    assert "Converting" in capsys.readouterr().err


def test_a_bar_of_tqdm_itself_is_not_drawn_but_one_of_a_download_is(capsys: pytest.CaptureFixture[str]) -> None:
    with no_bars():
        assert list(tqdm("ab", desc="Decompressing")) == ["a", "b"]
        assert capsys.readouterr().err == ""
        list(hub_bar("ab", desc="Fetching"))
        assert "Fetching" in capsys.readouterr().err
    list(tqdm("ab", desc="Decompressing"))
    assert "Decompressing" in capsys.readouterr().err
