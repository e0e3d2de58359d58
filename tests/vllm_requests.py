"""What the tests of the vLLM engine ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from dspy.lm15 import Config, Message, Request

from bettertogether.engines import VLLMEngine
from bettertogether.engines.protocol import TrainingRow
from bettertogether.training.config import LoRAConfig, TrainingConfig

SHORT = TrainingConfig(epochs=1, learning_rate=1e-2)


def request(engine: VLLMEngine, word: str = "red", model: str | None = None, **config: Any) -> Request:
    message = Message.user(f"What is {word}?")
    return Request(model or f"local/{engine.base_name}", (message,), config=Config(**{"max_tokens": 8, **config}))


def seen(engine: VLLMEngine) -> list[dict[str, Any]]:
    return httpx.get(f"{engine.server.address()[0]}/seen").json()


def told(engine: VLLMEngine) -> list[str]:
    return httpx.get(f"{engine.server.address()[0]}/told").json()


def rows(engine: VLLMEngine) -> list[TrainingRow]:
    return [TrainingRow(engine.messages(request(engine, word)), "a colour") for word in ("red", "blue")]


def train(engine: VLLMEngine, folder: Path, **options: Any) -> str:
    options = {"lora": LoRAConfig(rank=4), "training": SHORT, **options}
    return engine.finetune(rows(engine), folder=folder, **options).model
