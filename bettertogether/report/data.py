"""The numbers of a compile run: rounds with scores and intervals, the selected one, the cost, the warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Self

from ..errors import DataError
from ..records import (
    SCHEMA,
    SHOWN,
    Ledger,
    PromptDetails,
    Saved,
    SavedRecord,
    StepRecord,
    Whole,
    read,
    report_of_schema_1,
    score_text,
)
from .intervals import UNKNOWN, Attribution, Effect, Interval, attribution, mean_interval, paired_interval, within_one


@dataclass(frozen=True)
class ReportData(Saved):
    """What a compile run found."""

    rounds: tuple[SavedRecord, ...]
    """Every round in order; the first is the untouched student."""
    selected: Whole
    """Position in `rounds` of the program that compile returned."""
    valset_size: Annotated[int, SHOWN]
    """Examples that each round was scored on; 0 without a valset."""
    strategy: str
    """What was asked for, such as "p -> w -> p"."""
    seed: Annotated[int, SHOWN] = 0
    versions: Mapping[str, Annotated[str, SHOWN]] = field(default_factory=dict)
    """Package name to version."""
    machine: Mapping[str, Annotated[str, SHOWN]] = field(default_factory=dict)
    """What it ran on: platform, python, cpus (how many), processor, and accelerator where this process used a GPU."""
    warnings: tuple[str, ...] = ()
    stopped: str = ""
    """Why strategy="auto" stopped, in a sentence; "" for another strategy, and where the run ended early."""
    prompt_adapter: str = ""
    """Class of the prompt adapter that the run was under; "" in reports from before it was kept."""

    def __post_init__(self) -> None:
        if not isinstance(self.selected, int) or not 0 <= self.selected < len(self.rounds):
            raise DataError(f"selected={self.selected} is not allowed: there are {len(self.rounds)} rounds, from 0.")

    @property
    def student_round(self) -> StepRecord:
        """The untouched student."""
        return self.rounds[0]

    @property
    def selected_round(self) -> StepRecord:
        """The round whose program compile returned."""
        return self.rounds[self.selected]

    @property
    def ledger(self) -> Ledger:
        """The cost of all rounds, of those of earlier sittings too. What tries that were cut off or failed spent before
        the last sitting is in the run directory alone, where a `Budget` counts it."""
        return Ledger.total(record.ledger for record in self.rounds)

    @property
    def metric_calls(self) -> int:
        """Calls of the metric in the whole run."""
        return self.ledger.metric_calls

    @property
    def lm_calls(self) -> int:
        """Calls of LMs by the program and by the metric in the whole run, cache hits included."""
        return self.ledger.lm_calls

    def gain(self, position: int) -> Effect | None:
        """Gain of a round over the student on the same examples, with its 95% interval; None when either has no
        scores. Raises DataError for a position that is none."""
        record, student = self._round(position), self.student_round
        if not record.scores or not student.scores or len(record.scores) != len(student.scores):
            return None
        gain = sum(record.scores) / len(record.scores) - sum(student.scores) / len(student.scores)
        return Effect(gain, *paired_interval(record.scores, student.scores, ends_at_one=self._ends_at_one))

    def score_interval(self, position: int) -> Interval:
        """95% interval of a round's score; (nan, nan) when not known. Raises DataError for a position that is none."""
        scores = self._round(position).scores
        return mean_interval(scores, ends_at_one=self._ends_at_one) if scores else UNKNOWN

    def _round(self, position: int) -> StepRecord:
        count = len(self.rounds)
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < count:
            raise DataError(f"position={position!r} is not allowed: there are {count} rounds, from 0.")
        return self.rounds[position]

    @property
    def two_by_two_round(self) -> StepRecord | None:
        """The round whose 2x2 is shown: the selected one, or else the last for which it was measured."""
        rounds = (self.selected_round, *reversed(self.rounds))
        return next((record for record in rounds if record.cells is not None), None)

    @property
    def two_by_two(self) -> Mapping[str, Sequence[float]] | None:
        """Per-example scores of the 2x2 of weights and prompts (keys: `records.CELLS`) of `two_by_two_round`."""
        record = self.two_by_two_round
        return None if record is None else record.cells

    @property
    def attribution(self) -> Attribution | None:
        """What the weights and the prompts each gave in `two_by_two_round`."""
        cells = self.two_by_two
        return attribution(cells, ends_at_one=self._ends_at_one) if cells else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"schema": SCHEMA, **asdict(self), "rounds": [record.to_dict() for record in self.rounds]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises DataError for another schema, and for a missing, unknown or wrong field."""
        return read(cls, "report", data, report_of_schema_1)

    def number(self, value: float | None, *, sign: bool = False) -> str:
        """A score or a gain as text, with decimals that fit the largest score of the run; "-" for None and NaN."""
        return score_text(value, self._largest, sign=sign)

    @cached_property
    def _ends_at_one(self) -> bool:
        """Whether the metric gave no score outside of 0 to 1 in the whole run."""
        scores = [record.scores for record in self.rounds if record.scores]
        return within_one([*scores, *(each for record in self.rounds for each in (record.cells or {}).values())])

    @cached_property
    def _largest(self) -> float | None:
        """Of the rounds' scores or, where there are none, of the candidates'; None without either."""
        prompts = [record.details for record in self.rounds if isinstance(record.details, PromptDetails)]
        scores = [record.score for record in self.rounds if record.score is not None]
        scores = scores or [each.score for details in prompts for each in details.candidates if each.score is not None]
        return max(map(abs, scores), default=None)
