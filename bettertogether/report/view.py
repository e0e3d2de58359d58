"""What the table and the page show of a report, computed once; they only lay it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..records import (
    HeldOutLoss,
    PolicyDetails,
    StepRecord,
    TrainedAdapter,
    WeightDetails,
    count_text,
    failure_reason,
    failure_text,
)
from .data import ReportData
from .intervals import Effect, Interval, share_interval


@dataclass(frozen=True)
class GainView:
    """A gain as a number and as text."""

    effect: Effect
    number: str
    """Such as "+0.080"."""
    interval: str
    """Such as "[+0.020, +0.140]"; "" when not known."""

    @property
    def text(self) -> str:
        """Both: "+0.080 [+0.020, +0.140]"."""
        return f"{self.number} {self.interval}".rstrip()


@dataclass(frozen=True)
class BlameView:
    """How far failures come from one predictor."""

    predictor: str
    calls: str
    """Calls of failed runs that were answered anew."""
    share: str
    """Of the failed runs, those that this predictor's new answers alone repaired: "0.75 [0.41, 0.93]"."""
    runs: str
    """The same as counts: "6 of 8"."""


@dataclass(frozen=True)
class RoundView:
    """One round."""

    record: StepRecord
    selected: bool
    score: str
    interval: Interval
    """Of the score."""
    gain: GainView | None
    """Over the student; None when not known."""
    gain_text: str
    """"" for the student itself, "-" when not known."""
    examples: str
    """How many it was scored on."""
    failures: str
    """Examples that failed, counted by kind."""
    seconds: str
    cost: str
    """In US dollars."""
    losses: tuple[str, ...]
    """Of each adapter that it trained: on how many rows, and the held-out losses. Where it learned from rewards, what
    became of those."""
    blame: tuple[BlameView, ...]
    """Of each predictor whose calls were answered anew, the one that most failures come from first."""

    @property
    def name(self) -> str:
        """The strategy so far."""
        return self.record.name


@dataclass(frozen=True)
class TwoByTwoView:
    """The 2x2 of weights and prompts, and what each of them gave."""

    other_round: str
    """The round that it is of, where that is not the selected one; else ""."""
    means: Mapping[str, str]
    """Mean score of each of `CELLS`."""
    weights: GainView
    prompts: GainView
    both: GainView
    """What they gave together beyond the sum of each alone."""
    total: GainView


@dataclass(frozen=True)
class ReportView:
    """A report with everything that is computed for showing it."""

    report: ReportData
    rounds: tuple[RoundView, ...]
    examples: str
    """How many validation examples there were, in words."""
    reasons: tuple[str, ...]
    """Why "auto" ran each of its rounds, and why it stopped."""
    failed: tuple[str, ...]
    """Of each round in which examples failed, how many, by kind, and the commonest reason."""
    two_by_two: TwoByTwoView | None
    """Where it was measured."""
    seconds: str
    """Of the whole run."""
    cost: str
    """Of the whole run; "" where no LM is paid for."""

    @property
    def selected(self) -> RoundView:
        """The round whose program compile returned."""
        return self.rounds[self.report.selected]


def view_of(report: ReportData) -> ReportView:
    """The view of a report."""
    size = report.valset_size
    return ReportView(
        report=report,
        rounds=tuple(_round(report, position) for position in range(len(report.rounds))),
        examples=count_text(size, "validation example") if size else "no validation examples",
        reasons=tuple(f"{name}: {why}." for name, why in _whys(report) if why),
        failed=tuple(
            f"{each.name}: {count_text(each.failed, 'example')} failed and scored 0: {failure_reason(each.failures)}"
            for each in report.rounds
            if each.failures
        ),
        two_by_two=_two_by_two(report),
        seconds=seconds_text(report.ledger.seconds),
        cost=cost_text(report.ledger.cost) if report.ledger.cost != 0 else "",
    )


def _whys(report: ReportData) -> list[tuple[str, str]]:
    return [*((record.name, record.why) for record in report.rounds), ("stop", report.stopped)]


def _round(report: ReportData, position: int) -> RoundView:
    record, effect = report.rounds[position], report.gain(position)
    gain = None if effect is None else _gain(report, effect)
    known = "-" if gain is None else gain.text
    return RoundView(
        record=record,
        selected=position == report.selected,
        score=report.number(record.score),
        interval=report.score_interval(position),
        gain=gain,
        gain_text="" if position == 0 else known,
        examples="-" if record.scores is None else str(len(record.scores)),
        failures=failure_text(record.failures),
        seconds=seconds_text(record.ledger.seconds),
        cost=cost_text(record.ledger.cost),
        losses=_losses(report, record),
        blame=_blame(record),
    )


def _blame(record: StepRecord) -> tuple[BlameView, ...]:
    if not isinstance(record.details, WeightDetails):
        return ()
    counted = [(name, each, each.repaired / max(1, each.failed_runs)) for name, each in record.details.blame.items()]
    views = []
    for name, each, share in sorted(counted, key=lambda line: -line[2]):
        low, high = share_interval(each.repaired, each.failed_runs)
        text = f"{share:.2f} [{low:.2f}, {high:.2f}]" if each.failed_runs else "-"
        views.append(BlameView(name, str(each.calls), text, f"{each.repaired} of {each.failed_runs}"))
    return tuple(views)


def _losses(report: ReportData, record: StepRecord) -> tuple[str, ...]:
    if isinstance(record.details, PolicyDetails):
        return (rewards_text(record.details, report.number),)
    if not isinstance(record.details, WeightDetails):
        return ()
    pairs = record.details.data_card.pairs > 0
    texts = {name: loss_text(adapter, pairs) for name, adapter in record.details.adapters.items()}
    several = len(texts) > 1
    return tuple(f"{name}: {text}" if several else text for name, text in texts.items() if text)


def _gain(report: ReportData, effect: Effect) -> GainView:
    ends = ", ".join(report.number(end, sign=True) for end in (effect.low, effect.high))
    interval = f"[{ends}]" if math.isfinite(effect.low) else ""
    return GainView(effect, report.number(effect.gain, sign=True), interval)


def _two_by_two(report: ReportData) -> TwoByTwoView | None:
    record, cells, split = report.two_by_two_round, report.two_by_two, report.attribution
    if record is None or cells is None or split is None:
        return None
    return TwoByTwoView(
        other_round="" if record is report.selected_round else record.name,
        means={cell: report.number(sum(scores) / len(scores)) for cell, scores in cells.items()},
        weights=_gain(report, split.weights),
        prompts=_gain(report, split.prompts),
        both=_gain(report, split.interaction),
        total=_gain(report, split.total),
    )


def loss_text(adapter: TrainedAdapter, pairs: bool = False) -> str:
    """On how many rows (or pairs) an adapter was trained, and its held-out losses before and after, as far as they are
    known."""
    count = count_text(adapter.row_count, "pair" if pairs else "row") if adapter.row_count else ""
    return "; ".join(filter(None, (count, _held_out_text(adapter, pairs))))


def _held_out_text(adapter: TrainedAdapter, pairs: bool) -> str:
    free, everything = _fall(adapter.held_out_loss), _fall(adapter.all_tokens_loss)
    if pairs:
        return free and f"held-out loss of pairs {free}; of their chosen answers, per token, {everything}"
    if not free or not everything or adapter.held_out_loss == adapter.all_tokens_loss:
        return free and f"held-out loss of all tokens {free}{_by_field(adapter)}"
    return f"held-out loss of the free tokens {free}{_by_field(adapter)}; all tokens {everything}"


def rewards_text(details: PolicyDetails, number: Callable[[float | None], str]) -> str:
    """The reward of the first and the last step, and the score on examples held out, before and of the step kept."""
    rewards = [number(line.reward) for line in details.history if line.reward is not None]
    scores = {line.step: line.held_out_score for line in details.history if line.held_out_score is not None}
    text = f"reward {' -> '.join(dict.fromkeys([*rewards[:1], *rewards[-1:]]))} in {count_text(len(rewards), 'step')}"
    if 0 not in scores:
        return text
    kept = f"{number(scores[0])} -> {number(scores[details.best_step])} (step {details.best_step})"
    return f"{text}; score on {count_text(details.held_out_examples, 'example')} held out {kept}"


def _by_field(adapter: TrainedAdapter) -> str:
    falls = [f"{name} {_fall(loss)}" for name, loss in adapter.field_losses.items() if _fall(loss)]
    return f"; by field: {', '.join(falls)}" if falls else ""


def _fall(loss: HeldOutLoss) -> str:
    if loss.before is None or loss.after is None:
        return ""
    return f"{loss.before:.2f} -> {loss.after:.2f}"


def seconds_text(seconds: float) -> str:
    """Seconds, with a decimal below 100."""
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:,.0f}"


def cost_text(cost: float | None) -> str:
    """US dollars, with four decimals below 1; "?" where it is not known."""
    return "?" if cost is None else f"${cost:.4f}" if cost < 1 else f"${cost:,.2f}"
