"""One frozen `StepRecord` per finished step, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import pydantic

from .details import Details, PromptState
from .saved import SCHEMA, SHOWN, Count, Finite, Number, Saved, Whole, current_fields, read
from .schema_1 import record_of_schema_1

StepStatus = Literal["complete", "failed", "skipped"]

STUDENT = "student"
"""How the untouched student, whose strategy is "", is called."""

ARROW = " -> "
"""What stands between the steps of a record's strategy."""

CELLS = ("base_old", "base_new", "tuned_old", "tuned_new")
"""The 2x2 of a weight step: weights (base, tuned) and prompts (old: the student's, new: those that the step was
given)."""


@dataclass(frozen=True)
class Ledger(Saved):
    """What some piece of work cost. Ledgers add up with `+`, and many of them with `total`."""

    program_calls: Count = 0
    """Runs of the whole program on one example."""
    metric_calls: Count = 0
    lm_calls: Count = 0
    """Calls of LMs by the program and by the metric, cache hits included."""
    cache_hits: Count = 0
    prompt_tokens: Count = 0
    """Prompt tokens of the calls that reached a model."""
    generated_tokens: Count = 0
    trained_tokens: Count = 0
    """Tokens that went forward and backward in training."""
    seconds: Annotated[Finite, pydantic.Field(ge=0)] = 0.0
    cost: Number | None = 0.0
    """US dollars for the LM calls, by LiteLLM's prices as DSPy has them; local models cost nothing. None: that of some
    LM that was called is not known."""

    @staticmethod
    def total(ledgers: Iterable[Ledger]) -> Ledger:
        """What all of them cost together."""
        every = [vars(ledger) for ledger in ledgers]
        sums = {n: sum((each[n] for each in every), zero) for n, zero in vars(Ledger()).items() if n != "cost"}
        return Ledger(**sums, cost=total_cost([each["cost"] for each in every]))

    def __add__(self, other: Ledger) -> Ledger:
        # Not `total`, which takes three times as long for two.
        sums = {n: value + getattr(other, n) for n, value in vars(self).items() if n != "cost"}
        return Ledger(**sums, cost=total_cost([self.cost, other.cost]))

    def times(self, factor: float) -> Ledger:
        """So many times the same work, its counts rounded."""
        counts = {n: round(factor * value) for n, value in vars(self).items() if n not in ("seconds", "cost")}
        cost = None if self.cost is None else factor * self.cost
        return Ledger(**counts, seconds=factor * self.seconds, cost=cost)

    @property
    def tokens(self) -> int:
        """Prompt, generated and trained tokens together."""
        return self.prompt_tokens + self.generated_tokens + self.trained_tokens

    def with_seconds(self, seconds: float) -> Ledger:
        """The same work, with this wall time."""
        return replace(self, seconds=seconds)


def total_cost(costs: Sequence[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    return sum(known, 0.0) if len(known) == len(costs) else None


@dataclass(frozen=True)
class Failure(Saved):
    """The examples of a pass that failed in one way."""

    kind: str
    """"metric error", "program error", "parse failure", "prompt too long", "timeout", "metric returned NaN"."""
    count: Count
    reason: str
    """The commonest reason among them, in one line."""
    example: str
    """One of them in short: its position and inputs."""


def score_text(value: float | None, largest: float | None = None, *, sign: bool = False) -> str:
    """A score or a gain as text, "-" for None and NaN. Its decimals fit the largest score that it is shown with (None:
    itself): three below 10, fewer above, and more where that would not show three digits of the largest."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value if largest is None else largest)
    power = math.floor(math.log10(size)) if size and math.isfinite(size) else 0
    decimals = max(1, (3 if power >= 0 else 2) - power)
    return format(value, f"{'+' if sign else ''}{f'.{decimals}f' if power >= -4 else '.2e'}")


def count_text(count: int, unit: str) -> str:
    """A count with its unit: "1 example", "4 examples"."""
    return f"{count} {unit}{'' if count == 1 else 's'}"


def failure_text(failures: Sequence[Failure]) -> str:
    """Counts by kind: "5 x parse failure, 2 x timeout"."""
    return ", ".join(f"{failure.count} x {failure.kind}" for failure in failures)


def failure_reason(failures: Sequence[Failure]) -> str:
    """Counts by kind, and the commonest reason of the commonest kind, where it says more than the kind: "5 x timeout,
    most often slow"."""
    said = failures[0].reason == failures[0].kind
    return failure_text(failures) if said else f"{failure_text(failures)}, most often {failures[0].reason}"


@dataclass(frozen=True)
class StepRecord(Saved):
    """One step of a strategy, finished. The untouched student is the record with index 0 and strategy ""."""

    index: Whole
    step: str
    """Key of the optimizer that ran; "" for the untouched student."""
    strategy: str
    """The prefix of the strategy that ends with this step, such as "p -> w"."""
    status: Annotated[StepStatus, SHOWN]
    score: Number | None = None
    """Mean of `scores`; None when there is no valset or the step failed. In the metric's own unit."""
    scores: tuple[Finite, ...] | None = field(default=None, repr=False)
    """The metric on each valset example, in the order of the valset."""
    failures: tuple[Failure, ...] = ()
    """The valset examples that failed and so scored 0, by kind, the commonest first."""
    scored_example: str | None = None
    """A valset example with the program's answer, in short, where all scores are equal."""
    step_gain: Number | None = None
    """The step's own evidence of a gain, on data other than the valset or by another measure (p: validation score over
    the prompts it was given; w: fall of the held-out error, r: of the held-out loss of its pairs, where training began
    at the weights before). Breaks ties of `score`."""
    ledger: Ledger = field(default_factory=Ledger)
    details: Details | None = field(default=None, repr=False)
    """What the step did, where a step ran to its end."""
    warnings: tuple[str, ...] = field(default=(), repr=False)
    """What the step has to say against its own result."""
    score_warnings: tuple[str, ...] = field(default=(), repr=False)
    """What is to be said against the scores of the round and of its 2x2."""
    two_by_two: Mapping[str, tuple[Finite, ...]] | None = field(default=None, repr=False)
    """Scores by example of each of `CELLS`, where they were measured."""
    adapter_folders: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Model name to folder of the adapters that the program uses; a resumed run takes them from there."""
    program: Mapping[str, PromptState] | None = field(default=None, repr=False)
    """The program's state after the step (`dspy.Module.dump_state()` without its LMs)."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Predictor name to the model name of its LM after the step."""
    error: str | None = None
    """Traceback of a failed step; the reason of a skipped one."""
    why: str = field(default="", repr=False)
    """Why strategy="auto" chose this step, in a sentence; "" where the strategy names it."""

    @property
    def name(self) -> str:
        """How the round is called: its strategy, or "student"."""
        return self.strategy or STUDENT

    @property
    def failed(self) -> int:
        """How many valset examples failed."""
        return sum(failure.count for failure in self.failures)

    @property
    def cells(self) -> Mapping[str, tuple[float, ...]] | None:
        """Scores by example of each of `CELLS`; None where they were not all measured."""
        measured = self.two_by_two or {}
        return {cell: measured[cell] for cell in CELLS} if all(map(measured.get, CELLS)) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises DataError for another schema, and for a missing, unknown or wrong field."""
        return read(cls, "record", data, record_of_schema_1)


SavedRecord = Annotated[
    StepRecord, pydantic.BeforeValidator(lambda data: current_fields("record", data, record_of_schema_1))
]
"""A record inside another saved value."""
