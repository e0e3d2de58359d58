"""The seam between the loop and its own steps: a `StepContext` in, a `StepResult` out.

A step of ours is a Teleprompter whose `compile` is `run` in DSPy's words. The loop calls `run`; it wraps every other
Teleprompter (run/any_optimizer.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.callback import with_callbacks

from ..callbacks import events
from ..checks import plain
from ..programs.program import as_programs
from ..records import Details, Ledger
from ..rollouts.settings import RunSettings
from .rows import Row
from .work import Outlook, Work

_FIELDS = ("trainset", "valset", "restart_from", "rows", "folder")
_SETTINGS = ("num_threads", "max_errors", "seed", "store")


@dataclass(frozen=True)
class StepContext:
    """What a step works with, besides the program."""

    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example] | None = None
    """Examples to choose on; None: the step holds out some of the trainset."""
    teachers: Sequence[dspy.Module] = ()
    """Programs whose runs are learned from instead of the student's."""
    restart_from: dspy.Module | None = None
    """The program as it was before any step, from whose prompts a restart starts."""
    earlier: Sequence[dspy.Module] = ()
    """Programs whose prompts deserve another look, best first: what earlier rounds found. Their LMs don't matter."""
    rows: Sequence[Row] | str | Path | None = None
    """Rows to train on, or a file of them, instead of collecting any."""
    folder: str | Path | None = None
    """Where adapters go; None: the step's own folder, or the cache."""
    settings: RunSettings = field(default_factory=RunSettings)

    def with_arguments(self, given: Mapping[str, Any]) -> StepContext:
        """This context with the user's own arguments for `compile` in place of the run's."""
        changed = {name: given[name] for name in _FIELDS if name in given}
        if "teacher" in given:
            changed["teachers"] = as_programs(given["teacher"])
        settings = replace(self.settings, **{name: given[name] for name in _SETTINGS if name in given})
        return replace(self, settings=settings, **changed)


@dataclass(frozen=True)
class StepResult:
    """What a step gave."""

    program: dspy.Module
    ledger: Ledger
    """What it cost."""
    details: Details | None = None
    """What it did."""
    step_gain: float | None = None
    """Its own evidence of a gain, on data other than the valset or by another measure."""
    warnings: tuple[str, ...] = ()
    """What it has to say against its own result."""


@contextmanager
def apart() -> Iterator[None]:
    """Work by itself: what is configured meanwhile in another thread is none of its own, nor is a run that goes on
    there."""
    with dspy.context(), events.listening([]):
        yield


class Step(ABC):
    """A step of ours: what `BetterTogether` runs without going through `compile`."""

    threshold: float | None = None
    """Score from which an example counts as solved; None: the full mark, or what `rollouts/graded.py` says."""
    learns_from_solved = True
    """Whether it matters to it which examples count as solved; a step that learns from scores as they are has no use
    for a threshold."""
    asks_teachers = True
    """Whether it learns from a teacher's runs, where there is one."""
    demos = 0
    """Demos that its prompts show, at most; 0: it searches none."""
    last: StepResult | None = None
    """What the last `compile`, or the last step of a `BetterTogether`, gave."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain(value))

    def sparing(self, context: StepContext, *, is_tuned: bool) -> StepContext:
        """The context, without its valset where the step does better without it. `is_tuned`: the student's weights were
        trained on the trainset."""
        return context

    def work(self, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work | None:
        """What `run` would do if all goes as in the outlook; None: it can't say."""
        return None

    @abstractmethod
    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """Improve a copy of the student, its LMs kept where they are not what is improved."""

    def run_alone(self, student: dspy.Module, context: StepContext) -> dspy.Module:
        """`run` as `compile` does it, outside of a `BetterTogether`; what it gave is kept as `last`."""
        with apart():
            result = self.run(student, context)
        self.last = result
        return result.program

    def run_seen(self, student: dspy.Module, context: StepContext) -> StepResult:
        """`run`, which DSPy's callbacks see as a compile."""
        # Not by way of `last`: the step may be at work in another thread, too.
        results: list[StepResult] = []

        @with_callbacks  # type: ignore[untyped-decorator]
        def seen(self: Step, student: dspy.Module, *, trainset: Any, teacher: Any, valset: Any, context: Any) -> Any:
            """Named arguments are what callbacks are shown."""
            results.append(self.run(student, context))
            return results[0].program

        teacher = context.teachers or None
        seen(self, student, trainset=context.trainset, teacher=teacher, valset=context.valset, context=context)
        (self.last,) = results
        return results[0]

    @property
    def details(self) -> dict[str, Any]:
        """What the last `compile` did, as JSON; `last.details` has it with its types."""
        return asdict(self.last.details) if self.last and self.last.details else {}

    @property
    def ledger(self) -> Ledger:
        """What the last `compile` cost."""
        return self.last.ledger if self.last else Ledger()

    @property
    def step_gain(self) -> float | None:
        """Evidence of a gain in the last `compile`, on data other than the valset or by another measure."""
        return self.last.step_gain if self.last else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the last `compile` has to say against its own result."""
        return self.last.warnings if self.last else ()


def as_step(optimizer: Teleprompter) -> Step | None:
    """The optimizer as a step of ours; None for any other, and where a subclass has a `compile` of its own, which
    then counts."""
    if not isinstance(optimizer, Step) or "compile" in vars(optimizer):
        return None
    latest = next(vars(kind) for kind in type(optimizer).__mro__ if vars(kind).keys() & {"run", "compile"})
    return optimizer if "run" in latest else None
