"""What all steps that train adapters have in common: `AdapterStep`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from ..checks import is_number, require, require_one_of, require_pass_options, require_switch, require_threshold
from ..engines.protocol import MODEL_PREFIX, CheckingEngine
from ..errors import ConfigError, DataError, NotTrainableError
from ..lm import local_engine, require_engine
from ..printable import get_logger
from ..programs.program import change_lms, clear_demos, copy_for_step, predictors_of
from ..rollouts.examples import check_examples
from ..rollouts.labels import stratified_split
from ..rollouts.metrics import Metric, require_metric
from ..rollouts.settings import RunSettings
from ..training.config import LoRAConfig, TrainingConfig
from .adapter_rows import ENOUGH_HELD_OUT, FEWEST_HELD_OUT, AdapterKey, Start, adapter_key
from .prompt_capture import makes_decision
from .rows_from_traces import LocalModel, Trainable
from .step import Step, StepContext

if TYPE_CHECKING:
    from .training_step import TrainingStep

logger = get_logger(__name__)


class AdapterStep(Step, Teleprompter):
    """Base of the steps that train one adapter per LM, or one per predictor, and put the tuned LMs into the program.
    `LoRAFinetune` says what the arguments mean."""

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
            require(isinstance(value, kind), name, value, f"a {kind.__name__}(...)")
        require_switch("multitask", multitask)
        is_share = is_number(validation_share) and 0 <= validation_share < 1
        require(is_share, "validation_share", validation_share, "a number in [0, 1)")
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

    @property
    @abstractmethod
    def timed(self) -> TrainingStep:
        """A step whose training on as many rows takes as long, for `estimate`."""

    def trainable(self, student: dspy.Module) -> Trainable:
        """By predictor name, what is to be trained. Raises NotTrainableError, ConfigError and MissingExtraError."""
        predictors = predictors_of(student)
        unknown = [each for each in self.frozen if not any(_is_within(name, each) for name in predictors)]
        if unknown:
            raise ConfigError(
                f"frozen={unknown} are not predictors of the program, nor modules with some: it has "
                f"{sorted(predictors)}."
            )
        active = {n: p for n, p in predictors.items() if not any(_is_within(n, each) for each in self.frozen)}
        found = {n: LocalModel(engine, p.lm) for n, p in active.items() if (engine := local_engine(p.lm)) is not None}
        if not found:
            for name, predictor in active.items():
                require_engine(predictor.lm, name)
            raise NotTrainableError(f"frozen={list(self.frozen)} leaves no predictor to train: freeze fewer.")
        for name in active.keys() - found.keys():
            logger.info("Predictor %r keeps its LM %s, which is not local.", name, active[name].lm.model)
        deciding = [name for name in found if makes_decision(predictors[name])]
        if deciding:
            raise NotTrainableError(
                f"Predictors {deciding} make decisions (Noul, Choice, Score), whose answers are probabilities that no "
                f"row can be written for: freeze them, frozen={[*self.frozen, *deciding]}."
            )
        for start in self._starts(found).values():
            if isinstance(start.engine, CheckingEngine):
                start.engine.check_training(self.lora if start.adapter is None else None, self.training)
        return found

    def measured(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example], seed: int
    ) -> Sequence[dspy.Example]:
        """The examples of the valset on which the best weights are chosen; none where the trainset has enough."""
        share = self.validation_share
        if not share or round(share * len(trainset)) >= ENOUGH_HELD_OUT:
            return ()
        chosen = stratified_split(valset, ENOUGH_HELD_OUT, seed)[0]
        return chosen if len(chosen) >= FEWEST_HELD_OUT else ()

    def _checked(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, given: RunSettings
    ) -> RunSettings:
        """The settings of a run on these examples. Raises DataError."""
        if not trainset:
            raise DataError("trainset cannot be empty: give the examples to run the program on.")
        check_examples(trainset, "trainset")
        check_examples(valset or (), "valset")
        return given.or_else(num_threads=self.num_threads, max_errors=self.max_errors, seed=self.seed)

    def _seeded(self, seed: int | None) -> TrainingConfig:
        """How it trains; a seed that was given takes the place of the configuration's."""
        return self.training if seed is None else replace(self.training, seed=seed)

    def _folder(self, context: StepContext) -> Path | None:
        """Where adapters go; None: the cache."""
        return self.folder if context.folder is None else Path(context.folder).expanduser()

    @property
    def clears_demos(self) -> bool:
        """Whether the tuned program runs without demos."""
        return False

    def _starts(self, trainable: Trainable) -> dict[AdapterKey, Start]:
        """What each adapter is trained from."""
        return {
            adapter_key(name, lm, self.multitask): Start(
                engine, lm.model if self.start_from == "current" else MODEL_PREFIX + engine.base_name
            )
            for name, (engine, lm) in trainable.items()
        }

    def _starts_there(self, trainable: Trainable) -> dict[AdapterKey, Start]:
        """`_starts`, to begin with. Raises NotTrainableError where one is an adapter that answers, but whose folder was
        deleted."""
        starts = self._starts(trainable)
        for start in starts.values():
            folder = None if start.adapter is None else start.engine.adapter_folder(start.adapter)
            if folder is not None and not folder.exists():
                raise NotTrainableError(
                    f"{start.adapter} can't be trained further (start_from='current'): its folder {folder} is gone. "
                    "Bring it back, or train a new adapter, start_from='base'."
                )
        return starts

    def _tuned(
        self,
        student: dspy.Module,
        trainable: Trainable,
        models: Mapping[AdapterKey, str],
    ) -> dspy.Module:
        """A copy of the student whose predictors ask the models of their adapters, where there are any."""
        tuned = copy_for_step(student)
        keys = {name: adapter_key(name, lm, self.multitask) for name, (_, lm) in trainable.items()}
        changes = {name: {"model": models[key]} for name, key in keys.items() if key in models}
        change_lms(tuned, changes)
        if self.clears_demos:
            clear_demos(tuned, changes)
        tuned._compiled = True
        return tuned


def _is_within(predictor: str, name: str) -> bool:
    """Whether this is the predictor's name, or that of a module that holds it."""
    return predictor == name or predictor.startswith((f"{name}.", f"{name}["))


def _checked_frozen(frozen: Sequence[str]) -> tuple[str, ...]:
    require(not isinstance(frozen, str), "frozen", frozen, f"a list of predictor names, [{frozen!r}]")
    are_names = isinstance(frozen, Sequence) and all(isinstance(name, str) for name in frozen)
    require(are_names, "frozen", frozen, "a list of predictor names")
    return tuple(frozen)


def _checked_folder(folder: str | Path | None) -> Path | None:
    require(isinstance(folder, str | Path | None), "folder", folder, "a path, or None for the cache")
    return None if folder is None else Path(folder).expanduser()
