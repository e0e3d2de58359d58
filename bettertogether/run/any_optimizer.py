"""Run a Teleprompter that is no step of ours as a step, with the LMs of the program kept."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from ..callbacks import events
from ..errors import ProgramError
from ..lm import local_engine
from ..printable import get_logger
from ..programs.copies import drop_results, results_of
from ..programs.program import as_programs, copy_for_step, modules_of, predictors_of
from ..records import Ledger, OtherDetails
from ..rollouts.settings import RunSettings
from ..rollouts.usage import Bill, Refusals, billed
from ..steps.step import StepContext, StepResult

logger = get_logger(__name__)

_USUAL = ("trainset", "teacher", "valset")

METRICS = frozenset({"metric", "metric_fn"})
"""What DSPy's optimizers call their metric; the second is GEPA's."""

_turns: dict[int, threading.RLock] = {}
"""By the id of an optimizer."""

if hasattr(os, "register_at_fork"):
    # Threads that hold one don't come along.
    os.register_at_fork(after_in_child=_turns.clear)


@contextmanager
def in_turn(optimizer: Teleprompter) -> Iterator[None]:
    """Have an optimizer as it is between two steps: many keep their work in attributes, and `run_any` changes some for
    as long as it runs. A step within a step of the same optimizer does not wait, in the same thread."""
    turn = _turns.get(id(optimizer))
    if turn is None:
        turn = _turns.setdefault(id(optimizer), threading.RLock())
        weakref.finalize(optimizer, _turns.pop, id(optimizer), None)
    if not turn.acquire(blocking=False):
        logger.info("%s is at work in another thread: waiting for the end of its step.", type(optimizer).__name__)
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


@contextmanager
def lent(optimizer: Teleprompter, settings: RunSettings) -> Iterator[None]:
    """Give the optimizer's attributes that are None the value of the setting of the same name, for the optimizers that
    take num_threads, max_errors or seed when they are made; take them back afterwards."""
    given = {name: value for name, value in _by_name(settings).items() if value is not None}
    with _attributes(optimizer, {n: value for n, value in given.items() if getattr(optimizer, n, ...) is None}):
        yield


@contextmanager
def _attributes(optimizer: Teleprompter, given: Mapping[str, Any]) -> Iterator[None]:
    """Give the optimizer other values of its attributes, as far as they can be set; take them back afterwards."""
    before = {name: getattr(optimizer, name) for name in given}
    of_class = {name for name in given if getattr(type(optimizer), name, ...) is before[name]} - vars(optimizer).keys()
    given = {name: value for name, value in given.items() if _could_set(optimizer, name, value)}
    try:
        yield
    finally:
        for name, value in given.items():
            # Another value is one that the optimizer itself, or its user, has put there meanwhile.
            if getattr(optimizer, name, None) is value:
                delattr(optimizer, name) if name in of_class else setattr(optimizer, name, before[name])


def _could_set(optimizer: Teleprompter, name: str, value: Any) -> bool:
    """Set an attribute; False for one that is read-only (of a frozen class, a property)."""
    try:
        setattr(optimizer, name, value)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


@contextmanager
def _counted_metric(optimizer: Teleprompter) -> Iterator[list[None]]:
    """An entry for each call of the optimizer's metric within the block."""
    calls: list[None] = []
    own = {name: metric for name in METRICS if callable(metric := vars(optimizer).get(name))}
    with _attributes(optimizer, {name: _counting(metric, calls) for name, metric in own.items()}):
        yield calls


def _counting(metric: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    @functools.wraps(metric)
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return metric(*arguments, **options)

    return counted


def accepted_arguments(optimizer: Teleprompter, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the optimizer's `compile` takes; those that are None are left to its own defaults. One that
    takes any keyword is given what `dspy.BetterTogether` has for it."""
    parameters = inspect.signature(optimizer.compile).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = {*parameters, *(_USUAL if takes_any else ())}
    return {k: v for k, v in arguments.items() if v is not None and k in names}


def run_any(
    optimizer: Teleprompter,
    program: dspy.Module,
    context: StepContext,
    given: Mapping[str, Any],
    provide_traceback: bool | None = None,
    charge: Callable[[Ledger], None] = lambda ledger: None,
) -> StepResult:
    """Compile a copy of `program` with `optimizer` itself, so that what it keeps of its work is found there.

    Of the context, it is given what its `compile` takes; settings that `compile` does not take are lent to the
    optimizer; without a seed of its own or of the run it is given 0. `given` are the user's own arguments for
    `compile`; they win.

    The program's LMs answer during the step, whatever `dspy.settings.lm` is, and are those of the result, unless the
    optimizer put others in their place. `charge` is given what it cost, also where the optimizer raises. The result
    warns of models of whose calls more than half failed, since many optimizers go on without an answer.
    """
    settings = context.settings
    if getattr(optimizer, "seed", None) is None:
        settings = settings.or_else(num_threads=None, max_errors=None, seed=0)
    student = copy_for_step(program)
    lms = {name: predictor.lm for name, predictor in predictors_of(student).items()}
    for predictor in student.predictors():
        # A signature is a class, which copies share, and InferRules writes its rules into it.
        predictor.signature = predictor.signature.with_instructions(predictor.signature.instructions)
    keep_lms(student)
    offered = {
        "trainset": context.trainset,
        "valset": context.valset,
        "teacher": _one_or_all(context.teachers),
        "provide_traceback": provide_traceback,
        **_by_name(settings),
    }
    arguments = accepted_arguments(optimizer, offered)
    if "teacher" in arguments:
        arguments["teacher"] = _marked_copy(arguments["teacher"])
    arguments |= given
    before, refusals = _engine_counters(lms.values()), Refusals()
    with (
        lent(optimizer, settings),
        _kept_lms(as_programs(given.get("teacher"))),
        _fallback_lm(lms),
        billed() as bill,
        dspy.context(callbacks=[*dspy.settings.callbacks, refusals]),
        _counted_metric(optimizer) as metric_calls,
    ):
        try:
            result = unmark(optimizer.compile(student, **arguments))
        finally:
            ledger = _ledger(bill, len(metric_calls), before, _engine_counters(lms.values()))
            charge(ledger)
    drop_results(result)
    _free_forward(result)
    for name, predictor in predictors_of(result).items():
        if predictor.lm is None:
            predictor.lm = lms.get(name)
    return StepResult(result, ledger, OtherDetails(type(optimizer).__name__), warnings=events.told(*refusals.told()))


def _by_name(settings: RunSettings) -> dict[str, int | None]:
    """The settings that DSPy's optimizers know, under DSPy's names."""
    return {"num_threads": settings.num_threads, "max_errors": settings.max_errors, "seed": settings.seed}


def _ledger(bill: Bill, metric_calls: int, before: Mapping[str, int], after: Mapping[str, int]) -> Ledger:
    """What the bill has. Engines count also what it misses: answers in threads of the program's own, and tokens where
    DSPy's histories are off."""
    spent = bill.ledger
    return replace(
        spent,
        metric_calls=metric_calls,
        prompt_tokens=max(spent.prompt_tokens, after["prompt_tokens"] - before["prompt_tokens"]),
        generated_tokens=max(spent.generated_tokens, after["generated_tokens"] - before["generated_tokens"]),
    )


def _one_or_all(teachers: Sequence[dspy.Module]) -> Any:
    return teachers[0] if len(teachers) == 1 else teachers or None


def _engine_counters(lms: Any) -> dict[str, int]:
    engines = {id(engine): engine for lm in lms if (engine := local_engine(lm)) is not None}
    counters = [engine.counters() for engine in engines.values()]
    return {name: sum(each.get(name, 0) for each in counters) for name in ("prompt_tokens", "generated_tokens")}


@contextmanager
def _fallback_lm(lms: Mapping[str, Any]) -> Iterator[None]:
    """Optimizers that ask `dspy.settings.lm` for proposals find the program's own LM where none is set."""
    if dspy.settings.lm is not None or not lms:
        yield
        return
    with dspy.context(lm=next(iter(lms.values()))):
        yield


def _reset_but_lm(predictor: dspy.Predict) -> None:
    lm = predictor.lm
    type(predictor).reset(predictor)
    predictor.lm = lm


def keep_lms(*programs: dspy.Module) -> None:
    """Mark programs, so that `reset_copy()` of them and of their copies clears prompts but not LMs.

    DSPy's few-shot optimizers reset predictors and then run on `dspy.settings.lm`, which after a weight step is the
    wrong model. `KNNFewShot` goes on doing so whenever its result is called, with the program that it was given: so
    what is marked must be a copy that nobody else has, and stays marked.
    """
    for program in programs:
        for predictor in program.predictors():
            predictor.reset = functools.partial(_reset_but_lm, predictor)


@contextmanager
def _kept_lms(programs: Sequence[dspy.Module]) -> Iterator[None]:
    """`keep_lms` of the user's own programs while a step runs."""
    keep_lms(*programs)
    try:
        yield
    finally:
        for program in programs:
            for predictor in program.predictors():
                predictor.__dict__.pop("reset", None)


def unmark(result: dspy.Module) -> dspy.Module:
    """Take the mark off an optimizer's result and its candidates. Raises ProgramError for a result that is none."""
    if not isinstance(result, dspy.Module):
        raise ProgramError(f"The optimizer returned {type(result).__name__} where a dspy.Module is needed.")
    candidates = results_of(result).get("candidate_programs") or []
    for each in (result, *(candidate["program"] for candidate in candidates if "program" in candidate)):
        for _, predictor in each.named_sub_modules(dspy.Predict):
            predictor.__dict__.pop("reset", None)
    return result


def _free_forward(program: dspy.Module) -> None:
    """Undo `module.forward = module.forward`, with which DSPy ends its tracing: it binds the method to the object that
    was traced, which in a copy is another one."""
    for _, module in modules_of(program):
        if getattr(module.__dict__.get("forward"), "__func__", ...) is getattr(type(module), "forward", None):
            del module.__dict__["forward"]


def _marked_copy(teacher: Any) -> Any:
    if not isinstance(teacher, dspy.Module):
        return [_marked_copy(each) for each in teacher]
    copied = copy_for_step(teacher)
    copied._compiled = teacher._compiled
    keep_lms(copied)
    return copied
