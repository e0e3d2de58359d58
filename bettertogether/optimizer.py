"""`BetterTogether`: prompt optimization and fine-tuning in turn, every round scored, the best program returned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from .callbacks import events
from .callbacks.display import ProgressDisplay
from .checks import require, require_switch
from .printable import get_logger
from .rollouts.metrics import Metric, require_metric
from .run.asked import asking
from .run.budget import Budget
from .run.directory import RunDirectory, checked_folder, new_run_directory
from .run.estimate import Estimate, estimate
from .run.plan import OnStepError, Plan
from .run.sitting import carry_out
from .steps.prompt_step import BootstrapFewShotRS
from .steps.step import apart
from .steps.weight_step import LoRAFinetune

logger = get_logger(__name__)


class BetterTogether(Teleprompter):
    """A drop-in for `dspy.BetterTogether` that trains on this machine. Algorithm 1 of the paper (arXiv 2407.10930).

    Args:
        metric: `(example, prediction, trace=None)` to a bool, a number or `Prediction(score, feedback)`; higher is
            better. GEPA's five-argument metrics work too.
        optimizers: Any Teleprompter under any key; the keys are the steps that a strategy names. None given:
            `p=BootstrapFewShotRS(metric)` and `w=LoRAFinetune(metric)`.

    Examples:
        >>> student.set_lm(bettertogether.local_lm("HuggingFaceTB/SmolLM2-135M-Instruct"))
        >>> compiled = BetterTogether(metric).compile(student, trainset=trainset, valset=valset)
        >>> print(compiled.report)
    """

    def __init__(self, metric: Metric, **optimizers: Teleprompter) -> None:
        require_metric(metric)
        for key, optimizer in optimizers.items():
            if not isinstance(optimizer, Teleprompter):
                given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
                raise TypeError(f"Optimizer '{key}' must be a Teleprompter, got {given}")
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
        on_step_error: OnStepError = "return",
        two_by_two: bool = True,
        max_rounds: int = 6,
    ) -> dspy.Module:
        """Run the strategy and return the best program. Student and teacher are not changed, nor what their modules
        keep in lists, dicts, sets and pydantic models; functions and objects of other classes are shared with the
        copies that run, with all that they hold.

        Args:
            student: Program with an LM on every predictor (`student.set_lm(lm)`).
            trainset: Examples to learn from, with `.with_inputs(...)`.
            teacher: Program(s) of the same structure whose runs are learned from instead of the student's.
            valset: Examples that every round is scored on; None: `valset_ratio` of the trainset, drawn at random.
            num_threads, max_errors, seed: Handed to every step that takes them, in place of its own (and of
                `TrainingConfig.seed`); None: each step's own. Threads default to what the local engine likes to have
                in flight; `max_errors` counts examples that raised, not unparseable answers.
            provide_traceback: Handed to the steps that take it.
            valset_ratio: Share of the trainset held out without a valset; 0: rounds are not scored.
            shuffle_trainset_between_steps: Give each step the trainset in another order.
            strategy: Steps joined by "->"; or a list of strategies, whose common beginnings run once; or "auto":
                after each round, what its scores and the 2x2 call for (run/auto.py), and the report says why;
                `max_rounds` at most.
            optimizer_compile_args: Key to further arguments of that optimizer's `compile`, which win.
            run_dir: Where records, adapters and the report go; the same call on the same directory goes on after the
                last finished step. With another strategy, neither being "auto", it takes the rounds that are done, and
                reports on and returns those of its own. Another call (other data, options, code of the program or of
                the metric) is refused with the difference, other than in optimizers of which no step has finished.
                None: a new run in a directory of its own under the cache, which the display and the log name.
            callbacks, progress: Who watches; the progress display unless `progress=False`.
            budget: Stops between units of work, with the best so far.
            on_step_error: "return": a failing step ends the run with the best program so far, and
                `flag_compilation_error_occurred` is set; so does Ctrl-C in a step, without the flag. "raise": both
                raise, with everything kept for going on.
            two_by_two: After a weight step whose prompts are not the student's, also score {base, tuned} weights x
                {old, new} prompts.

        Returns:
            The program, with `candidate_programs` (dicts with score in percent, program and strategy; best first),
            `flag_compilation_error_occurred` and `report` (a `CompileReport`).

        Raises:
            StrategyError, DataError, ProgramError, NotTrainableError, MissingExtraError, RunDirectoryError: before any
                work.
            ConfigError: before any work; and after the student was scored, where the metric goes below 0, or above 1
                and a step has no `threshold`. Without a valset the step fails that meets such a score; below 0, one
                that compares by it.
            TooManyErrors: when the untouched student fails on more than `max_errors` examples.
        """
        plan = Plan.of(
            self.optimizers,
            self.metric,
            student=student,
            trainset=trainset,
            teacher=teacher,
            valset=valset,
            num_threads=num_threads,
            max_errors=max_errors,
            provide_traceback=provide_traceback,
            seed=seed,
            valset_ratio=valset_ratio,
            shuffle_trainset_between_steps=shuffle_trainset_between_steps,
            strategy=strategy,
            optimizer_compile_args=optimizer_compile_args,
            on_step_error=on_step_error,
            two_by_two=two_by_two,
            max_rounds=max_rounds,
        )
        events.require_callbacks(callbacks)
        require_switch("progress", progress)
        limits = "bettertogether.Budget(minutes=..., metric_calls=..., tokens=..., cost=...), or None for no limit"
        require(isinstance(budget, Budget | None), "budget", budget, limits)
        folder = new_run_directory() if run_dir is None else checked_folder(run_dir)
        watchers = [*([ProgressDisplay()] if progress else []), *callbacks]
        # What is configured meanwhile, in another thread, is none of this run's.
        with dspy.context(), asking(plan) as asked, RunDirectory.open(folder, asked) as directory:
            logger.info("Run directory: %s. The same call with run_dir=%r goes on with this run.", folder, str(folder))
            with events.listening(watchers):
                return carry_out(plan, directory, asked, budget or Budget())

    def estimate(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int | None = None,
        valset_ratio: float = 0.1,
        strategy: str | Sequence[str] = "p -> w -> p",
        optimizer_compile_args: Mapping[str, Mapping[str, Any]] | None = None,
        two_by_two: bool = True,
        max_rounds: int = 6,
    ) -> Estimate:
        """What `compile` with these arguments will take on this machine: calls, tokens, minutes, cost and memory.

        The steps say what they will do at least, likely and at most; what that takes is measured by running up to 16
        examples of the trainset with and without demos, 4 with a teacher, and by training for two steps. The program's
        tools and the metric are called for that, and paid LMs are paid. Nothing is kept: no run directory, no adapter,
        no answer in DSPy's cache; the student is not changed. Raises as `compile` does before any work, TooManyErrors
        and TrainingError.
        """
        plan = Plan.of(
            self.optimizers,
            self.metric,
            student=student,
            trainset=trainset,
            teacher=teacher,
            valset=valset,
            num_threads=num_threads,
            max_errors=max_errors,
            provide_traceback=None,
            seed=seed,
            valset_ratio=valset_ratio,
            shuffle_trainset_between_steps=True,
            strategy=strategy,
            optimizer_compile_args=optimizer_compile_args,
            on_step_error="return",
            two_by_two=two_by_two,
            max_rounds=max_rounds,
        )
        with apart():
            return estimate(plan)
