"""One cell of the benchmark `together.py`: a task, a seed, a side, an ablation and a model, compiled and tested."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dspy
from models import MODELS
from together_results import Cell, Outcome
from together_tasks import TASKS, Task

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    PolicyFinetune,
    PreferenceFinetune,
    TrainingConfig,
    local_lm,
)
from bettertogether.programs.program import model_names, prompts_state, with_prompts
from bettertogether.records import CELLS
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.run.selection import select
from bettertogether.steps.step import StepContext, StepResult

PAPER = ("", "p", "p -> w", "p -> w -> p")
"""The rounds of the paper's strategy, among which "returned" is chosen."""
OF_TRAINING = ("learning_rate", "epochs", "scheduler", "skeleton_weight", "balance_fields")
"""Options of an ablation that a `TrainingConfig` takes."""
STRATEGIES = {
    "ours": ["p -> w -> p", "w"],
    "repeats": ["w -> w", "w -> p"],
    "preference": ["w -> r"],
    "policy": ["w -> g"],
    "auto": "auto",
}
"""What one compile of a side runs; the common beginnings once."""


def tested(outcome: Outcome, program: dspy.Module, task: Task, test: list[dspy.Example]) -> str:
    """The key of the program's scores on the test, which are measured where no equal program's are known."""
    state = json.dumps([prompts_state(program), model_names(program)], sort_keys=True, default=str)
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    if key not in outcome.data["tests"]:
        outcome.data["tests"][key] = list(evaluate(program, test, task.metric).scores)
        outcome.keep()
    return key


class WithoutEarlier(BootstrapFewShotRS):
    """A prompt step that is not told of the prompts of earlier rounds."""

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """As `BootstrapFewShotRS.run`."""
        return super().run(student, dataclasses.replace(context, earlier=()))


def accepted(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that this version of the library has; says which it leaves out."""
    known = inspect.signature(kind).parameters
    for name in options.keys() - known.keys():
        print(f"LEFT OUT: {kind.__name__} of this version has no {name}")
    return {name: value for name, value in options.items() if name in known}


def steps(metric: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Our optimizers under an ablation. Options: train_prompt, those of the training, strengths, earlier (False: p is
    not told of earlier prompts)."""
    training = {name: options[name] for name in OF_TRAINING if name in options}
    of_w = {name: options[name] for name in ("train_prompt",) if name in options}
    of_p = {}
    if "strengths" in options:
        of_p["strengths"] = tuple(float(part) for part in options["strengths"].split(",") if part != "none")
    prompt_step = BootstrapFewShotRS if options.get("earlier", True) else WithoutEarlier
    if training:
        of_w["training"] = TrainingConfig(**accepted(TrainingConfig, training))
    return {
        "p": prompt_step(metric, **accepted(BootstrapFewShotRS, of_p)),
        "w": LoRAFinetune(metric, **accepted(LoRAFinetune, of_w)),
    }


def model_lm(model: str, task: Task) -> dspy.LM:
    """The LM of a cell."""
    if model == "fake":
        from together_fake import fake_lm

        return fake_lm(task)
    return local_lm(MODELS[model]() if model in MODELS else model, max_tokens=task.max_tokens)


def run_cell(cell: Cell, folder: Path) -> None:
    """Compile what the cell asks for, as far as it is not done, and test every round."""
    outcome = Outcome(cell, folder)
    task = TASKS[cell.task]
    train, val, test = task.data(cell.seed, cell.limit, cell.test)
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    student = task.program()
    student.set_lm(model_lm(cell.model, task))
    if cell.side == "theirs":
        from together_theirs import run_theirs

        run_theirs(outcome, task, student, (train, val, test))
    else:
        run_ours(outcome, task, student, (train, val, test), folder / "runs" / cell.name)
    outcome.keep(done=True)


def run_ours(outcome: Outcome, task: Task, student: dspy.Module, data: tuple[list, list, list], run_dir: Path) -> None:
    """All rounds of one compile, and the 2x2 of "p -> w" on the test."""
    train, val, test = data
    cell = outcome.cell
    optimizers = steps(task.metric, cell.options)
    if cell.side in ("preference", "policy"):
        optimizers |= {"r": PreferenceFinetune(task.metric), "g": PolicyFinetune(task.metric)}
    compiled = BetterTogether(task.metric, **optimizers).compile(
        student,
        trainset=train,
        valset=val,
        strategy=STRATEGIES[cell.side],
        seed=cell.seed,
        run_dir=run_dir,
        progress=False,
        on_step_error="raise",
    )
    programs = {candidate["strategy"]: candidate["program"] for candidate in compiled.candidate_programs}
    records = compiled.report.rounds
    of_paper = [record for record in records if cell.side != "ours" or record.strategy in PAPER]
    outcome.keep(
        returned=of_paper[select(of_paper)].strategy,
        returned_of_all=records[select(records)].strategy,
        warnings=list(compiled.report.warnings),
        sizes=[len(train), len(val), len(test)],
    )
    for record in records:
        started = time.monotonic()
        key = tested(outcome, programs[record.strategy], task, test)
        known = outcome.data["rounds"].get(record.strategy, {})
        outcome.data["rounds"][record.strategy] = {
            "val": record.score,
            "test": key,
            "minutes": record.ledger.seconds / 60,
            "lm_calls": record.ledger.lm_calls - record.ledger.cache_hits,
            "trained_tokens": record.ledger.trained_tokens,
            "step_gain": record.step_gain,
            "test_minutes": known.get("test_minutes", (time.monotonic() - started) / 60),
        }
        outcome.keep()
    if cell.side == "ours":
        prompted, tuned = programs["p"], programs["p -> w"]
        square = (student, with_prompts(student, prompted), with_prompts(tuned, student), with_prompts(tuned, prompted))
        outcome.keep(
            two_by_two={name: tested(outcome, program, task, test) for name, program in zip(CELLS, square, strict=True)}
        )
