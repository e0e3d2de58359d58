"""What a run was asked for, checked before any work."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from ..checks import require_one_of, require_switch, require_whole
from ..errors import ConfigError, NotTrainableError, ProgramError, StrategyError
from ..programs.copies import copy_program, has_own
from ..programs.program import as_programs, predictors_of, require_program, unfound_predictors
from ..rollouts.metrics import Metric, is_above_one, require_from_zero
from ..rollouts.rollout import RolloutStore
from ..rollouts.settings import RunSettings
from ..steps.adapter_step import AdapterStep
from ..steps.step import Step
from . import strategy as strategies
from .auto import WEIGHT_STEPS
from .held_out import split_valset
from .strategy import Steps

OnStepError = Literal["return", "raise"]

LARGEST_SEED = 2**32 - 1
"""What numpy takes as a seed at most."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run; `Plan.of` makes one from the arguments of `BetterTogether.compile`."""

    student: dspy.Module
    trainset: list[dspy.Example]
    valset: list[dspy.Example]
    teachers: list[dspy.Module]
    metric: Metric
    optimizers: Mapping[str, Teleprompter]
    """The steps that the strategies name, by key; with "auto" all, in the order in which they take turns."""
    strategies: tuple[Steps, ...]
    """Empty with "auto"."""
    auto: bool
    max_rounds: int
    settings: RunSettings
    provide_traceback: bool | None
    shuffle: bool
    compile_args: Mapping[str, Mapping[str, Any]]
    on_step_error: OnStepError
    two_by_two: bool
    warnings: tuple[str, ...]
    """What is questionable about the data and the program."""

    @property
    def seed(self) -> int:
        """Of what the run itself draws; steps have seeds of their own where none was given."""
        return self.settings.seed or 0

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Key to the score from which an example counts as solved, of the steps of ours that learn from such examples;
        None: the full mark."""
        ours = {key: step for key, step in self.optimizers.items() if isinstance(step, Step)}
        return {key: step.threshold for key, step in ours.items() if step.learns_from_solved}

    def check_scale(self, scores: Sequence[float]) -> None:
        """Raise ConfigError where these scores of the untouched student are none that the run can compare by."""
        require_from_zero(scores, " on the valset")
        unset = [key for key, threshold in self.thresholds.items() if threshold is None]
        if unset and is_above_one(max(scores, default=0.0)):
            raise ConfigError(
                f"The metric gave {max(scores):g} on the valset, but the steps {unset} take 1.0 as its full mark: give "
                "them threshold=... (the score from which an example counts as solved), or scale the metric to 0..1."
            )

    @property
    def strategy(self) -> str:
        """The strategy as it was understood, whatever its white space."""
        return strategies.AUTO if self.auto else ", ".join(map(strategies.join, self.strategies))

    @classmethod
    def of(
        cls,
        optimizers: Mapping[str, Teleprompter],
        metric: Metric,
        *,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None,
        valset: Sequence[dspy.Example] | None,
        num_threads: int | None,
        max_errors: int | None,
        provide_traceback: bool | None,
        seed: int | None,
        valset_ratio: float,
        shuffle_trainset_between_steps: bool,
        strategy: str | Sequence[str],
        optimizer_compile_args: Mapping[str, Mapping[str, Any]] | None,
        on_step_error: OnStepError,
        two_by_two: bool,
        max_rounds: int,
    ) -> Self:
        """Check everything. Raises StrategyError, DataError, ProgramError, ConfigError, NotTrainableError,
        MissingExtraError."""
        _check_student(student)
        require_whole("num_threads", num_threads, 1, optional=True)
        require_whole("max_errors", max_errors, 0, optional=True)
        require_whole("seed", seed, 0, most=LARGEST_SEED, optional=True)
        require_whole("max_rounds", max_rounds, 1)
        require_switch("provide_traceback", provide_traceback, optional=True)
        require_switch("shuffle_trainset_between_steps", shuffle_trainset_between_steps)
        require_switch("two_by_two", two_by_two)
        require_one_of("on_step_error", on_step_error, get_args(OnStepError))
        auto = strategy == strategies.AUTO and strategies.AUTO not in optimizers
        parsed = () if auto else strategies.parse(strategy, optimizers)
        # "auto" may run any step after any other.
        _check_order(parsed or itertools.permutations(optimizers, 2), optimizers)
        compile_args = _compile_args(optimizer_compile_args, optimizers)
        teachers = _teachers(student, teacher)
        train, held_out, warnings = split_valset(trainset, valset, valset_ratio, seed or 0)
        keys = set(optimizers) if auto else {key for steps in parsed for key in steps}
        used = {key: optimizer for key, optimizer in optimizers.items() if key in keys}
        _check_trainable(used, student, teachers)
        return cls(
            student=copy_program(student),
            trainset=train,
            valset=held_out,
            teachers=teachers,
            metric=metric,
            optimizers=used,
            strategies=parsed,
            auto=auto,
            max_rounds=int(max_rounds),
            settings=RunSettings(num_threads, max_errors, seed, RolloutStore()),
            provide_traceback=provide_traceback,
            shuffle=shuffle_trainset_between_steps,
            compile_args=compile_args,
            on_step_error=on_step_error,
            two_by_two=two_by_two,
            warnings=(
                *warnings,
                *_unfound(student),
                *_unasked_inputs(student, train),
                *_own_report(student),
                *_unasked(teachers, used),
            ),
        )


def _check_order(asked: Iterable[Steps], optimizers: Mapping[str, Teleprompter]) -> None:
    for steps in asked:
        for key, later in itertools.combinations(steps, 2):
            if isinstance(optimizers[key], dspy.KNNFewShot) and isinstance(optimizers[later], WEIGHT_STEPS):
                raise StrategyError(
                    f"Strategy {strategies.join(steps)!r} has {later!r} after {key!r}: what dspy.KNNFewShot returns "
                    "runs on a program of its own, which tuned weights would not reach. Run the weight step before it, "
                    f"as in {strategies.join((later, key))!r}."
                )


def _compile_args(given: Any, optimizers: Mapping[str, Teleprompter]) -> dict[str, dict[str, Any]]:
    """`optimizer_compile_args` as dicts. Raises StrategyError and ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"optimizer_compile_args={given!r} is not allowed: give a dict from a step's key to the arguments of its "
            f"compile, such as {{{next(iter(optimizers))!r}: {{...}}}}."
        )
    for key, arguments in given.items():
        if key not in optimizers:
            raise StrategyError(f"Invalid optimizer key '{key}'. Valid keys are: {list(optimizers)}")
        if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
            raise ConfigError(f"optimizer_compile_args[{key!r}]={arguments!r} is not allowed: give a dict by name.")
        _check_accepted(key, optimizers[key], arguments)
    return {key: dict(arguments) for key, arguments in given.items()}


def _check_accepted(key: str, optimizer: Teleprompter, arguments: Mapping[str, Any]) -> None:
    if "student" in arguments:
        raise ConfigError(
            f"'student' is not allowed in optimizer_compile_args for optimizer '{key}'. "
            "The same student is used throughout compilation."
        )
    parameters = inspect.signature(optimizer.compile).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    invalid = sorted(arguments.keys() - parameters.keys())
    if invalid and not takes_any:
        raise ConfigError(
            f"Invalid compile arguments for optimizer '{key}': {invalid}. "
            f"{type(optimizer).__name__}.compile() accepts: {list(parameters)}"
        )


def _check_student(student: dspy.Module) -> None:
    if getattr(require_program(student), "_compiled", False):
        raise ProgramError(
            "The student program should not be compiled. Set `student._compiled = False` to go on optimizing it."
        )


def _unfound(student: dspy.Module) -> list[str]:
    names = unfound_predictors(student)
    if not names:
        return []
    return [
        f"DSPy doesn't find the student's predictors {names}: it looks into a list or dict of a module, but not into "
        "one within that. set_lm gives them no LM, and no step changes them. Keep each as an attribute of a module, or "
        "in a list or dict that is one."
    ]


def _unasked_inputs(student: dspy.Module, trainset: Sequence[dspy.Example]) -> list[str]:
    """What to say of examples without an input that the student's signature has, where it is given them as they are."""
    if type(student) not in (dspy.Predict, dspy.ChainOfThought):
        return []
    asked = student.predictors()[0].signature.input_fields
    given = {name for example in trainset for name in example.inputs()}
    missing = [name for name, field in asked.items() if field.is_required() and name not in given]
    if not missing:
        return []
    return [
        f"No example of the trainset has the student's input fields {missing}, so its prompts lack them: their inputs "
        f"are {sorted(given)}. Name the fields alike, and in with_inputs(...)."
    ]


def _own_report(student: dspy.Module) -> list[str]:
    if not has_own(student, "report"):
        return []
    return [
        "The student has a `report` of its own, which stays: that of the run is in its directory (report.json, which "
        "CompileReport.from_dict reads, and report.html), not in `compiled.report`."
    ]


def _unasked(teachers: Collection[dspy.Module], optimizers: Mapping[str, Teleprompter]) -> list[str]:
    asking = [each for each in optimizers.values() if not isinstance(each, Step) or each.asks_teachers]
    if not teachers or asking:
        return []
    return [
        f"The teacher is not asked: the steps {sorted(optimizers)} learn from the student's own answers alone. "
        "BootstrapFewShotRS and LoRAFinetune learn from a teacher's runs."
    ]


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


def _check_trainable(
    optimizers: Mapping[str, Teleprompter], student: dspy.Module, teachers: Collection[dspy.Module]
) -> None:
    """Check that the steps can work on this student, with these teachers."""
    for key, optimizer in sorted(optimizers.items()):
        if isinstance(optimizer, AdapterStep):
            optimizer.trainable(student)
        elif isinstance(optimizer, dspy.BootstrapFinetune):
            _check_provider(key, optimizer, student)
        elif isinstance(optimizer, dspy.GEPA) and teachers:
            raise ConfigError(
                f"GEPA does not accept a teacher argument. Please remove the teacher argument, or step {key!r}."
            )


def _check_provider(key: str, optimizer: dspy.BootstrapFinetune, student: dspy.Module) -> None:
    for name, predictor in predictors_of(student).items():
        try:
            adapter = copy.copy(optimizer.adapter)[predictor.lm] or dspy.settings.adapter
        except KeyError as error:
            raise NotTrainableError(
                f"Step {key!r}: its adapter= has none for the LM of predictor {name!r}: give one for each LM."
            ) from error
        if getattr(type(adapter), "format_finetune_data", None) is dspy.JSONAdapter.format_finetune_data:
            raise NotTrainableError(
                f"Step {key!r} is a dspy.BootstrapFinetune, which writes no training data under a "
                f"{type(adapter).__name__} (DSPy 3.4): give it adapter=dspy.ChatAdapter(), or take "
                "bettertogether.LoRAFinetune(metric)."
            )
        provider = getattr(predictor.lm, "provider", None)
        if not getattr(provider, "finetunable", False):
            raise NotTrainableError(
                f"Step {key!r} fine-tunes, but the LM {predictor.lm.model!r} of predictor {name!r} has no provider "
                "that trains: use bettertogether.local_lm(folder_or_hub_id), or a dspy.LM with such a provider."
            )
