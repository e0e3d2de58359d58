"""Saved programs to test with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
from fakes import learner, numbers, parity_engine, parity_program, plain_lm

from bettertogether.engines.protocol import FinetuneResult, TrainingRow
from bettertogether.testing import FakeEngine


def tuned(engine: FakeEngine, answer: str = "a") -> FinetuneResult:
    return engine.finetune([TrainingRow(({"role": "user", "content": "q"},), answer)])


def tuned_program(engine: FakeEngine) -> dspy.Predict:
    """Parity with new instructions, demos and an adapter."""
    program = parity_program(engine)
    program.signature = program.signature.with_instructions("Even or odd? Think of the last digit.")
    program.demos = numbers(3)
    program.set_lm(plain_lm(engine, tuned(engine).model, temperature=0.5, max_tokens=20))
    return program


def fresh_engine() -> FakeEngine:
    """The same base on another machine: it holds no adapter yet."""
    return parity_engine(learner)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifact.json").read_text())


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_of(folder)
    edit(manifest)
    (folder / "artifact.json").write_text(json.dumps(manifest))
