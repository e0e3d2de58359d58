"""A server of ours while an adapter is trained: asleep where it can, stopped where it can't."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dspy.lm15 import Config, Message, Request
from running_vllm import FAKE
from vllm_requests import told

from bettertogether.engines import VLLMEngine
from bettertogether.engines.loading import read_card
from bettertogether.engines.protocol import TrainingRow
from bettertogether.engines.vllm.options import VLLMOptions, server_options_for
from bettertogether.training.config import LoRAConfig, TrainingConfig


@pytest.fixture
def engine(folder: Path) -> Iterator[VLLMEngine]:
    made = VLLMEngine(folder, command=FAKE, server_options={"enable_sleep_mode": True})
    yield made
    made.close()


def request(engine: VLLMEngine, model: str | None = None) -> Request:
    message = Message.user("What is red?")
    return Request(model or f"local/{engine.base_name}", (message,), config=Config(max_tokens=8))


def test_it_sleeps_while_an_adapter_is_trained_and_is_not_started_again(engine: VLLMEngine, tmp_path: Path) -> None:
    before = engine.complete(request(engine)).text
    during: list[list[str]] = []
    name = engine.finetune(
        [TrainingRow(engine.messages(request(engine)), "a colour")] * 2,
        lora=LoRAConfig(rank=4),
        training=TrainingConfig(epochs=1),
        folder=tmp_path,
        on_progress=lambda line: during.append(told(engine)),
    ).model
    assert during
    assert all(each == ["sleep"] for each in during)
    assert engine.complete(request(engine)).text == before
    engine.complete(request(engine, name))
    assert told(engine) == ["sleep", "wake_up", f"load {name}"]
    assert engine.server.starts == 1


def test_a_version_that_can_not_sleep_is_stopped_and_started_again(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_SLEEPLESS", "1")
    engine.complete(request(engine))
    engine.server.pause()
    assert engine.server.process is None
    engine.server.resume()
    assert engine.complete(request(engine)).text
    assert engine.server.starts == 2


def test_one_that_ends_in_its_sleep_is_started_again(engine: VLLMEngine) -> None:
    engine.complete(request(engine))
    engine.server.pause()
    assert engine.server.process is not None
    engine.server.process.stop()
    engine.server.resume()
    assert engine.complete(request(engine)).text
    assert engine.server.starts == 2


@pytest.mark.parametrize(
    ("given", "sleeps"),
    [
        ({}, True),
        ({"stop_while_training": False}, None),
        ({"server_options": {"enable_sleep_mode": False}}, False),
        ({"url": "http://x"}, None),
    ],
)
def test_on_cuda_a_server_of_ours_is_started_so_that_it_can_sleep(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], sleeps: bool | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert server_options_for(read_card(folder), VLLMOptions(**given)).get("enable_sleep_mode") is sleeps


def test_without_cuda_it_is_started_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "enable_sleep_mode" not in server_options_for(read_card(folder), VLLMOptions())
