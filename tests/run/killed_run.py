"""What the processes of `test_kill.py` do: each compiles for about two seconds."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import dspy
from fakes import learner, numbers, parity_match, parity_program, reply, right, wrong

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.engines.protocol import FinetuneResult
from bettertogether.programs.program import model_names, prompts_state
from bettertogether.testing import FakeEngine, FakeRequest

CALL_S, TRAINING_S, WRITE_S = 0.03, 0.2, 0.02


def answer(request: FakeRequest) -> str:
    number = int(request.user.split("\n")[1])
    return reply(request, parity=right(number) if learner(request, number) else wrong(number))


class SlowEngine(FakeEngine):
    """Takes its time to train, before and after the adapter is on disk."""

    def finetune(self, *arguments: Any, **options: Any) -> FinetuneResult:
        time.sleep(TRAINING_S)
        result = super().finetune(*arguments, **options)
        time.sleep(TRAINING_S)
        return result


class Started(Callback):
    def on_run_start(self, event: Any) -> None:
        sys.stdout.write("started\n")
        sys.stdout.flush()


def slow_fsync(fd: Any, fsync: Any = os.fsync) -> None:
    """Writing takes a while, so that some kills fall into it."""
    time.sleep(WRITE_S)
    fsync(fd)


def be_alone() -> None:
    """No log, and no answers of other processes."""
    logging.disable(logging.CRITICAL)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


def tell(compiled: dspy.Module, run_dir: Path) -> None:
    """Write the report and the program to RUN_DIR.json, without seconds, the place of the directory and the calls that
    were made twice."""
    report = json.loads(json.dumps(compiled.report.to_dict()).replace(str(run_dir), "RUN"))
    for record in report["rounds"]:
        record["ledger"] = {name: record["ledger"][name] for name in ("metric_calls", "trained_tokens")}
        for line in (record["details"] or {}).get("history", []):
            line.pop("tokens_per_s", None)
    outcome = {"report": report, "prompts": prompts_state(compiled), "models": model_names(compiled)}
    Path(f"{run_dir}.json").write_text(json.dumps(outcome))


def run(run_dir: Path, strategy: str = "p -> w -> p") -> None:
    """Says "started" when its work begins; when it is done, what it ended with is in RUN_DIR.json."""
    be_alone()
    os.fsync = slow_fsync
    engine = SlowEngine(answer, delay_s=lambda request: CALL_S)
    optimizer = BetterTogether(
        parity_match,
        p=BootstrapFewShotRS(parity_match, num_candidates=3, num_samples=1),
        w=LoRAFinetune(parity_match, num_samples=1),
    )
    compiled = optimizer.compile(
        parity_program(engine),
        trainset=numbers(24, start=40),
        valset=numbers(10),
        strategy=strategy,
        num_threads=8,
        run_dir=run_dir,
        callbacks=[Started()],
        progress=False,
    )
    tell(compiled, run_dir)
