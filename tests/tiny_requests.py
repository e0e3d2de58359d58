"""What the tests ask of the engine over the tiny model."""

from __future__ import annotations

from typing import Any

from dspy.lm15 import Config, Message, Request


def ask(text: str = "Hello", model: str = "local/tiny", **config: Any) -> Request:
    return Request(model, (Message.user(text),), config=Config(**{"max_tokens": 8, **config}))


def labels(*names: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"label": {"type": "string", "enum": list(names)}}, "required": ["label"]}
    return {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}
