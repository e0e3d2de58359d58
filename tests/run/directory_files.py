"""What the tests of run directories write and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bettertogether.records import Ledger, StepRecord

RUN = {"strategy": "p -> w", "seed": 0, "options": {"p": {"candidates": 6}}, "versions": {"dspy": "3.4.1"}}


def record(index: int, **fields: Any) -> StepRecord:
    values = {"step": "p", "strategy": "p", "status": "complete", "score": 0.5, "scores": (0.0, 1.0), **fields}
    return StepRecord(index=index, ledger=Ledger(lm_calls=3, seconds=1.5), **values)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
