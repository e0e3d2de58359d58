"""What a step would do, in amounts that a probe of the machine can price, and what is assumed of a run to say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import dspy

from ..rollouts.labels import label_fields, output_names
from ..rollouts.rescue import has_leads


@dataclass(frozen=True)
class Outlook:
    """How a run may go, and where it stands before a step."""

    solved: float
    """Share of the examples that the program solves as it is."""
    again: float
    """Share of those failed that one more try solves."""
    hinted: float
    """Share of those still failed that a hint solves."""
    learned: float | None
    """Share of the examples that training rows come from; None: those that are solved after all tries."""
    graded: bool = False
    """Where few are solved, rows come from the best runs of the others too."""
    contest: tuple[float, float] = (0.0, 0.0)
    """Mean scores of the best prompts in a race, and of all others."""
    patience: float = 1.0
    """How far a training goes, from its fewest epochs (0) to its most (1)."""
    forms: float | None = None
    """Share of the batches that show demos, where any may; None: as the training is configured."""
    calls: float = 1.0
    """Calls of a run that a weight step learns from."""
    branch_runs: Mapping[str, float] = field(default_factory=dict)
    """By predictor, runs that it costs to answer its calls of a run anew, once."""
    has_demos: bool = False
    """The prompts show demos."""
    is_tuned: bool = False
    """The program's weights were trained."""
    known: float = 0.0
    """Share of the trainset that the program ran on before, the answers kept."""
    bare: float = 0.0
    """The same of the program without its demos."""
    tried: bool = False
    """Of these examples further tries are kept too."""
    is_scored: bool = False
    """The program ran on the valset before, the answers kept."""


@dataclass(frozen=True)
class Work:
    """Amounts of work. They add up with `+`."""

    plain_runs: float = 0
    """Runs of the program on one example, without demos in its prompts."""
    demo_runs: float = 0
    """The same with demos."""
    teacher_runs: float = 0
    """The same of a teacher."""
    prompts: float = 0
    """Sets of demos, whose tokens are computed once for all runs that show them."""
    trained_rows: float = 0
    """Rows that are trained on, once for each epoch."""
    form_batches: float = 0
    """Batches of rows that show a set of demos."""
    held_out_rows: float = 0
    """Rows whose loss is measured, once for each time."""
    known: float = 0
    """Examples of the trainset that the program which comes out has run on."""
    given: float = 0
    """The same of the program that the step is given."""
    bare: float = 0
    """The same of that program without its demos."""
    trainings: float = 0
    """How often a training begins."""

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @classmethod
    def of_runs(cls, runs: float, outlook: Outlook, *, by_teacher: bool = False) -> Work:
        """Runs of a teacher, or of the program as it is."""
        if by_teacher:
            return cls(teacher_runs=runs)
        return cls(demo_runs=runs) if outlook.has_demos else cls(plain_runs=runs)


@dataclass
class ExpectedTries:
    """The tries of examples as an outlook has them, for `Sampling.carry_out`."""

    outlook: Outlook
    examples: int
    firsts: int = 1
    """First runs of each example: one for each teacher."""
    hints: int = 0
    """Runs with a hint that an unsolved example has, at most."""
    runs: float = 0
    unsolved: float = field(init=False)

    def __post_init__(self) -> None:
        self.unsolved = float(self.examples)

    @classmethod
    def of(
        cls, student: dspy.Module, examples: Sequence[dspy.Example], outlook: Outlook, teachers: int
    ) -> ExpectedTries:
        """Those of a program's examples."""
        labels = label_fields(examples, output_names(student))
        hints = (2 if has_leads(student, labels) else 1) if labels else 0
        return cls(outlook, len(examples), max(1, teachers), hints)

    @property
    def solved(self) -> float:
        return self.examples - self.unsolved

    def unknown(self, known: float) -> float:
        """The runs, without those that are kept of so many examples."""
        return self.runs * (1 - known / self.examples) if self.outlook.tried else self.runs - known

    def first(self) -> None:
        self.runs += self.firsts * self.examples
        self.unsolved *= 1 - self.outlook.solved

    def sample(self, number: int, temperature: float, *, everyone: bool = False) -> None:
        self.runs += self.examples if everyone else self.unsolved
        self.unsolved *= 1 - self.outlook.again

    def branch(self, temperatures: Sequence[float], *, everyone: bool = False) -> None:
        runs = len(temperatures) * sum(self.outlook.branch_runs.values())
        self.runs += runs * (self.examples if everyone else self.unsolved)
        self.unsolved *= 1 - self.outlook.again

    def rescue(self) -> None:
        self.runs += self.hints * self.unsolved
        if self.hints:
            self.unsolved *= 1 - self.outlook.hinted
