"""`strategy="auto"`: which step runs next, and why, from the records of the rounds so far. The rules, in order:

1. When a round has the full mark on every example of the valset, or after `max_rounds` rounds, stop.
2. When every step has had a turn since the last gain, stop. A round gained when its scores beat those of the best round
   before it, with a paired interval above zero. Where there are no scores, every step has one turn.
3. Without a prompt step and a weight step, or with a step that is neither (a Teleprompter of the user's own), the
   steps take turns in the order in which they were given.
4. First comes a prompt step where the untouched student passes fewer than half of the valset, or where no example has
   a label to rescue with, since a weight step would find few rows; else the step that was given first.
5. After a prompt step comes a weight step.
6. After a weight step comes
   a. a prompt step, where the 2x2 says that the prompts help or harm under the new weights;
   b. else a weight step once more (expert iteration), where the last gained, fewer than half of its examples gave it
      rows of their own making, and the program now passes a larger share;
   c. else a prompt step, since none has searched under these weights.

Of several steps of a kind, the one that ran the longest ago is meant. Only the records and the call decide, so that a
resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import dspy
from dspy.teleprompt.bootstrap_finetune import FinetuneTeleprompter
from dspy.teleprompt.teleprompt import Teleprompter

from ..records import DataCard, StepRecord, WeightDetails, count_text, score_text
from ..report.intervals import Effect, paired_interval
from ..rollouts.metrics import FULL_MARK, passes
from ..steps.adapter_step import AdapterStep
from ..steps.prompt_step import BootstrapFewShotRS

CONFIDENCE = 0.68
"""Of the intervals here: about one standard error to each side. A round too many costs minutes, a stop too early the
rest of the gain, so it is less than the report's 95%."""
FEW = 0.5
"""A smaller share than this, of the examples that pass or give rows, is few."""

Kind = Literal["prompt", "weight", "other"]

WEIGHT_STEPS = (AdapterStep, FinetuneTeleprompter)
PROMPT_STEPS = (
    BootstrapFewShotRS,
    dspy.AvatarOptimizer,
    dspy.BootstrapFewShot,
    dspy.BootstrapFewShotWithOptuna,
    dspy.BootstrapFewShotWithRandomSearch,
    dspy.COPRO,
    dspy.GEPA,
    dspy.KNNFewShot,
    dspy.LabeledFewShot,
    dspy.MIPROv2,
    dspy.SIMBA,
)


@dataclass(frozen=True)
class NextStep:
    """What comes next."""

    key: str | None
    """The step; None: stop."""
    why: str
    """One sentence, without its stop."""

    def __str__(self) -> str:
        return f"{'stop' if self.key is None else f'{self.key} next'}: {self.why}"


def decide(
    records: Sequence[StepRecord],
    optimizers: Mapping[str, Teleprompter],
    *,
    max_rounds: int,
    labelled: bool,
    full_mark: float = FULL_MARK,
) -> NextStep:
    """What comes after these rounds, all complete, the untouched student first. `labelled`: some example of the
    trainset has a label; `full_mark`: the score that can't be bettered."""
    return _Auto(records, optimizers, labelled, full_mark).decide(max_rounds)


def kind_of(optimizer: Teleprompter) -> Kind:
    """What a step changes, by what it is."""
    if isinstance(optimizer, WEIGHT_STEPS):
        return "weight"
    return "prompt" if isinstance(optimizer, PROMPT_STEPS) else "other"


@dataclass(frozen=True)
class _Auto:
    records: Sequence[StepRecord]
    optimizers: Mapping[str, Teleprompter]
    labelled: bool
    full_mark: float

    def decide(self, max_rounds: int) -> NextStep:
        if (full := self._with_the_full_mark()) is not None:
            who = full.strategy or "the untouched student"
            return NextStep(None, f"{who} has the full mark on the whole valset")
        if len(self.records) > max_rounds:
            return NextStep(None, f"max_rounds={max_rounds} rounds were run")
        since = self._since_the_last_gain()
        if self.optimizers.keys() <= {record.step for record in since}:
            return NextStep(None, self._why_stop(len(since)))
        if {kind_of(optimizer) for optimizer in self.optimizers.values()} != {"prompt", "weight"}:
            key = self._longest_ago(*self.optimizers)
            return NextStep(key, self._how_the_last_went() if self.records[1:] else "it was given first")
        if not self.records[1:]:
            return self._first()
        if self._kind(self.records[-1].step) == "prompt":
            more = "and no weights were trained on runs with these prompts yet"
            if self._ran_from("weight", lambda record: record.program):
                more = "and a weight step's turn is next"
            if self._gained(-1):
                more = f"and {self._passing(-1)} pass, so there is more to learn from"
            return NextStep(self._next("weight"), f"{self._how_the_last_went()}, {more}")
        return self._after_weights()

    def _first(self) -> NextStep:
        prompt = self._next("prompt")
        if self.records[0].scores and self._share_passing(0) < FEW:
            return NextStep(prompt, f"the untouched student passes {self._passing(0)}, few to learn from")
        if not self.labelled:
            return NextStep(prompt, "no example has a label to rescue failed runs with")
        return NextStep(next(iter(self.optimizers)), "it was given first")

    def _after_weights(self) -> NextStep:
        last = self.records[-1]
        prompts = _effect_of_prompts(last)
        if prompts is not None and (prompts.low > 0 or prompts.high < 0):
            text = f"under the tuned weights the prompts so far are worth {self._text(prompts)}"
            return NextStep(self._next("prompt"), text)
        if self._gained(-1) and isinstance(last.details, WeightDetails):
            card = last.details.data_card
            if _share_of_own(card) < min(FEW, self._share_passing(-1)):
                text = f"{self._how_the_last_went()} from {_sources(card)}, and {self._passing(-1)} pass now"
                return NextStep(self._next("weight"), f"{text}, so fresh runs give more to learn from")
        more = "and no prompts were searched under these weights yet"
        if self._ran_from("prompt", lambda record: record.models):
            more = "and a prompt step's turn is next"
        return NextStep(self._next("prompt"), f"{self._how_the_last_went()}, {more}")

    def _ran_from(self, kind: Kind, part: Callable[[StepRecord], object]) -> bool:
        """Whether a step of this kind ran from a program with this part as the last round has it."""
        last, rounds = part(self.records[-1]), pairwise(self.records)
        return bool(last) and any(self._kind(step.step) == kind and part(before) == last for before, step in rounds)

    def _with_the_full_mark(self) -> StepRecord | None:
        """The first round of which no score could be higher."""
        scored = (record for record in self.records if record.scores)
        return next((each for each in scored if passes(min(each.scores or ()), self.full_mark)), None)

    def _since_the_last_gain(self) -> Sequence[StepRecord]:
        gained = [position for position in range(1, len(self.records)) if self._gained(position)]
        return self.records[(gained[-1] if gained else 0) + 1 :]

    def _why_stop(self, rounds: int) -> str:
        if not self.records[0].scores:
            return "every step had its turn, and without a valset rounds can't be compared"
        last = "the last round gained no" if rounds == 1 else f"none of the last {rounds} rounds gained"
        return f"{last} more than its noise"

    def _gain(self, position: int) -> Effect | None:
        """Of a round over the best before it; None without scores."""
        record = self.records[position]
        before = [each for each in self.records[:position] if each.scores]
        if not record.scores or not before:
            return None
        best = max(before, key=lambda each: each.score or 0.0)
        return _effect(record.scores, best.scores or ())

    def _gained(self, position: int) -> bool:
        gain = self._gain(position)
        return gain is not None and gain.low > 0

    def _how_the_last_went(self) -> str:
        gain, step = self._gain(-1), self.records[-1].step
        if gain is None:
            return f"{step} is done"
        if self._gained(-1):
            return f"{step} gained {self._text(gain)}"
        if gain.high < 0:
            return f"{step} lost ({self._text(gain)})"
        return f"{step} gained nothing beyond its noise ({self._text(gain)})"

    def _text(self, effect: Effect) -> str:
        """As a report shows it: "+0.180 [68%: +0.050, +0.320]"."""
        largest = max((abs(record.score) for record in self.records if record.score is not None), default=None)
        gain, low, high = (score_text(end, largest, sign=True) for end in (effect.gain, effect.low, effect.high))
        return f"{gain} [{CONFIDENCE:.0%}: {low}, {high}]"

    def _passing(self, position: int) -> str:
        scores = self.records[position].scores or ()
        return f"{sum(passes(score, self._mark) for score in scores)} of {count_text(len(scores), 'example')}"

    def _share_passing(self, position: int) -> float:
        scores = self.records[position].scores or ()
        return sum(passes(score, self._mark) for score in scores) / len(scores) if scores else 0.0

    @property
    def _mark(self) -> float:
        """From which score weight steps learn from a run."""
        marks = [step.threshold for step in self.optimizers.values() if isinstance(step, AdapterStep)]
        return min([mark for mark in marks if mark is not None], default=FULL_MARK)

    def _kind(self, key: str) -> Kind:
        return kind_of(self.optimizers[key])

    def _next(self, kind: Kind) -> str:
        return self._longest_ago(*(key for key in self.optimizers if self._kind(key) == kind))

    def _longest_ago(self, *keys: str) -> str:
        latest = {record.step: position for position, record in enumerate(self.records)}
        return min(keys, key=lambda key: latest.get(key, 0))


def _effect(scores: Sequence[float], before: Sequence[float]) -> Effect:
    gain = (sum(scores) - sum(before)) / len(scores)
    return Effect(gain, *paired_interval(scores, before, confidence=CONFIDENCE))


def _effect_of_prompts(record: StepRecord) -> Effect | None:
    """What the prompts before a weight step do under its weights, over the student's; None where it is not known."""
    cells = record.cells
    return None if cells is None else _effect(cells["tuned_new"], cells["tuned_old"])


def _share_of_own(card: DataCard) -> float:
    """The share of the examples that gave rows without their label as a hint."""
    rows = sum(card.kept_by_source.values())
    if not rows or not card.examples:
        return 1.0
    return card.examples_covered / card.examples * (1 - card.kept_by_source.get("rescue", 0) / rows)


def _sources(card: DataCard) -> str:
    rescued, rows = card.kept_by_source.get("rescue", 0), sum(card.kept_by_source.values())
    text = f"{card.examples_covered} of {count_text(card.examples, 'example')}"
    return f"{text} ({rescued} of {rows} rows rescued with the label)" if rescued else text
