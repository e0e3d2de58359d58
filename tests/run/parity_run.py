"""A run over numbers, for the tests of the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import numbers, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.report import CompileReport
from bettertogether.testing import FakeEngine

TRAIN, VAL = numbers(40, start=40), numbers(20)


class Step(Teleprompter):
    """Sets the instructions, or raises what is in `raises` as long as something is in it."""

    raises: list[BaseException]
    calls: int

    def __init__(self, instructions: str = "", raises: list[BaseException] | None = None) -> None:
        self.instructions = instructions
        self._raises = raises if raises is not None else []

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        if self._raises:
            raise self._raises.pop(0)
        if self.instructions:
            student.signature = student.signature.with_instructions(self.instructions)
        return student


class CutOff(Callback):
    """Interrupts the scoring of a round."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def on_progress(self, event: Any) -> None:
        if event["phase"] == self.phase and event["done"] == 5:
            raise KeyboardInterrupt


def steps(**more: Teleprompter) -> dict[str, Teleprompter]:
    p = BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False)
    w = LoRAFinetune(parity_match, num_samples=0, rescue=False)
    return {"p": p, "w": w, **more}


def compile_(
    engine: FakeEngine,
    strategy: Any = "p -> w -> p",
    *,
    optimizers: Any = None,
    metric: Any = parity_match,
    **options: Any,
) -> dspy.Module:
    arguments: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "progress": False} | options
    optimizer = BetterTogether(metric, **(optimizers or steps()))
    return optimizer.compile(parity_program(engine), strategy=strategy, **arguments)


def rounds(compiled: dspy.Module) -> list[tuple[str, str]]:
    return [(record.strategy, record.status) for record in compiled.report.rounds]


def comparable(report: CompileReport, run_dir: Path) -> Any:
    """A report without what may differ between sittings: the place of the run directory, seconds, and the calls that
    a second sitting makes again because the runs that steps share were lost with the first."""
    text = json.dumps(report.to_dict()).replace(str(run_dir), "RUN")
    data = json.loads(text)
    for record in data["rounds"]:
        # An engine serves an adapter from the folder of the first run that made it, which has one of its own too.
        names = {model: Path(folder).name for model, folder in record["adapter_folders"].items()}
        assert all((run_dir / "adapters" / name).is_dir() for name in names.values())
        record["adapter_folders"] = names
        record["ledger"] = {name: record["ledger"][name] for name in ("metric_calls", "trained_tokens")}
    return data
