"""Every setting of an adapter and every part of its weights file damaged: it is served, or the error is ModelError."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import tiny_model

from bettertogether.engines.adapters import AdapterBank, linear_shapes
from bettertogether.engines.finetuning import move_by_content
from bettertogether.errors import ModelError
from bettertogether.training.adapter import read_adapter
from bettertogether.training.adapter_folder import content_hash, write_round

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "huge": 10**400,
    "infinite": float("inf"),
    "NaN": float("nan"),
    "text": "x",
    "list": [1],
    "list of text": ["x"],
    "mapping": {"x": 1},
    "mapping of text": {"x": "y"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(str(folder))
    write_round(folder, 1, "tiny")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a"))


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, int]]:
    return linear_shapes(tiny_model())


def raw_errors(folder: Path, shapes: dict[str, tuple[int, int]], what: str) -> list[str]:
    """What serving an adapter, or training it further, raises that is no ModelError with its folder."""
    raw = []
    for read in (lambda: AdapterBank("tiny", lambda: shapes).add(folder), lambda: read_adapter(folder)):
        try:
            read()
        except Exception as error:
            if not isinstance(error, ModelError) or str(folder) not in str(error):
                raw.append(f"{what}: {type(error).__name__}: {error}")
    return raw


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG.keys())
def test_each_setting_damaged(folder: Path, shapes: dict[str, tuple[int, int]], value: Any) -> None:
    raw = []
    for name in ("adapter_config.json", "bettertogether.json"):
        settings = json.loads((folder / name).read_text())
        for key in settings:
            for damaged in ({**settings, key: value}, {k: v for k, v in settings.items() if k != key}):
                (folder / name).write_text(json.dumps(damaged))
                raw += raw_errors(folder, shapes, f"{name} {key}")
        (folder / name).write_text(json.dumps(settings))
    assert raw == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "bettertogether.json"])
def test_each_file_replaced(folder: Path, shapes: dict[str, tuple[int, int]], name: str) -> None:
    raw = []
    for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"5", b"{}", b"\0" * 50, b"\xff" * 50):
        (folder / name).write_bytes(content)
        raw += raw_errors(folder, shapes, repr(content[:5]))
    (folder / name).unlink()
    (folder / name).mkdir()
    assert raw + raw_errors(folder, shapes, "a folder") == []


def test_the_header_of_the_weights_cut_and_flipped(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    raw = []
    for length in [*range(0, header, 37), header, header + 1, len(content) - 1]:
        path.write_bytes(content[:length])
        raw += raw_errors(folder, shapes, f"cut to {length}")
    numbers = random.Random(0)
    for position in [*range(8), *numbers.sample(range(8, header), 150)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << numbers.randrange(8)
        path.write_bytes(bytes(flipped))
        raw += raw_errors(folder, shapes, f"byte {position}")
    assert raw == []


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda tensor: tensor * float("nan"),
    "infinite": lambda tensor: tensor / 0,
    "integers": lambda tensor: tensor.to(torch.int8),
    "one dimension": lambda tensor: tensor.flatten(),
    "no dimension": lambda tensor: tensor.sum(),
    "empty": lambda tensor: tensor[:0],
    "cut": lambda tensor: tensor[:-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_are_no_lora_matrices_are_refused(
    folder: Path, shapes: dict[str, tuple[int, int]], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file({**tensors, key: change(tensors[key]).contiguous()}, path)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        AdapterBank("tiny", lambda: shapes).add(folder)


def test_a_file_without_weights_is_refused(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no weights"):
        AdapterBank("tiny", lambda: shapes).add(folder)


def test_a_new_adapter_takes_the_place_of_a_damaged_one_of_its_name(whole: Path, folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "r1-0000"))
    (target / "adapter_model.safetensors").write_bytes(b"")
    assert move_by_content(folder, target, content_hash(folder)) == target
    assert (target / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert not folder.exists()


def test_an_adapter_that_is_there_already_stays(whole: Path, folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(whole, tmp_path / "r1-0000"))
    (target / "README.md").write_text("mine")
    assert move_by_content(folder, target, content_hash(folder)) == target
    assert (target / "README.md").read_text() == "mine"
    assert not folder.exists()
