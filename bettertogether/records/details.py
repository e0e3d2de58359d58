"""What a step did, by kind of step. A new kind is added to `Details`, so that records and reports read it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from typing_extensions import TypedDict

from .saved import Count, Finite, Number, Plain, Saved, Switch, Whole


class SignatureState(TypedDict, total=False):
    """What DSPy saves of a signature, as far as it is shown."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    instructions: Plain


class PromptState(TypedDict, total=False):
    """What DSPy saves of a predictor, as far as it is shown."""

    __pydantic_config__ = pydantic.ConfigDict(extra="allow")  # type: ignore[misc]
    signature: SignatureState | None
    demos: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CandidateScore(Saved):
    """One set of prompts that the prompt step tried."""

    name: str
    score: Number | None
    """Mean over the validation examples that it was scored on."""
    scored_on: Count
    """How many those were."""
    stopped: Switch
    """It left the race before the end."""
    demos: Count


@dataclass(frozen=True)
class RaceResult(Saved):
    """What a race cost and spared."""

    calls_made: Whole
    calls_saved: Whole
    """Program calls that scoring every candidate fully would have taken on top."""
    confidence: Number
    """Of each stop: that the candidate would not have ended above the leader."""

    def __add__(self, other: RaceResult) -> RaceResult:
        calls = self.calls_made + other.calls_made, self.calls_saved + other.calls_saved
        return RaceResult(*calls, self.confidence)


@dataclass(frozen=True)
class TraceCounts(Saved):
    """The runs that demos were taken from."""

    examples: Count
    """Examples that were run."""
    solved: Count
    """Examples with a run that the metric accepted, or that was good enough where hardly any was."""
    failed: Mapping[str, Count]
    """Runs that were not accepted, by reason."""


@dataclass(frozen=True)
class PromptDetails(Saved):
    """What a prompt step did."""

    candidates: tuple[CandidateScore, ...]
    chosen: str
    """Name of the candidate that was taken."""
    validation_examples: Count
    race: RaceResult
    traces: TraceCounts
    dropped_demos: Mapping[str, Count] = field(default_factory=dict)
    """Predictor to the demos that its model's context had no room for."""
    left_out: Mapping[str, Mapping[str, Count]] = field(default_factory=dict)
    """Predictor to reason to how many examples can't be its demos."""
    best: tuple[Mapping[str, PromptState], ...] = field(default=(), repr=False)
    """Prompts by predictor of the best few candidates that show demos, best first: later steps try them again."""
    kind: Literal["prompt"] = field(default="prompt", repr=False)


class SampleRow(TypedDict, total=False):
    """A row in its JSON form."""

    prompt: str | Sequence[Mapping[str, Any]] | None
    completion: str | Sequence[Mapping[str, Any]] | None
    rejected: str | Sequence[Mapping[str, Any]] | None
    predictor: Plain
    example: Plain
    label: Plain
    source: Plain


@dataclass(frozen=True)
class DataCard(Saved):
    """What training rows are made of."""

    kept_by_predictor: Mapping[str, Count]
    kept_by_label: Mapping[str, Count]
    kept_by_source: Mapping[str, Count]
    dropped_by_reason: Mapping[str, Count]
    dropped_by_predictor: Mapping[str, Count]
    examples: Count
    """Examples that were run."""
    examples_covered: Count
    """Examples that gave at least one row."""
    prompt_tokens: Mapping[str, Count]
    """min, median and max over the rows."""
    completion_tokens: Mapping[str, Count]
    samples: tuple[SampleRow, ...]
    """Up to five rows."""
    warnings: tuple[str, ...] = ()
    rows_with_demos: Count = 0
    """Rows that are also shown with demos in their prompt."""
    demo_sets: Mapping[str, Count] = field(default_factory=dict)
    """Where those demos come from, to how many sets of them there are: "given" (the program's own prompts), "earlier"
    (those of earlier prompt steps), "traces" and "labels"."""
    forms_left_out: Mapping[str, Count] = field(default_factory=dict)
    """Prompts with demos in whose place a row shows the zero-shot prompt, by reason."""
    pairs: Count = 0
    """Rows that are pairs: two answers to a prompt, of which one is to be preferred."""


@dataclass(frozen=True)
class LossLine(Saved):
    """One line of a training's history."""

    adapter: str
    """Model name of the adapter that was trained."""
    step: Count
    """Optimizer steps done."""
    total_steps: Count
    epoch: Finite
    """Passes over the rows done."""
    loss: Number | None
    """Mean loss per completion token of this step's rows, or per pair; None on a line that only gives
    `validation_loss`."""
    validation_loss: Number | None
    """The same of the rows held out, where it was measured."""
    tokens: Count
    """Tokens trained on so far."""
    learning_rate: Finite
    validation_error: Number | None = None
    """Mean probability of another token than the row's, of the rows held out: it chose the epoch."""


@dataclass(frozen=True)
class HeldOutLoss(Saved):
    """Mean loss per token of the rows held out, before training and of the weights kept; None where none were."""

    before: Number | None
    after: Number | None


@dataclass(frozen=True)
class TrainedAdapter(Saved):
    """An adapter that a weight step trained."""

    trained_from: str
    """Model name, and the predictor where each has its own adapter."""
    folder: str
    rows: str
    """File of the rows that it was trained on; those held out, where any were, are in `NAME.held_out.jsonl` beside."""
    best_epoch: Count
    """The epoch whose weights were kept, from 1."""
    held_out_loss: HeldOutLoss
    """Of the completion tokens that the answer's grammar leaves free; of all where it leaves none or there is none; of
    pairs, per pair."""
    skipped_rows: tuple[tuple[Whole, str], ...]
    """Rows left out, as (index, reason)."""
    all_tokens_loss: HeldOutLoss = HeldOutLoss(None, None)
    """Of all completion tokens; of pairs, of those of the chosen answers."""
    field_losses: Mapping[str, HeldOutLoss] = field(default_factory=dict)
    """Of the free tokens in the values of each output field."""
    row_count: Count = 0
    """Rows (or pairs) that it was trained on; 0 in records from before they were counted."""


@dataclass(frozen=True)
class Blame(Saved):
    """How many failed runs one predictor alone repairs: its calls are answered anew, those before them are answered as
    they were, and the program goes on from there."""

    calls: Count
    """Calls of failed runs that were answered anew."""
    failed_runs: Count
    """The runs that these calls were of."""
    repaired: Count
    """Those of them that passed with any of the new answers."""


@dataclass(frozen=True)
class WeightDetails(Saved):
    """What a weight step did."""

    data_card: DataCard
    adapters: Mapping[str, TrainedAdapter]
    """By model name."""
    history: tuple[LossLine, ...]
    blame: Mapping[str, Blame] = field(default_factory=dict)
    """By predictor, where calls of failed runs were answered anew."""
    kind: Literal["weight"] = field(default="weight", repr=False)


@dataclass(frozen=True)
class RewardLine(Saved):
    """One step of learning from rewards."""

    step: Count
    """From 1; 0 is the program as it was before."""
    reward: Finite | None = None
    """Mean reward of the step's runs; None on line 0."""
    spread: Finite | None = None
    """Standard deviation of the rewards of an example's runs, the mean of the examples."""
    examples: Count = 0
    """Examples that were run."""
    kept_groups: Count = 0
    """Groups of answers to one call whose rewards differ: those that were learned from."""
    groups: Count = 0
    """All groups."""
    kl: Number | None = None
    """Nats per free token from the adapter that the training started from; None where it is not computed."""
    tokens_per_s: Finite = 0.0
    """Prompt, generated and trained tokens of the step in a second of it."""
    held_out_score: Finite | None = None
    """Mean score of the examples held out after this step, where it was measured."""


@dataclass(frozen=True)
class RewardedAdapter(Saved):
    """An adapter that learned from rewards."""

    trained_from: str
    """Model name, and the predictor where each has its own adapter."""
    folder: str


@dataclass(frozen=True)
class PolicyDetails(Saved):
    """What a policy step did."""

    adapters: Mapping[str, RewardedAdapter]
    """By model name; none where no step scored as high as the program before them."""
    history: tuple[RewardLine, ...]
    best_step: Count
    """The step whose adapter was kept."""
    held_out_examples: Count
    kind: Literal["policy"] = field(default="policy", repr=False)


@dataclass(frozen=True)
class OtherDetails(Saved):
    """What is known of a step by any other Teleprompter."""

    optimizer: str
    """Name of its class."""
    kind: Literal["other"] = field(default="other", repr=False)


Details = Annotated[PromptDetails | WeightDetails | PolicyDetails | OtherDetails, pydantic.Field(discriminator="kind")]
"""Told apart by `kind`."""
