"""What all steps that train adapters have in common: `TrainingStep`.

They collect rows, train one adapter per LM on them (or one per predictor), and put the tuned LM into the predictors.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from ..callbacks import events
from ..checks import is_number, require_one_of, require_pass_options, require_switch, require_threshold
from ..engines.protocol import MODEL_PREFIX, FinetuneResult
from ..errors import ConfigError, DataError, NoTrainingDataError, NotTrainableError
from ..lm import local_engine, require_engine
from ..printable import get_logger
from ..programs.program import as_programs, copy_for_step, predictors_of, require_program, require_reachable
from ..records import Ledger
from ..rollouts.examples import check_examples
from ..rollouts.labels import stratified_split
from ..rollouts.metrics import Metric, require_metric
from ..rollouts.rollout import RolloutStore
from ..rollouts.settings import RunSettings
from ..rollouts.traces import ExamplePass, Sampling, TraceSet, collect_traces
from ..training.config import LoRAConfig, TrainingConfig
from .adapter_rows import (
    ENOUGH_HELD_OUT,
    FEWEST_HELD_OUT,
    AdapterKey,
    adapter_key,
    enough_held_out,
    hold_out,
    rows_by_adapter,
)
from .data_card import make_data_card
from .rows import Row, read_rows, write_rows
from .rows_from_traces import Collected, LocalModel, Trainable
from .step import Step, StepContext, StepResult
from .training_details import fall_of_loss, rows_file, weight_details

logger = get_logger(__name__)


class TrainingStep(Step, Teleprompter):
    """Base of the steps that train adapters; a subclass says what on (`collect`). `LoRAFinetune` says what the
    arguments mean."""

    spares_valset = False
    sampling: Sampling
    """How the program is run for rows."""
    label_field: str | None = None
    """Field that holds the examples' label; None finds it."""

    def __init__(
        self,
        metric: Metric | None,
        *,
        lora: LoRAConfig,
        training: TrainingConfig,
        multitask: bool,
        start_from: Literal["base", "current"],
        frozen: Sequence[str],
        threshold: float | None,
        validation_share: float,
        num_threads: int | None,
        max_errors: int | None,
        seed: int,
        folder: str | Path | None,
    ) -> None:
        require_one_of("start_from", start_from, ("base", "current"))
        for name, value, kind in (("lora", lora, LoRAConfig), ("training", training, TrainingConfig)):
            if not isinstance(value, kind):
                raise ConfigError(f"{name}={value!r} is not allowed: give a {kind.__name__}(...).")
        require_switch("multitask", multitask)
        if not is_number(validation_share) or not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share={validation_share!r} is not allowed: give a number in [0, 1).")
        require_metric(metric, optional=True)
        require_pass_options(num_threads, max_errors, seed)
        require_threshold(threshold)
        self.metric = metric
        self.lora = lora
        self.training = training
        self.multitask = multitask
        self.start_from = start_from
        self.frozen = _checked_frozen(frozen)
        self.threshold = threshold
        self.validation_share = validation_share
        self.num_threads = num_threads
        self.max_errors = max_errors
        self.seed = seed
        self.folder = _checked_folder(folder)

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

        On examples of `valset` the epoch is chosen where the trainset is small, see `validation_share`. `rows` (or a
        JSONL file of them) are trained on as they are, instead of collecting any. Raises ProgramError,
        NotTrainableError, NoTrainingDataError, TooManyErrors, TrainingError.
        """
        settings = RunSettings(num_threads, max_errors, seed, store)
        context = StepContext(trainset, valset, as_programs(teacher), rows=rows, folder=folder, settings=settings)
        self.last = self.run(student, context)
        return self.last.program

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """`compile` with its arguments in one, and all that it found out in its result."""
        started = time.monotonic()
        require_reachable(require_program(student))
        trainable = self.trainable(student)
        if context.rows is None:
            collected = self.collect(
                student,
                trainset=context.trainset,
                valset=context.valset,
                teacher=context.teachers,
                earlier=context.earlier,
                settings=context.settings,
            )
        else:
            collected = self._given(context.rows, trainable)
        for warning in collected.card.warnings:
            events.warn(warning)
        folder = self.folder if context.folder is None else Path(context.folder).expanduser()
        starts = self._starts(trainable)
        results = self._train(collected, trainable, context.settings.seed, folder)
        trained = Ledger(trained_tokens=sum(result.tokens for result in results.values()))
        return StepResult(
            program=self._tuned(student, trainable, results),
            ledger=(collected.ledger + trained).with_seconds(time.monotonic() - started),
            details=weight_details(collected, results, starts),
            # From other weights than those before, the fall is no gain over the round before.
            step_gain=fall_of_loss(result for key, result in results.items() if starts[key] == key.model),
            warnings=(*collected.warnings, *collected.card.warnings),
        )

    def trainable(self, student: dspy.Module) -> Trainable:
        """By predictor name, what is to be trained. Raises NotTrainableError and ConfigError."""
        predictors = predictors_of(student)
        unknown = sorted(set(self.frozen) - predictors.keys())
        if unknown:
            raise ConfigError(f"frozen={unknown} are not predictors of the program: it has {sorted(predictors)}.")
        active = {name: p for name, p in predictors.items() if name not in self.frozen}
        found = {n: LocalModel(engine, p.lm) for n, p in active.items() if (engine := local_engine(p.lm)) is not None}
        if not found and active:
            require_engine(*next((p.lm, name) for name, p in active.items()))
        if not found:
            raise NotTrainableError(f"frozen={list(self.frozen)} leaves no predictor to train: freeze fewer.")
        for name in active.keys() - found.keys():
            logger.info("Predictor %r keeps its LM %s, which is not local.", name, active[name].lm.model)
        return found

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
        if not trainset:
            raise DataError("trainset cannot be empty: give the examples to run the program on.")
        check_examples(trainset, "trainset")
        check_examples(valset or (), "valset")
        settings = settings.or_else(num_threads=self.num_threads, max_errors=self.max_errors, seed=self.seed)

        def traces_of(examples: Sequence[dspy.Example], phase: str) -> TraceSet:
            return collect_traces(
                student,
                examples,
                ExamplePass(self.metric, self.threshold, settings, phase=phase),
                sampling=self.sampling,
                teachers=as_programs(teacher),
                label_field=self.label_field,
            )

        seed = settings.seed or 0
        measured = self.measured(trainset, valset or (), seed)
        traces = traces_of(trainset, "collect training data")
        held_out = traces_of(measured, "collect held-out data") if measured else None
        return self.rows_of(
            student, trainset, traces, trainable, valset=measured, held_out=held_out, earlier=earlier, seed=seed
        )

    @abstractmethod
    def rows_of(
        self,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        traces: TraceSet,
        trainable: Trainable,
        *,
        valset: Sequence[dspy.Example],
        held_out: TraceSet | None,
        earlier: Sequence[dspy.Module],
        seed: int,
    ) -> Collected:
        """The rows of these runs, and apart those of `held_out`, the runs on `valset`. Raises as `collect` does."""

    @property
    def clears_demos(self) -> bool:
        """Whether the tuned program runs without demos."""
        return False

    def measured(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example], seed: int
    ) -> Sequence[dspy.Example]:
        """The examples of the valset on which the epoch is chosen; none where the trainset has enough."""
        share = self.validation_share
        if not (share and self.training.keep_best) or round(share * len(trainset)) >= ENOUGH_HELD_OUT:
            return ()
        chosen = stratified_split(valset, ENOUGH_HELD_OUT, seed)[0]
        return chosen if len(chosen) >= FEWEST_HELD_OUT else ()

    def _given(self, rows: Sequence[Row] | str | Path, trainable: Trainable) -> Collected:
        if not isinstance(rows, Sequence | Path):
            raise ConfigError(f"rows={rows!r} is not allowed: give a list of rows, or a file of them.")
        given = tuple(read_rows(Path(rows).expanduser()) if isinstance(rows, str | Path) else rows)
        if not given:
            raise NoTrainingDataError("rows= is empty: give at least one row, or leave it out to collect them.")
        unknown = sorted({row.predictor for row in given} - trainable.keys()) if not self.multitask else []
        if unknown:
            raise DataError(f"rows= are for {unknown}; with multitask=False they must be for {sorted(trainable)}.")
        engines = {name: model.engine for name, model in trainable.items()}
        return Collected(given, make_data_card(given, engines, dropped={}, examples=0), Ledger())

    def _train(
        self,
        collected: Collected,
        trainable: Trainable,
        seed: int | None,
        folder: Path | None,
    ) -> dict[AdapterKey, FinetuneResult]:
        groups = rows_by_adapter(collected.rows, trainable, multitask=self.multitask)
        apart = rows_by_adapter(collected.held_out, trainable, multitask=self.multitask)
        engines = {adapter_key(name, lm, self.multitask): engine for name, (engine, lm) in trainable.items()}
        starts = self._starts(trainable)
        training = self.training if seed is None else replace(self.training, seed=seed)
        results: dict[AdapterKey, FinetuneResult] = {}
        for number, (key, group) in enumerate(groups.items(), 1):
            train_rows, validation_rows = self._split(group, apart.get(key, ()), training.seed)
            adapter = f"adapter {number}/{len(groups)}"
            base = MODEL_PREFIX + engines[key].base_name
            results[key] = engines[key].finetune(
                [row.training_row for row in train_rows],
                validation_rows=[row.training_row for row in validation_rows],
                lora=self.lora,
                training=training,
                start_from=starts[key] if starts[key] != base else None,
                folder=folder,
                on_progress=lambda line, adapter=adapter: events.emit(  # type: ignore[misc]
                    "training", {"adapter": adapter, "progress": line}
                ),
            )
            write_rows([*train_rows, *validation_rows], rows_file(results[key]))
        return results

    def _split(self, rows: Sequence[Row], apart: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and rows held out: those that are `apart` already, or some of them, by example; none where
        they would be too few."""
        if not self.training.keep_best:
            return list(rows), []
        if enough_held_out(apart):
            return list(rows), list(apart)
        return hold_out(rows, self.validation_share, seed)

    def _starts(self, trainable: Trainable) -> dict[AdapterKey, str]:
        """The model that each adapter is trained from."""
        return {
            adapter_key(name, lm, self.multitask): lm.model
            if self.start_from == "current"
            else MODEL_PREFIX + engine.base_name
            for name, (engine, lm) in trainable.items()
        }

    def _tuned(
        self,
        student: dspy.Module,
        trainable: Trainable,
        results: Mapping[AdapterKey, FinetuneResult],
    ) -> dspy.Module:
        tuned = copy_for_step(student)
        lms: dict[tuple[int, str], Any] = {}
        for name, predictor in predictors_of(tuned).items():
            if name not in trainable:
                continue
            lm = trainable[name].lm
            result = results.get(adapter_key(name, lm, self.multitask))
            if result is None:
                continue
            predictor.lm = lms.setdefault((id(lm), result.model), lm.copy(model=result.model))
            if self.clears_demos:
                predictor.demos = []
        tuned._compiled = True
        return tuned


def _checked_frozen(frozen: Sequence[str]) -> tuple[str, ...]:
    if isinstance(frozen, str):
        raise ConfigError(f"frozen={frozen!r} is not allowed: give a list of predictor names, [{frozen!r}].")
    if not isinstance(frozen, Sequence) or not all(isinstance(name, str) for name in frozen):
        raise ConfigError(f"frozen={frozen!r} is not allowed: give a list of predictor names.")
    return tuple(frozen)


def _checked_folder(folder: str | Path | None) -> Path | None:
    if not isinstance(folder, str | Path | None):
        raise ConfigError(f"folder={folder!r} is not allowed: give a path, or None for the cache.")
    return None if folder is None else Path(folder).expanduser()
