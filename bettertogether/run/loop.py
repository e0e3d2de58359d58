"""The loop: run the steps of a strategy, score every round, record it, go on where an earlier sitting stopped."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from ..callbacks import events
from ..errors import ArtifactError, BetterTogetherError, BudgetExceeded, RunDirectoryError, TooManyErrors
from ..printable import get_logger
from ..programs.copies import drop_results
from ..programs.program import model_names, prompts_state, same_prompts, with_prompts
from ..records import ARROW, CELLS, Ledger, PromptDetails, StepRecord
from ..redaction import masked, remember_asked
from ..rollouts.evaluation import Evaluation, Evaluator, Kind
from ..rollouts.failures import all_raised, no_difference, round_warnings
from ..rollouts.labels import label_fields
from ..rollouts.metrics import FULL_MARK, is_above_one
from ..rollouts.rollout import stable_seed
from ..steps.step import StepContext, StepResult, as_step
from ..working_folders import kept_working_folders
from . import auto, strategy
from .any_optimizer import in_turn, run_any
from .asked import at_work
from .budget import BudgetMeter, BudgetWatch
from .directory import DAMAGE, RunDirectory
from .earlier import earlier_programs
from .plan import Plan
from .restoring import Restoring, adapter_folders, is_restorable
from .scores import with_scores
from .strategy import Steps

logger = get_logger(__name__)


@dataclass
class Loop:
    """One sitting of a run."""

    plan: Plan
    directory: RunDirectory
    meter: BudgetMeter
    records: list[StepRecord] = field(default_factory=list)
    programs: dict[str, dspy.Module] = field(default_factory=dict)
    """Strategy prefix to the program after it."""
    warnings: list[str] = field(default_factory=list)
    stopped: str = ""
    """Why "auto" stopped."""
    error: BaseException | None = None
    """What ended the run early."""
    _why: str = ""
    """Why "auto" chose the round under way."""

    def __post_init__(self) -> None:
        self._restoring = Restoring(self.plan.student, self.directory.adapters)

    def run(self) -> None:
        """Run what is left to do. Afterwards `records` and `programs` hold every round; a failed or interrupted step
        is the last record. Raises what the scoring of the untouched student raises."""
        earlier = self.directory.rounds()
        if not self._student(earlier.get("")):
            return
        step = self._next(())
        while step is not None:
            if not self._finish(step, earlier.get(strategy.join(step))):
                return
            step = self._next(step)
        if warning := no_difference(self.records, self._full_mark()):
            self._warn(warning)

    def _next(self, last: Steps) -> Steps | None:
        if not self.plan.auto:
            todo = [p for p in strategy.prefixes(self.plan.strategies) if strategy.join(p) not in self.programs]
            return todo[0] if todo else None
        labelled = bool(label_fields(self.plan.trainset))
        decision = auto.decide(
            self.records,
            self.plan.optimizers,
            max_rounds=self.plan.max_rounds,
            labelled=labelled,
            full_mark=self._full_mark(),
        )
        logger.info("%s.", decision)
        if decision.key is None:
            self.stopped = decision.why
            return None
        self._why = decision.why
        return (*last, decision.key)

    def _student(self, earlier: StepRecord | None) -> bool:
        """Score or restore the untouched student; False when the budget does not reach that far."""
        events.emit("step_start", {"index": 0, "step": "", "strategy": ""})
        started = time.monotonic()
        self.programs[""] = self.plan.student
        if earlier is not None:
            self._take(earlier)
            self.plan.check_scale(self.records[0].scores or ())
            return True
        record, watch = self._record(0, (), StepResult(self.plan.student, Ledger()), started), BudgetWatch(self.meter)
        try:
            self.meter.check()
            with events.listening([watch]):
                scored = self._evaluate(self.plan.student, "untouched student")
        except BudgetExceeded as error:
            self.error = error
            # Not on disk, so that a larger budget scores the student.
            reason = f"{error} {self.directory.how_to_go_on(error)}"
            self.records.append(replace(record, status="skipped", error=reason, ledger=watch.spent))
            self.warnings.append(f"The run ended while the untouched student was scored: {reason}")
            events.emit("step_end", {"record": self.records[0]})
            return False
        self._keep(with_scores(record, scored, {}, started))
        self.plan.check_scale(self.records[0].scores or ())
        return True

    def _finish(self, steps: Steps, earlier: StepRecord | None) -> bool:
        """Run or restore one step; False when the run ends here."""
        name = strategy.join(steps)
        index = len(self.records)
        events.emit("step_start", {"index": index, "step": steps[-1], "strategy": name})
        done = earlier if earlier is not None and earlier.program is not None else None
        if done is not None:
            self.programs[name] = self._restored(done)
        started, watch = time.monotonic(), BudgetWatch(self.meter)
        try:
            if done is not None:
                self._take(done)
                return True
            self.meter.check()
            with events.listening([watch]):
                self._run(index, steps, started, watch.charge)
            return True
        except (Exception, KeyboardInterrupt) as error:
            self._end(index, steps, error, watch.spent)
            if self.plan.on_step_error == "raise" and not isinstance(error, BudgetExceeded):
                raise
        return False

    def _run(self, index: int, steps: Steps, started: float, charge: Callable[[Ledger], None]) -> None:
        name, parent = strategy.join(steps), self.programs[strategy.join(steps[:-1])]
        done = self._unscored(name)
        if done is None:
            self.directory.begin(name)
            result = self._step(steps, parent, charge)
            record, program = self._record(index, steps, result, started), result.program
            self.directory.note_spent(self.meter.used)
            self.directory.set_aside(record)
        else:
            record, program = replace(done[0], index=index), done[1]
            started -= record.ledger.seconds
        record, ended = self._scored(record, parent, program, started)
        self.programs[name] = program
        if ended is not None:
            # The round counts without its 2x2, which the next call makes up for.
            self._add(record)
            raise ended
        self._keep(record)

    def _scored(
        self, record: StepRecord, parent: dspy.Module, program: dspy.Module, started: float
    ) -> tuple[StepRecord, BaseException | None]:
        """The record with the scores of its round, and what ended those of its 2x2."""
        scored = self._evaluate(program, record.strategy or "untouched student")
        # A prompt step may change the strength of adapters, but trains none.
        tuned = not isinstance(record.details, PromptDetails) and model_names(parent) != record.models
        measured = self.plan.two_by_two and tuned and scored is not None
        cells, warnings, ended = dict[str, Evaluation](), list[str](), None
        try:
            cells = self._two_by_two(parent, program) if measured else {}
        except TooManyErrors as error:
            warnings = [f"The 2x2 was not measured: {error}"]
        except (BudgetExceeded, KeyboardInterrupt) as error:
            ended = error
        return with_scores(record, scored, cells, started, warnings), ended

    def _unscored(self, name: str) -> tuple[StepRecord, dspy.Module] | None:
        """What the step gave in an earlier sitting that ended while its round was scored."""
        record = self.directory.unscored
        if record is None or record.strategy != name or record.program is None:
            return None
        try:
            program = self._restoring.program(record)
        except (BetterTogetherError, *DAMAGE) as error:
            logger.warning("Step %r runs again, as what it gave can't be read any more: %s", name, error)
            return None
        logger.info("Step %r was done; its round is scored now.", name)
        return record, program

    def _step(self, steps: Steps, parent: dspy.Module, charge: Callable[[Ledger], None]) -> StepResult:
        plan, key = self.plan, steps[-1]
        optimizer, given = plan.optimizers[key], plan.compile_args.get(key, {})
        context = StepContext(
            trainset=self._trainset(steps),
            # A list of its own, as the trainset: one that a step shuffled would be scored in another order.
            valset=list(plan.valset) or None,
            teachers=plan.teachers,
            restart_from=plan.student,
            earlier=earlier_programs(parent, self._rounds_before(steps)),
            folder=self.directory.adapters,
            settings=plan.settings,
        )
        step = as_step(optimizer)
        if step is None:
            with in_turn(optimizer), at_work(optimizer):
                return run_any(optimizer, parent, context, given, plan.provide_traceback, charge)
        context = step.sparing(context, is_tuned=model_names(parent) != model_names(plan.student))
        with at_work(optimizer), kept_working_folders(self.directory.adapters):
            result = step.run_seen(parent, context.with_arguments(given))
        drop_results(result.program)
        return result

    def _rounds_before(self, steps: Steps) -> list[StepRecord]:
        """The records that led to a step, the student's left out."""
        before = [strategy.join(steps[:length]) for length in range(1, len(steps))]
        return [record for record in self.records if record.strategy in before]

    def _trainset(self, steps: Steps) -> list[dspy.Example]:
        trainset = list(self.plan.trainset)
        if self.plan.shuffle:
            # By the place in its own strategy, so that a step does the same whatever other strategies are asked for.
            random.Random(stable_seed(self.plan.seed, "shuffle", len(steps))).shuffle(trainset)
        return trainset

    def _evaluate(self, program: dspy.Module, phase: str) -> Evaluation | None:
        scored = self._evaluate_many([program], f"score {phase}", "eval_full")
        return scored[0] if scored else None

    def _evaluate_many(self, programs: Sequence[dspy.Module], phase: str, kind: Kind) -> list[Evaluation]:
        """Each program on the valset; empty without one."""
        plan = self.plan
        if not plan.valset:
            return []
        return Evaluator(plan.metric, plan.settings).evaluate(programs, plan.valset, phase, kind)

    def _two_by_two(self, parent: dspy.Module, tuned: dspy.Module) -> dict[str, Evaluation]:
        """Evaluations of {base, tuned weights} x {the student's prompts, the prompts before this step}, where those
        differ."""
        student = self.plan.student
        if same_prompts(parent, student):
            return {}
        programs = {
            "base_old": student,
            "base_new": with_prompts(student, parent),
            "tuned_old": with_prompts(tuned, student),
            "tuned_new": with_prompts(tuned, parent),
        }
        scored = self._evaluate_many([programs[cell] for cell in CELLS], "score the 2x2", "eval_2x2")
        return dict(zip(CELLS, scored, strict=True))

    def _record(self, index: int, steps: Steps, result: StepResult, started: float) -> StepRecord:
        """Of a step whose round is not scored yet."""
        return StepRecord(
            index=index,
            step=steps[-1] if steps else "",
            strategy=strategy.join(steps),
            status="complete",
            why=self._why,
            step_gain=result.step_gain,
            ledger=result.ledger.with_seconds(time.monotonic() - started),
            details=result.details,
            warnings=result.warnings,
            adapter_folders=adapter_folders(result.program),
            program=self._saved_prompts(steps, result.program),
            models=model_names(result.program),
        )

    def _saved_prompts(self, steps: Steps, program: dspy.Module) -> dict[str, Any] | None:
        """The prompts as JSON; None where they are not all there is to the program, or can't be saved."""
        name = strategy.join(steps)
        try:
            prompts = prompts_state(program)
        except ArtifactError as error:
            self._warn(f"Round {name!r} can't be restored by a later call, nor its program saved: {error}")
            return None
        if not steps or is_restorable(program, self.plan.student, prompts):
            return prompts
        self._warn(f"Round {name!r} changed more of the program than prompts and weights: a later call runs it again.")
        return None

    def _keep(self, record: StepRecord) -> None:
        """Write a round down, and take it also where the disk is full."""
        try:
            self.directory.note_spent(self.meter.used)
            self.directory.append(record)
        finally:
            self._add(record)

    def _add(self, record: StepRecord) -> None:
        """Take a round, and say at once what is meaningless in it."""
        self.records.append(record)
        for warning in round_warnings(self.records, self._full_mark()):
            if warning not in self.warnings:
                self._warn(warning)
        events.emit("step_end", {"record": record})

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        events.warn(text)

    def _full_mark(self) -> float:
        """The score that can't be bettered, as far as it is known: of a metric that goes above 1 by the thresholds."""
        marks = [each for each in self.plan.thresholds.values() if each is not None]
        highest = max((score for record in self.records for score in record.scores or ()), default=0.0)
        return max([FULL_MARK, *marks]) if marks or not is_above_one(highest) else math.inf

    def _end(self, index: int, steps: Steps, error: Exception | KeyboardInterrupt, spent: Ledger) -> None:
        name = strategy.join(steps)
        remember_asked(error)
        skipped = isinstance(error, BudgetExceeded | KeyboardInterrupt)
        if skipped:
            said = "interrupted." if isinstance(error, KeyboardInterrupt) else str(error)
            text = f"{said} {self.directory.how_to_go_on(error)}"
        else:
            text = "".join(traceback.format_exception(error))
        record = StepRecord(
            index=index,
            step=steps[-1],
            strategy=name,
            status="skipped" if skipped else "failed",
            why=self._why,
            error=masked(text),
            ledger=spent,
        )
        self.error = error
        kind = type(error).__name__
        reason = masked(f"{kind}: {error}") if str(error) else kind
        self.warnings.append(
            f"The run ended at {name!r}: {reason.rstrip('.')}. {self.directory.how_to_go_on(error, steps[-1])}"
        )
        expected = isinstance(error, BetterTogetherError | KeyboardInterrupt)
        logger.error("Step %r did not finish: %s", name, reason, exc_info=None if expected else error)
        if name not in self.programs:
            self._keep(record)

    def _restored(self, record: StepRecord) -> dspy.Module:
        """The program of a finished step of an earlier sitting."""
        try:
            return self._restoring.program(record)
        except BetterTogetherError:
            raise
        except DAMAGE as error:
            path = self.directory.path / "records.jsonl"
            raise RunDirectoryError(
                f"{path}: the program of {record.name!r} is damaged ({error!r}): restore the file, or give "
                "another run_dir."
            ) from error

    def _take(self, record: StepRecord) -> None:
        """Take a round of an earlier sitting, whose program is there."""
        record, ended = replace(record, index=len(self.records)), None
        try:
            if all_raised(record):
                record, ended = self._scored_again(record)
        finally:
            self._add(record)
        if ended is not None:
            raise ended

    def _scored_again(self, record: StepRecord) -> tuple[StepRecord, BaseException | None]:
        """A round in which every example raised, scored anew, and what ended its 2x2: what was away then may be back.
        As it was, where every example raises again, or the budget ends."""
        logger.info("%s is scored again, as every example raised.", record.name)
        program, parent = self.programs[record.strategy], self.programs[record.strategy.rpartition(ARROW)[0]]
        again, ended = record, None
        try:
            self.meter.check()
            with events.listening([BudgetWatch(self.meter)]):
                started = time.monotonic() - record.ledger.seconds
                again, ended = self._scored(record, parent, program, started)
        except (BudgetExceeded, TooManyErrors) as error:
            # The watch says again at its end what ended the 2x2; the scores are there.
            if ended is None:
                logger.warning("%s was not scored again: %s", record.name, error)
                return record, None
        if all_raised(again):
            return record, ended
        if ended is None:
            self.directory.note_spent(self.meter.used)
            self.directory.append(again)
        return again, ended
