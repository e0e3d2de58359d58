"""What a run costs on this machine, from a few examples run for real and two training steps."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import dspy

from ..errors import NoTrainingDataError
from ..lm import local_engine
from ..programs.copies import copy_program
from ..programs.program import change_lms, copy_for_step, model_names, predictors_of
from ..records import Ledger
from ..rollouts.branches import branch_runs
from ..rollouts.graded import with_near_misses
from ..rollouts.labels import stratified_split
from ..rollouts.metrics import FULL_MARK
from ..rollouts.rollout import Attempt
from ..rollouts.traces import ExamplePass, Trace, TraceSet
from ..steps.adapter_step import AdapterStep
from ..steps.demo_sets import DemoSets
from ..steps.step import as_step
from ..steps.training_probe import TrainingCosts, time_training
from .plan import Plan

EXAMPLES = 16
"""Of the trainset, run with and without demos."""
TEACHER_EXAMPLES = 4
DEMOS = 3
"""Of a prompt, where no step says how many it shows."""


@dataclass(frozen=True)
class Sample:
    """What so many runs cost together."""

    ledger: Ledger
    runs: int
    calls: int
    """Of predictors."""

    def of(self, runs: float) -> Ledger:
        """What another number of them costs."""
        return self.ledger.times(runs / self.runs)


@dataclass(frozen=True)
class Probe:
    """What was measured."""

    plain: Sample
    """Runs without demos."""
    shown: Sample
    """Runs with demos, whose tokens were computed before."""
    teacher: Sample | None
    prompt_s: float
    """Seconds to compute the tokens of a set of demos."""
    demo_tokens: float
    """Tokens of a set of demos."""
    passed: tuple[bool, ...]
    """Of the first runs of an example: those of the first teacher, or of the student."""
    graded: bool
    """Rows are made of runs below the full mark, too."""
    branch_runs: Mapping[str, float]
    """Of these runs, see `Outlook`."""
    trainings: Mapping[str, TrainingCosts]
    """By the key of a weight step; those are left out of whose runs none could be learned from."""
    spent: Ledger
    """What the probe cost."""
    memory_gib: float | None
    """Most memory of this process so far; None where the system doesn't tell."""
    device_memory_gib: float | None
    """Most memory of the local engines' accelerators so far."""


def probe(plan: Plan) -> Probe:
    """Measure. LMs answer without DSPy's cache; nothing is written, and the plan's programs stay as they are."""
    started = time.monotonic()
    examples = stratified_split(plan.trainset, EXAMPLES, plan.seed)[0]
    runs = _Runs(plan, examples)
    plain = _uncached(plan.student)
    for predictor in plain.predictors():
        predictor.demos = []
    runs.timed(plain, range(1))  # loads the model
    alone = runs.timed(plain, range(len(examples))[1:2])
    batch = range(len(examples))[2:] or range(len(examples))
    without = runs.timed(plain, batch)
    firsts = tuple(runs.traces)
    seen = TraceSet(firsts, Ledger(), len(examples))
    seen = seen if runs.threshold is not None else with_near_misses(seen)
    shown = _with_demos(plan, plain, seen, examples)
    first = runs.timed(shown, range(1))
    with_demos = runs.timed(shown, batch)
    teacher = None
    if plan.teachers:
        teacher = runs.timed(_uncached(plan.teachers[0]), range(len(examples))[:TEACHER_EXAMPLES])
        firsts = tuple(runs.traces[-teacher.runs :])
    trainings = dict[str, TrainingCosts]()
    for key, step in plan.optimizers.items():
        if isinstance(step, AdapterStep):
            with contextlib.suppress(NoTrainingDataError):
                trainings[key] = time_training(step.timed, plan.student, examples, seen)
    spent = Ledger.total(trace.ledger for trace in runs.traces).with_seconds(time.monotonic() - started)
    return Probe(
        plain=without,
        shown=with_demos,
        teacher=teacher,
        prompt_s=max(0.0, first.ledger.seconds - alone.ledger.seconds),
        demo_tokens=max(0.0, (with_demos.ledger.prompt_tokens - without.ledger.prompt_tokens) / len(batch)),
        passed=tuple(trace.passed for trace in firsts),
        graded=seen.mark is not None,
        branch_runs=branch_runs(firsts),
        trainings=trainings,
        spent=spent,
        memory_gib=_memory_gib(),
        device_memory_gib=_device_memory_gib(plan.student),
    )


class _Runs:
    """Runs of programs on the examples of a probe."""

    def __init__(self, plan: Plan, examples: Sequence[dspy.Example]) -> None:
        thresholds = [mark for mark in plan.thresholds.values() if mark is not None]
        settings = replace(plan.settings, store=None)
        # Where no step has to know which examples are solved, any number will do.
        mark = None if plan.thresholds else FULL_MARK
        self.threshold = min(thresholds, default=mark)
        self._pass = ExamplePass(plan.metric, self.threshold, settings, phase="probe")
        self._examples = examples
        self.traces: list[Trace] = []

    def timed(self, program: dspy.Module, positions: range) -> Sample:
        """Run some of them at once."""
        started = time.monotonic()
        traces = self._pass.over(program, self._examples, [(position, Attempt()) for position in positions])
        seconds = time.monotonic() - started
        self.traces += traces
        calls = sum(1 for trace in traces for _ in trace.every_call())
        return Sample(Ledger.total(trace.ledger for trace in traces).with_seconds(seconds), len(traces), calls)


def _uncached(program: dspy.Module) -> dspy.Module:
    """A copy whose LMs answer anew."""
    copied = copy_program(program)
    change_lms(copied, {name: {"cache": False} for name in model_names(copied)})
    return copied


def _with_demos(plan: Plan, plain: dspy.Module, traces: TraceSet, examples: Sequence[dspy.Example]) -> dspy.Module:
    """The program with as many demos as the steps show, of whatever it answered; without any where none can be had."""
    steps = [step for optimizer in plan.optimizers.values() if (step := as_step(optimizer)) is not None]
    demos = max((step.demos for step in steps), default=0) or DEMOS
    candidate = DemoSets(plain, traces.traces, examples).candidate("probe", demos, demos, plan.seed)
    return copy_for_step(plain) if candidate is None else candidate.program


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _device_memory_gib(program: dspy.Module) -> float | None:
    engines = {id(each): each for p in predictors_of(program).values() if (each := local_engine(p.lm)) is not None}
    peaks = [peak for engine in engines.values() if (peak := engine.counters().get("device_peak_bytes"))]
    return max(peaks) / 2**30 if peaks else None
