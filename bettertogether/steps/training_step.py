"""What all steps that train adapters on rows have in common: `TrainingStep`.

They collect rows, train one adapter per LM on them (or one per predictor), and put the tuned LM into the predictors.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import dspy

from ..callbacks import events
from ..engines.protocol import FinetuneResult
from ..files import adapters_cache
from ..printable import get_logger
from ..programs.program import as_programs, require_program, require_reachable
from ..records import Ledger
from ..rollouts.examples import first_alike
from ..rollouts.rollout import RolloutStore
from ..rollouts.settings import RunSettings
from ..rollouts.traces import ExamplePass, TraceSet, collect_traces
from ..rollouts.tries import Sampling
from ..training.length import may_lose_patience
from ..training.progress import ProgressFunction, TrainingProgress
from .adapter_rows import AdapterKey, Start, enough_held_out, hold_out, rows_by_adapter
from .adapter_step import AdapterStep
from .data_card import make_data_card
from .finished_trainings import asked_for, finished_trainings
from .given_rows import given_rows
from .rows import Row, write_rows
from .rows_from_traces import Collected, Runs, Trainable
from .step import StepContext, StepResult, apart
from .training_details import fall_held_out, held_out_file, rows_file, time_warnings, weight_details
from .training_work import training_work
from .work import Outlook, Work

logger = get_logger(__name__)


class TrainingStep(AdapterStep):
    """Base of the steps that train adapters on rows; a subclass says on which (`rows_of`). `LoRAFinetune` says what the
    arguments mean."""

    sampling: Sampling
    """How the program is run for rows."""
    learns_pairs = False
    """Whether the rows are pairs."""
    rows_per_call = 1
    """Rows that a call of a solved example gives, at most."""
    label_field: str | None = None
    """Field that holds the examples' label; None finds it."""

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        rows: Sequence[Row] | str | Path | None = None,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int | None = None,
        store: RolloutStore | None = None,
        folder: str | Path | None = None,
    ) -> dspy.Module:
        """A copy of the student whose predictors use tuned LMs.

        On examples of `valset` the epoch is chosen where the trainset is small, see `validation_share`. With `rows` (or
        a JSONL file of them) none are collected: they are trained on as they are, but for those of the
        `validation_share` of their examples that is held out, and neither trainset nor valset is looked at. Raises
        ProgramError, NotTrainableError, NoTrainingDataError, TooManyErrors, TrainingError.
        """
        settings = RunSettings(num_threads, max_errors, seed, store)
        context = StepContext(trainset, valset, as_programs(teacher), rows=rows, folder=folder, settings=settings)
        return self.run_alone(student, context)

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """`compile` with its arguments in one, and all that it found out in its result."""
        started = time.monotonic()
        require_reachable(require_program(student))
        trainable = self.trainable(student)
        starts = self._starts_there(trainable)
        if context.rows is None:
            collected = self._collected(student, context, trainable)
        else:
            collected = self._given(student, context.rows, trainable)
        events.told(*collected.card.warnings)
        folder = self._folder(context)
        split = self.split_by_adapter(collected.rows, collected.held_out, trainable, context.settings.seed)
        results = self._train(split, starts, context.settings.seed, folder)
        out_of_time = events.told(*time_warnings(results.values(), self.training.max_minutes))
        trained = Ledger(trained_tokens=sum(result.tokens for result in results.values()))
        return StepResult(
            program=self._tuned(student, trainable, {key: result.model for key, result in results.items()}),
            ledger=(collected.ledger + trained).with_seconds(time.monotonic() - started),
            details=weight_details(collected, results, starts, {key: len(rows) for key, (rows, _) in split.items()}),
            # From other weights than those before, the fall is no gain over the round before.
            step_gain=fall_held_out(result for key, result in results.items() if starts[key].model == key.model),
            warnings=(*collected.warnings, *collected.card.warnings, *out_of_time),
        )

    def collect(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example] | None = None,
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        earlier: Sequence[dspy.Module] = (),
        settings: RunSettings = RunSettings(),
    ) -> Collected:
        """The rows that `compile` would train on; `earlier` are programs whose prompts they may be shown with too.
        Raises NoTrainingDataError with the counts when there are none."""
        trainable = self.trainable(student)
        context = StepContext(trainset, valset, as_programs(teacher), earlier=earlier, settings=settings)
        with apart():
            return self._collected(student, context, trainable)

    def work(self, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work:
        """The tries for rows and the training on them, as the outlook has them."""
        return training_work(self, student, self._with_asked_teachers(context), outlook)

    @abstractmethod
    def rows_of(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Collected:
        """The rows of these runs, and apart those that are held out. Raises as `collect` does."""

    @property
    def timed(self) -> TrainingStep:
        """Itself."""
        return self

    @abstractmethod
    def probe_rows(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Sequence[Row]:
        """Rows as the step trains on, of runs that all pass, to time a training."""

    @property
    def shows_forms(self) -> bool:
        """Whether rows are shown with demos of other examples too."""
        return False

    def measured(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example], seed: int
    ) -> Sequence[dspy.Example]:
        """The examples of the valset on which the epoch is chosen, where any is."""
        return super().measured(trainset, valset, seed) if self.training.keep_best else ()

    def split_by_adapter(
        self, rows: Sequence[Row], held_out: Sequence[Row], trainable: Trainable, seed: int | None
    ) -> dict[AdapterKey, tuple[list[Row], list[Row]]]:
        """The rows of each adapter to train on, and those held out: of `held_out`, or where these are too few, some of
        the others."""
        groups = rows_by_adapter(rows, trainable, multitask=self.multitask)
        apart = rows_by_adapter(held_out, trainable, multitask=self.multitask)
        drawn = self._seeded(seed).seed
        return {key: self._split(group, apart.get(key, ()), drawn) for key, group in groups.items()}

    def _with_asked_teachers(self, context: StepContext) -> StepContext:
        """The context with those teachers that are asked."""
        return context if self.asks_teachers else replace(context, teachers=())

    def _collected(self, student: dspy.Module, context: StepContext, trainable: Trainable) -> Collected:
        context, trainset = self._with_asked_teachers(context), context.trainset
        settings = self._checked(trainset, context.valset, context.settings)

        def traces_of(examples: Sequence[dspy.Example], phase: str) -> TraceSet:
            return collect_traces(
                student,
                examples,
                ExamplePass(self.metric, self.threshold, settings, phase=phase),
                sampling=self.sampling,
                teachers=context.teachers,
                label_field=self.label_field,
            )

        seed = settings.seed or 0
        measured = self.measured(trainset, context.valset or (), seed)
        traces = traces_of(trainset, "collect training data")
        held_out = traces_of(measured, "collect held-out data") if measured else None
        collected = self.rows_of(student, Runs(trainset, traces, measured, held_out, context.earlier, seed), trainable)
        # Those that ask the same are one example, so that none is held out while another is trained on.
        first = first_alike(trainset)
        rows = (
            row if first[row.example] == row.example else replace(row, example=first[row.example])
            for row in collected.rows
        )
        return replace(collected, rows=tuple(rows))

    def _given(self, student: dspy.Module, rows: Sequence[Row] | str | Path, trainable: Trainable) -> Collected:
        given, dropped = given_rows(self, student, rows, trainable)
        return Collected(given, make_data_card(given, trainable, dropped=dropped, examples=0), Ledger())

    def _train(
        self,
        split: Mapping[AdapterKey, tuple[Sequence[Row], Sequence[Row]]],
        starts: Mapping[AdapterKey, Start],
        seed: int | None,
        folder: Path | None,
    ) -> dict[AdapterKey, FinetuneResult]:
        training = self._seeded(seed)
        # A single training has its own checkpoint, and hashing many rows takes time.
        several = split if len(split) > 1 else {}
        asked = {
            key: asked_for(starts[key].engine, starts[key].model, self.lora, training, *rows)
            for key, rows in several.items()
        }
        results: dict[AdapterKey, FinetuneResult] = {}
        with finished_trainings(folder or adapters_cache(), list(asked.values())) as finished:
            for number, (key, (train_rows, validation_rows)) in enumerate(split.items(), 1):
                start = starts[key]
                result = finished.find(asked.get(key), start.engine)
                if result is None:
                    result = start.engine.finetune(
                        [row.training_row for row in train_rows],
                        validation_rows=[row.training_row for row in validation_rows],
                        lora=self.lora,
                        training=training,
                        start_from=start.adapter,
                        folder=folder,
                        on_progress=self._teller(f"adapter {number}/{len(split)}", bool(validation_rows)),
                    )
                    write_rows(train_rows, rows_file(result))
                    if validation_rows:
                        write_rows(validation_rows, held_out_file(result))
                    finished.add(asked.get(key), result)
                results[key] = result
        return results

    def _teller(self, adapter: str, held_out: bool) -> ProgressFunction:
        """What tells of a training, whose minutes count from its first line."""
        minutes, ends_s = self.training.max_minutes, None
        may_end_early = may_lose_patience(self.training, held_out)

        def tell(line: TrainingProgress) -> None:
            nonlocal ends_s
            if minutes is not None and ends_s is None:
                ends_s = time.monotonic() + 60 * minutes
            left_s = None if ends_s is None else ends_s - time.monotonic()
            events.emit(
                "training",
                {"adapter": adapter, "progress": line, "left_s": left_s, "may_end_early": may_end_early},
            )

        return tell

    def _split(self, rows: Sequence[Row], apart: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and rows held out: those that are `apart` already, or some of them, by example; none where
        they would be too few."""
        if not self.training.keep_best:
            return list(rows), []
        if enough_held_out(apart):
            return list(rows), list(apart)
        return hold_out(rows, self.validation_share, seed)
