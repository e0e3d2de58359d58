"""What a compile run records: one frozen `StepRecord` per finished step, JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from .saved_report import SCHEMA, checked_round

StepStatus = Literal["complete", "failed", "skipped"]


@dataclass(frozen=True)
class Ledger:
    """What some piece of work cost. Ledgers add up with `+`."""

    program_calls: int = 0
    """Runs of the whole program on one example."""
    metric_calls: int = 0
    lm_calls: int = 0
    """Calls of predictors to their LMs, cache hits included."""
    cache_hits: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of the calls that reached a model."""
    generated_tokens: int = 0
    trained_tokens: int = 0
    """Tokens that went forward and backward in training."""
    seconds: float = 0.0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def tokens(self) -> int:
        """Prompt, generated and trained tokens together."""
        return self.prompt_tokens + self.generated_tokens + self.trained_tokens

    def with_seconds(self, seconds: float) -> Ledger:
        """The same work, with this wall time."""
        return replace(self, seconds=seconds)


@dataclass(frozen=True)
class Failure:
    """The examples of a pass that failed in one way."""

    kind: str
    """"metric error", "program error", "parse failure", "prompt too long", "timeout", "metric returned NaN"."""
    count: int
    reason: str
    """The commonest reason among them, in one line."""
    example: str
    """One of them in short: its position and inputs."""


@dataclass(frozen=True)
class StepRecord:
    """One step of a strategy, finished. The untouched student is the record with index 0 and strategy ""."""

    index: int
    step: str
    """Key of the optimizer that ran; "" for the untouched student."""
    strategy: str
    """The prefix of the strategy that ends with this step, such as "p -> w"."""
    status: StepStatus
    score: float | None = None
    """Mean of `scores`; None when there is no valset or the step failed. In the metric's own unit."""
    scores: tuple[float, ...] | None = field(default=None, repr=False)
    """The metric on each valset example, in the order of the valset."""
    failures: tuple[Failure, ...] = ()
    """The valset examples that failed and so scored 0, by kind, the commonest first."""
    scored_example: str | None = None
    """A valset example with the program's answer, in short, where all scores are equal."""
    step_gain: float | None = None
    """The step's own evidence of a gain, on data other than the valset (p: validation score over the prompts it was
    given; w: fall of the held-out loss). Breaks ties of `score`."""
    ledger: Ledger = field(default_factory=Ledger)
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the step reported, as JSON: candidates and their scores, the data card, the loss history, the 2x2, ..."""
    program: Mapping[str, Any] | None = field(default=None, repr=False)
    """The program's state after the step (`dspy.Module.dump_state()` without its LMs)."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Predictor name to the model name of its LM after the step."""
    error: str | None = None
    """Traceback of a failed step; the reason of a skipped one."""

    @property
    def failed(self) -> int:
        """How many valset examples failed."""
        return sum(failure.count for failure in self.failures)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises DataError for another schema, and for a missing, unknown or wrong field."""
        values = checked_round(data)
        scores = values.get("scores")
        values["scores"] = None if scores is None else tuple(scores)
        values["failures"] = tuple(Failure(**failure) for failure in values.get("failures", ()))
        values["ledger"] = Ledger(**values.get("ledger", {}))
        return cls(**values)
