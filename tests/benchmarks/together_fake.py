"""A model for trying out `together.py` in seconds: it knows the labels, and more of them with demos or training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import dspy
from together_tasks import Task

from bettertogether.lm import engine_lm
from bettertogether.testing import FakeEngine, FakeRequest


def fake_lm(task: Task, seeds: int = 10) -> dspy.LM:
    """An LM that knows the labels of the first seeds, and gives them at a fixed rate."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    for seed in range(seeds):
        for part in task.data(seed):
            known |= {_texts(example.inputs()): example.labels().toDict() for example in part}

    def answer(request: FakeRequest) -> dict[str, Any]:
        asked = next((texts for texts in known if all(text in request.user for text in texts)), ())
        rate = 0.3 + 0.2 * bool(request.demos) + 0.3 * bool(request.trained_on)
        draw = int.from_bytes(hashlib.sha256(f"{asked} {request.seed}".encode()).digest()[:4], "big") / 2**32
        names = dict((request.schema or {}).get("properties", {}))
        right = known.get(asked, {}) if draw < rate else {}
        return {name: right.get(name, _other(schema, request.schema or {})) for name, schema in names.items()}

    return engine_lm(FakeEngine(answer), cache=False, temperature=0.0)


def _texts(inputs: dspy.Example) -> tuple[str, ...]:
    return tuple(str(value) for value in inputs.toDict().values())


def _other(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
    """Any value of a field's type."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    if "enum" in schema:
        return schema["enum"][0]
    if "properties" in schema:
        return {name: _other(part, whole) for name, part in schema["properties"].items()}
    return 0 if schema.get("type") == "integer" else "nothing"
