"""Reports made by hand, a whole one among them, and a reader of their pages."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any, cast

from bettertogether.records import (
    Blame,
    CandidateScore,
    DataCard,
    HeldOutLoss,
    Ledger,
    LossLine,
    PromptDetails,
    PromptState,
    RaceResult,
    SampleRow,
    StepRecord,
    TraceCounts,
    TrainedAdapter,
    WeightDetails,
)
from bettertogether.report import CompileReport
from bettertogether.report.html import render
from bettertogether.report.view import view_of

EVIL = "<script>alert('x')</script>&\"<img src=http://example.com/x.png>"
TWO_BY_TWO = {
    "base_old": (0.0, 0.0, 0.0, 0.0),
    "base_new": (0.0, 0.0, 0.0, 1.0),
    "tuned_old": (1.0, 1.0, 0.0, 0.0),
    "tuned_new": (1.0, 1.0, 1.0, 1.0),
}
COST = Ledger(8, 8, 16, 2, 1000, 200, 0, 12.5)
VOID = {"meta", "img", "line", "circle", "polyline", "br", "hr", "link", "input"}


def record(index: int, strategy: str, scores: tuple[float, ...] | None, **fields: Any) -> StepRecord:
    mean = sum(scores) / len(scores) if scores else None
    step = strategy.split(" -> ")[-1]
    values = {"status": "complete", "score": mean, "scores": scores, "ledger": COST, **fields}
    return StepRecord(index=index, step=step, strategy=strategy, **values)


def report(**options: Any) -> CompileReport:
    rounds = (
        record(0, "", (0.0, 0.0, 1.0, 0.0)),
        record(1, "p", (0.0, 1.0, 1.0, 0.0)),
        record(2, "p -> w", (1.0, 1.0, 1.0, 0.0), ledger=Ledger(8, 8, 16, 2, 1000, 200, 9000, 100.0)),
        record(3, "p -> w -> p", None, status="failed", ledger=Ledger(), error="Traceback: boom"),
    )
    return CompileReport(**{"rounds": rounds, "selected": 2, "valset_size": 4, "strategy": "p -> w -> p", **options})


def page_of(result: CompileReport) -> str:
    return render(view_of(result))


class Page(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def loss_line(adapter: str, step: int, loss: float | None, validation_loss: float | None = None) -> LossLine:
    return LossLine(adapter, step, 4, step / 4, loss, validation_loss, 10 * step, 1e-4)


def full_report(text: str) -> CompileReport:
    """A report with everything in it, and `text` wherever text can be."""
    shown = {"demos": [{"question": text, "n": [1]}], "signature": {"instructions": text, "fields": []}}
    state = cast(PromptState, shown)
    row: SampleRow = {"prompt": [{"role": text, "content": text}], "completion": text, "predictor": text, "label": text}
    counts = {text: 3}
    card = DataCard(counts, {}, counts, counts, counts, 4, 3, {text: 7}, {text: 7}, (row,), (text,), 3, counts, counts)
    history = tuple(loss_line(text, step, 1 / (step + 1), 0.5 if step % 2 else None) for step in range(4))
    losses = HeldOutLoss(2.0, 1.0)
    adapter = TrainedAdapter(text, text, text, 1, losses, ((0, text),), HeldOutLoss(2.0, None), {text: losses})
    candidates = (CandidateScore(text, 0.5, scored_on=4, stopped=True, demos=2),)
    traces = TraceCounts(4, 3, {text: 1})
    race, left_out = RaceResult(4, 0, 0.95), {text: {text: 1}}
    prompts = PromptDetails(candidates, text, 4, race, traces, {text: 1}, left_out, ({text: state},))
    weights = WeightDetails(card, {text: adapter}, history, {text: Blame(9, 4, 3)})
    cells = {"base_old": (0.0, 0.0), "base_new": (0.0, 1.0), "tuned_old": (1.0, 0.0), "tuned_new": (1.0, 1.0)}
    rounds = (
        record(0, "", (0.0, 0.0), program={text: {**state, "demos": []}}),
        record(1, text, (0.0, 1.0), program={text: state}, details=prompts, warnings=(text,), why=text),
        record(2, f"{text} -> w", (1.0, 1.0), details=weights, two_by_two=cells, adapter_folders={text: text}),
        record(3, f"{text} -> w -> w", None, status="failed", error=text),
    )
    pairs = {text: text}
    return CompileReport(rounds, 1, 2, text, warnings=(text,), versions=pairs, machine=pairs, stopped=text)
