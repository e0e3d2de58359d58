"""`BetterTogether`: prompt optimization and fine-tuning in turn, every round scored, the best program returned."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from .callbacks import events
from .callbacks.display import ProgressDisplay
from .errors import ConfigError, NotTrainableError, ProgramError
from .files import json_text
from .printable import get_logger
from .programs.copies import copy_program
from .programs.program import as_programs, predictors_of, require_program
from .records import Ledger
from .report.report import CompileReport
from .rollouts.failures import all_raised
from .rollouts.metrics import Metric, require_metric
from .run import strategy as strategies
from .run.arguments import check_compile_args, check_options
from .run.asked import as_before, asked_of, machine, strategy_text, versions
from .run.budget import Budget
from .run.directory import RunDirectory, checked_folder, default_run_directory
from .run.held_out import split_valset
from .run.loop import Loop, Plan, final_program
from .run.selection import rank, select
from .steps.prompt_step import BootstrapFewShotRS
from .steps.weight_step import LoRAFinetune

logger = get_logger(__name__)


class BetterTogether(Teleprompter):
    """A drop-in for `dspy.BetterTogether` that trains on this machine. Algorithm 1 of the paper (arXiv 2407.10930).

    Args:
        metric: `(example, prediction, trace=None)` to a bool, a number or `Prediction(score, feedback)`; higher is
            better. GEPA's five-argument metrics work too.
        optimizers: Any Teleprompter under any key; the keys are the steps that a strategy names. None given:
            `p=BootstrapFewShotRS(metric)` and `w=LoRAFinetune(metric)`.

    Example:
        >>> student.set_lm(bettertogether.local_lm("HuggingFaceTB/SmolLM2-135M-Instruct"))
        >>> compiled = BetterTogether(metric).compile(student, trainset=trainset, valset=valset)
        >>> print(compiled.report)
    """

    def __init__(self, metric: Metric, **optimizers: Teleprompter) -> None:
        require_metric(metric)
        for key, optimizer in optimizers.items():
            if not isinstance(optimizer, Teleprompter):
                raise TypeError(f"Optimizer '{key}' must be a Teleprompter, got {type(optimizer).__name__}")
        self.metric = metric
        self.optimizers: dict[str, Teleprompter] = dict(optimizers) or {
            "p": BootstrapFewShotRS(metric),
            "w": LoRAFinetune(metric),
        }

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        num_threads: int | None = None,
        max_errors: int | None = None,
        provide_traceback: bool | None = None,
        seed: int | None = None,
        valset_ratio: float = 0.1,
        shuffle_trainset_between_steps: bool = True,
        strategy: str | Sequence[str] = "p -> w -> p",
        optimizer_compile_args: Mapping[str, Mapping[str, Any]] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        callbacks: Sequence[events.Callback] = (),
        progress: bool = True,
        budget: Budget | None = None,
        on_step_error: Literal["return", "raise"] = "return",
        two_by_two: bool = True,
        max_rounds: int = 6,
    ) -> dspy.Module:
        """Run the strategy and return the best program. Student and teacher are not changed.

        Args:
            student: Program with an LM on every predictor (`student.set_lm(lm)`).
            trainset: Examples to learn from, with `.with_inputs(...)`.
            teacher: Program(s) of the same structure whose runs are learned from instead of the student's.
            valset: Examples that every round is scored on; None: `valset_ratio` of the trainset, drawn at random.
            num_threads, max_errors, seed: Handed to every step that takes them. Threads default to what the local
                engine likes to have in flight; `max_errors` counts examples that raised, not unparseable answers.
            provide_traceback: Handed to the steps that take it.
            valset_ratio: Share of the trainset held out without a valset; 0: rounds are not scored.
            shuffle_trainset_between_steps: Give each step the trainset in another order.
            strategy: Steps joined by "->"; or a list of strategies, whose common beginnings run once; or "auto":
                alternate while a round gains more than its noise, `max_rounds` at most.
            optimizer_compile_args: Key to further arguments of that optimizer's `compile`, which win.
            run_dir: Where records, adapters and the report go; the same call on the same directory goes on after the
                last finished step, and another call (other data, options, code of the program or of the metric) is
                refused with the difference, other than in optimizers of which no step has finished. None: a new run in
                a directory of its own under the cache, which the log names.
            callbacks, progress: Who watches; the progress display unless `progress=False`.
            budget: Stops between units of work, with the best so far.
            on_step_error: "return": a failing step ends the run with the best program so far, and
                `flag_compilation_error_occurred` is set; "raise": raises, with everything kept for going on.
            two_by_two: After a weight step also score {base, tuned} weights x {old, new} prompts.

        Returns:
            The program, with `candidate_programs` (dicts with score in percent, program and strategy; best first),
            `flag_compilation_error_occurred` and `report` (a `CompileReport`).

        Raises:
            StrategyError, DataError, ProgramError, ConfigError, NotTrainableError, RunDirectoryError: before any work.
            TooManyErrors: when the untouched student fails on more than `max_errors` examples.
        """
        plan, warnings = self._plan(locals())
        folder = _new_directory() if run_dir is None else checked_folder(run_dir)
        with _asking(plan, folder) as asked, RunDirectory.open(folder, asked) as directory:
            logger.info("Run directory: %s. The same call with run_dir=%r goes on with this run.", folder, str(folder))
            watchers = [*([ProgressDisplay()] if progress else []), *callbacks]
            with events.listening(watchers):
                return self._run(plan, directory, asked, warnings, budget or Budget())

    def _plan(self, arguments: dict[str, Any]) -> tuple[Plan, list[str]]:
        """Check every argument of `compile` before any work."""
        student = require_program(arguments["student"])
        if getattr(student, "_compiled", False):
            raise ProgramError(
                "The student program should not be compiled. Set `student._compiled = False` to go on optimizing it."
            )
        check_options(arguments)
        seed = int(arguments["seed"] or 0)
        auto = arguments["strategy"] == strategies.AUTO and strategies.AUTO not in self.optimizers
        parsed = () if auto else strategies.parse(arguments["strategy"], self.optimizers)
        compile_args = check_compile_args(arguments["optimizer_compile_args"], self.optimizers)
        teachers = _teachers(student, arguments["teacher"])
        trainset, valset, warnings = split_valset(
            arguments["trainset"], arguments["valset"], arguments["valset_ratio"], seed
        )
        used = {key for steps in parsed for key in steps} if parsed else set(self.optimizers)
        for key in sorted(used):
            _check_trainable(self.optimizers[key], key, student)
            if teachers and isinstance(self.optimizers[key], dspy.GEPA):
                raise ConfigError(
                    f"GEPA does not accept a teacher argument. Please remove the teacher argument, or step {key!r}."
                )
        plan = Plan(
            student=copy_program(student),
            trainset=trainset,
            valset=valset,
            teachers=teachers,
            metric=self.metric,
            optimizers={key: optimizer for key, optimizer in self.optimizers.items() if key in used},
            strategies=parsed,
            auto=auto,
            max_rounds=arguments["max_rounds"],
            seed=seed,
            num_threads=arguments["num_threads"],
            max_errors=arguments["max_errors"],
            provide_traceback=arguments["provide_traceback"],
            shuffle=arguments["shuffle_trainset_between_steps"],
            compile_args=compile_args,
            on_step_error=arguments["on_step_error"],
            two_by_two=arguments["two_by_two"],
        )
        return plan, warnings

    def _run(
        self,
        plan: Plan,
        directory: RunDirectory,
        asked: Mapping[str, Any],
        warnings: list[str],
        budget: Budget,
    ) -> dspy.Module:
        finished = [record for record in directory.records() if record.status == "complete"]
        text = strategy_text(plan)
        events.emit(
            "run_start",
            {
                "strategy": text,
                "rounds": ["", *map(strategies.join, strategies.prefixes(plan.strategies))],
                "finished": finished,
                "run_dir": str(directory.path),
                "params": asked,
            },
        )
        for warning in warnings:
            events.warn(warning)
        meter = budget.start(sum((record.ledger for record in finished), Ledger()))
        loop = Loop(plan, directory, meter, warnings=list(warnings))
        with events.run_end_on_error():
            loop.run()
            report = self._report(loop, plan, text)
            directory.write_text("report.json", json_text(report.to_dict()))
            report.to_html(directory.report)
            if loop.error is None:
                directory.finish()
        events.emit("run_end", {"report": report, "error": None if loop.error is None else repr(loop.error)})
        records = report.rounds
        candidates = [
            {
                "score": None if (score := records[i].score) is None else round(100 * score, 2),
                "program": loop.programs[records[i].strategy],
                "strategy": records[i].strategy,
            }
            for i in rank(records, report.selected)
        ]
        best = loop.programs[records[report.selected].strategy]
        failed = any(record.status == "failed" or all_raised(record) for record in records)
        return final_program(best, candidates, failed, report)

    def _report(self, loop: Loop, plan: Plan, strategy: str) -> CompileReport:
        data_warnings = [f"{record.strategy}: {warning}" for record in loop.records for warning in record.warnings]
        return CompileReport(
            rounds=tuple(loop.records),
            selected=select(loop.records),
            valset_size=len(plan.valset),
            strategy=strategy,
            seed=plan.seed,
            versions=versions(),
            machine=machine(),
            warnings=(*loop.warnings, *data_warnings),
        )


def _teachers(student: dspy.Module, teacher: dspy.Module | Sequence[dspy.Module] | None) -> list[dspy.Module]:
    if not isinstance(teacher, dspy.Module | Sequence | None) or isinstance(teacher, str | bytes):
        raise ProgramError(f"teacher must be a dspy.Module or a list of them, got {type(teacher).__name__}.")
    given = as_programs(teacher)
    names = predictors_of(student).keys()
    for each in given:
        other = predictors_of(require_program(each, "teacher")).keys()
        if other != names:
            raise ProgramError(
                f"A teacher must have the student's predictors {sorted(names)}, this one has {sorted(other)}."
            )
    return [copy_program(each) for each in given]


def _check_trainable(optimizer: Teleprompter, key: str, student: dspy.Module) -> None:
    if isinstance(optimizer, LoRAFinetune):
        optimizer.trainable(student)
        return
    if not isinstance(optimizer, dspy.BootstrapFinetune):
        return
    for name, predictor in predictors_of(student).items():
        provider = getattr(predictor.lm, "provider", None)
        if not getattr(provider, "finetunable", False):
            raise NotTrainableError(
                f"Step {key!r} fine-tunes, but the LM {predictor.lm.model!r} of predictor {name!r} has no provider "
                "that trains: use bettertogether.local_lm(folder_or_hub_id), or a dspy.LM with such a provider."
            )


def _new_directory() -> Path:
    """A folder under the cache that no run has yet."""
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return default_run_directory(f"{started}-{uuid.uuid4().hex[:8]}")


_LEFT: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
"""Run directory to what was asked there, before the latest run of this process and after it."""


@contextlib.contextmanager
def _asking(plan: Plan, run_dir: Path) -> Iterator[dict[str, Any]]:
    """What a call asks for. What the run itself changes (a counter of the metric, notes of an optimizer) makes the
    next call of this process no other one."""
    text = strategy_text(plan)
    now = asked_of(plan, text)
    asked = as_before(now, *_LEFT[run_dir]) if run_dir in _LEFT else now
    try:
        yield asked
    finally:
        _LEFT[run_dir] = asked, asked_of(plan, text)
