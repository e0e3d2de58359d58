"""A `CompileReport` as one HTML file that needs nothing else: no network, no script, everything escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..records import (
    DataCard,
    Details,
    Ledger,
    LossLine,
    PolicyDetails,
    PromptDetails,
    RewardLine,
    SampleRow,
    TrainedAdapter,
    WeightDetails,
    count_text,
)
from .charts import Curve, ForestRow, Point, bars, escaped, forest_plot, line_chart, ticks
from .data import ReportData
from .style import STYLE
from .view import ReportView, RoundView

_COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
_LEDGER_COLUMNS = {
    "program_calls": "program calls",
    "metric_calls": "metric calls",
    "lm_calls": "LM calls",
    "cache_hits": "from cache",
    "prompt_tokens": "prompt tokens",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
}
_CARD_COUNTS = {
    "kept_by_predictor": "kept, by predictor",
    "kept_by_label": "kept, by label",
    "kept_by_source": "kept, by source",
    "dropped_by_reason": "dropped, by reason",
    "dropped_by_predictor": "dropped, by predictor",
    "demo_sets": "sets of demos shown, by origin",
    "forms_left_out": "prompts with demos left out, by reason",
}


def render(view: ReportView) -> str:
    """The page."""
    sections = [
        _summary(view),
        _warnings(view),
        _rounds(view),
        _two_by_two(view),
        *(_step(each, view.report.number) for each in view.rounds[1:]),
        _prompts(view.report),
        _costs(view),
        _circumstances(view.report),
    ]
    title = f"BetterTogether: {view.report.strategy}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def render_in_notebook(view: ReportView) -> str:
    """For a notebook: the head, the rounds with the reasons of "auto" and of failures, the warnings; not the style."""
    return f"<div>{_summary(view)}{_round_table(view)}{_reasons(view)}{_warnings(view)}</div>"


_Number = Callable[[float | None], str]
"""A score as text."""


class _Html(str):
    """Text that is HTML already."""


def _text(value: Any) -> _Html:
    return value if isinstance(value, _Html) else _Html(escaped(value))


def _section(title: str, *parts: str) -> str:
    body = "".join(part for part in parts if part)
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], last_is_total: bool = False) -> str:
    """A table. The first column is text, the others are numbers."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if last_is_total and lines:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _fold(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{_text(title)}</summary>{body}</details>"


def _summary(view: ReportView) -> str:
    report, best = view.report, view.selected
    facts = {"wall time": _clock(report.ledger.seconds)}
    if best.gain is not None:
        facts = {
            "score of the selected program": best.score,
            "score of the untouched student": view.rounds[0].score,
            f"gain, 95% interval {best.gain.interval}": best.gain.number,
            **facts,
        }
    cards = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in facts.items())
    chosen = "the untouched student" if report.selected == 0 else f"<code>{_text(best.name)}</code>"
    return (
        f"<header><h1>{_text(report.strategy)}</h1><p>Selected: {chosen}. Seed {_text(report.seed)}, "
        f"{_text(view.examples)}.</p>"
        f'<div class="facts">{cards}</div></header>'
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _warnings(view: ReportView) -> str:
    notes = "".join(f"<li>{_text(warning)}</li>" for warning in view.report.warnings)
    return f'<aside><ul class="warnings">{notes}</ul></aside>' if notes else ""


def _rounds(view: ReportView) -> str:
    student = view.report.student_round.score
    rows = [_forest_row(each) for each in view.rounds]
    values = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    plot = ""
    if student is not None:
        marks = {tick: view.report.number(tick) for tick in ticks(values)}
        plot = forest_plot(rows, student, marks)
        plot += '<p class="note">Dots are mean scores, bars their 95% intervals; the dashed line is the student.</p>'
    return _section("Score of each round", plot, _round_table(view), _reasons(view))


def _reasons(view: ReportView) -> str:
    items = "".join(f"<li>{_text(reason)}</li>" for reason in (*view.reasons, *view.failed))
    return f"<ul>{items}</ul>" if items else ""


def _forest_row(each: RoundView) -> ForestRow:
    text = f"{each.score}  ({each.gain.number})" if each.gain_text and each.gain is not None else each.score
    if each.record.status != "complete":
        text = str(each.record.status)
    return ForestRow(each.name, each.record.score, *each.interval, text, marked=each.selected)


def _round_table(view: ReportView) -> str:
    header = ("round", "score", "gain over the student [95% interval]", "examples", "failed", "status")
    return _table(header, map(_round_cells, view.rounds))


def _round_cells(each: RoundView) -> list[str]:
    mark = ' <span class="mark">selected</span>' if each.selected else ""
    name = _Html(f"<code>{_text(each.name)}</code>{mark}")
    return [name, each.score, each.gain_text, each.examples, each.failures, each.record.status]


def _two_by_two(view: ReportView) -> str:
    cells = view.two_by_two
    if cells is None:
        return ""
    means, other = cells.means, cells.other_round
    note = f'<p class="note">Of <code>{_text(other)}</code>, which is not the selected round.</p>' if other else ""
    table = _table(
        ("", "old prompts", "new prompts"),
        [
            ["base weights", means["base_old"], means["base_new"]],
            ["tuned weights", means["tuned_old"], means["tuned_new"]],
        ],
    )
    gains = {
        "weights alone": cells.weights,
        "prompts alone": cells.prompts,
        "both together, beyond the sum": cells.both,
        "total": cells.total,
    }
    effects = [gain.effect for gain in gains.values()]
    values = [value for effect in effects for value in (effect.gain, effect.low, effect.high, 0.0)]
    marks = {tick: view.report.number(tick, sign=True) for tick in ticks(values)}
    rows = [
        ForestRow(name, gain.effect.gain, gain.effect.low, gain.effect.high, gain.text, marked=name == "total")
        for name, gain in gains.items()
    ]
    return _section("Weights or prompts?", note, table, forest_plot(rows, 0.0, marks))


def _step(each: RoundView, number: _Number) -> str:
    record = each.record
    return _section(
        f"Step {record.index}: {record.name}",
        f'<pre class="error">{_text(record.error)}</pre>' if record.error else "",
        *_did(record.details, number),
        _blame(each),
    )


def _blame(each: RoundView) -> str:
    if not each.blame:
        return ""
    note = "A call is answered anew, those before it as they were; the program goes on from there."
    header = ("predictor", "failures repaired by it alone [95% interval]", "failed runs", "calls answered anew")
    table = _table(header, [(b.predictor, b.share, b.runs, b.calls) for b in each.blame])
    return f'<h3>Where the failures before this step came from</h3><p class="note">{_text(note)}</p>{table}'


def _did(details: Details | None, number: _Number) -> tuple[str, ...]:
    match details:
        case PromptDetails():
            return (_candidates(details, number),)
        case WeightDetails():
            unit = "pair" if details.data_card.pairs else "token"
            return _losses(details.history, unit), _held_out(details.adapters, unit), _data_card(details.data_card)
        case PolicyDetails():
            return (_rewards(details.history, number),)
        case _:
            return ()


def _candidates(details: PromptDetails, number: _Number) -> str:
    rows = []
    for candidate in details.candidates:
        mark = ' <span class="mark">chosen</span>' if candidate.name == details.chosen else ""
        cells = (number(candidate.score), f"{candidate.scored_on:,}", f"{candidate.demos:,}")
        rows.append([_Html(_text(candidate.name) + mark), *cells, "stopped early" if candidate.stopped else ""])
    if not rows:
        return ""
    table = _table(("candidate", "score", "examples", "demos", ""), rows)
    return _fold(f"Prompt candidates ({len(rows)})", table, is_open=len(rows) <= 12)


def _losses(history: Sequence[LossLine], unit: str) -> str:
    charts = []
    for adapter in dict.fromkeys(line.adapter for line in history):
        lines = [line for line in history if line.adapter == adapter]
        training = _points((line.step, line.loss) for line in lines)
        held_out = _points((line.step, line.validation_loss) for line in lines)
        curves = [Curve("training", training, "#94a3b8", width=1.5)] if training else []
        curves += [Curve("held out", held_out, _COLORS[0], dots=True)] if held_out else []
        error = _points((line.step, line.validation_error) for line in lines)
        curves += [Curve("error held out", error, _COLORS[1], dots=True)] if error else []
        charts.append(line_chart(curves, "optimizer steps", f"Loss per {unit}, {adapter}"))
    return "".join(charts)


def _rewards(history: Sequence[RewardLine], number: _Number) -> str:
    earned = _points((line.step, line.reward) for line in history)
    held_out = _points((line.step, line.held_out_score) for line in history)
    curves = [Curve("runs", earned, "#94a3b8", width=1.5)] if earned else []
    curves += [Curve("examples held out", held_out, _COLORS[0], dots=True)] if held_out else []
    header = ("step", "reward", "spread", "examples", "groups that differ", "KL", "tokens/s", "held-out score")
    rows = [
        (
            f"{line.step}",
            *(number(value) for value in (line.reward, line.spread)),
            f"{line.examples}",
            f"{line.kept_groups} of {line.groups}",
            "-" if line.kl is None else f"{line.kl:.3f}",
            f"{line.tokens_per_s:,.0f}",
            number(line.held_out_score),
        )
        for line in history
    ]
    return line_chart(curves, "steps", "Mean reward") + _fold("Rewards by step", _table(header, rows))


def _held_out(adapters: Mapping[str, TrainedAdapter], unit: str) -> str:
    title, *names = "Loss per token of rows held out", "free tokens", "all tokens"
    if unit == "pair":
        title, *names = "Loss of pairs held out", "pairs", "tokens of chosen answers"
    rows = []
    for adapter in adapters.values():
        losses = dict(zip(names, (adapter.held_out_loss, adapter.all_tokens_loss), strict=True))
        losses |= adapter.field_losses
        measured = [(what, loss) for what, loss in losses.items() if loss.before is not None and loss.after is not None]
        rows += [[adapter.trained_from, what, f"{loss.before:.3f}", f"{loss.after:.3f}"] for what, loss in measured]
    return _fold(title, _table(("trained from", "of", "before", "after"), rows)) if rows else ""


def _points(pairs: Iterable[tuple[int, float | None]]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in pairs if y is not None and math.isfinite(y))


def _data_card(card: DataCard) -> str:
    counts = {title: getattr(card, name) for name, title in _CARD_COUNTS.items()}
    groups = "".join(f"<div><h4>{_text(title)}</h4>{bars(each)}</div>" for title, each in counts.items() if each)
    facts = [f"{card.examples_covered} of {count_text(card.examples, 'example')} gave rows"]
    if card.pairs:
        facts.append(f"{card.pairs} pairs: two answers to a prompt, of which one is to be preferred")
    if card.rows_with_demos:
        facts.append(f"{card.rows_with_demos} rows are shown with demos too")
    for name, spread in (("prompt tokens", card.prompt_tokens), ("completion tokens", card.completion_tokens)):
        if spread:
            facts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in spread.items()))
    samples = "".join(_sample(number, row) for number, row in enumerate(card.samples, 1))
    text = f'<p class="note">{_text("; ".join(facts))}</p>'
    return f'<h3>Training rows</h3>{text}<div class="groups">{groups}</div>{samples}'


def _sample(number: int, row: SampleRow) -> str:
    turns = [*_turns(row.get("prompt")), *(("answer to learn", text) for _, text in _turns(row.get("completion")))]
    turns += [("answer to avoid", text) for _, text in _turns(row.get("rejected"))]
    body = "".join(f'<div class="turn"><b>{_text(role)}</b><pre>{_text(text)}</pre></div>' for role, text in turns)
    known = [str(row[key]) for key in ("predictor", "label", "source") if row.get(key) not in (None, "")]
    return _fold(f"Sample row {number}: {', '.join(known)}", body)


def _turns(value: Any) -> list[tuple[str, str]]:
    """Role and text of the messages of a row, whose prompt or completion may also be plain text."""
    if isinstance(value, str):
        return [("", value)]
    return [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in value or ()]


def _prompts(report: ReportData) -> str:
    before, after = report.student_round.program or {}, report.selected_round.program or {}
    parts = []
    for name, state in after.items():
        old = before.get(name, {})
        changed = "" if old == state else ' <span class="mark">changed</span>'
        columns = f"{_prompt('before', old)}{_prompt('after', state)}" if changed else _prompt("unchanged", state)
        parts.append(f'<h3><code>{_text(name)}</code>{changed}</h3><div class="columns">{columns}</div>')
    return _section("Prompts of the selected program", *parts)


def _prompt(title: str, state: Mapping[str, Any]) -> str:
    signature = state.get("signature") or {}
    demos = state.get("demos") or ()
    body = f"<pre>{_text(signature.get('instructions', ''))}</pre>"
    body += "".join(_fold(f"demo {number}", _demo(demo)) for number, demo in enumerate(demos, 1))
    return f"<div><h4>{_text(title)}, {len(demos)} demos</h4>{body}</div>"


def _demo(demo: Mapping[str, Any]) -> str:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in demo.items()
    }
    lines = "".join(f"<dt>{_text(key)}</dt><dd>{_text(text)}</dd>" for key, text in texts.items())
    return f"<dl>{lines}</dl>"


def _costs(view: ReportView) -> str:
    rows = [_cost_cells(each.name, each.record.ledger, each.seconds, each.cost) for each in view.rounds]
    rows.append(_cost_cells("total", view.report.ledger, view.seconds, view.cost))
    header = ("round", *_LEDGER_COLUMNS.values(), "seconds", "US dollars")
    size = len(header) if view.cost else len(header) - 1
    return _section("Cost", _table(header[:size], [row[:size] for row in rows], last_is_total=True))


def _cost_cells(name: str, ledger: Ledger, seconds: str, cost: str) -> list[str]:
    counts = [f"{getattr(ledger, column):,}" for column in _LEDGER_COLUMNS]
    return [_Html(f"<code>{_text(name)}</code>"), *counts, seconds, cost]


def _circumstances(report: ReportData) -> str:
    pairs = [*report.machine.items(), *report.versions.items()]
    text = ", ".join(f"{_text(key)} {_text(value)}" for key, value in pairs)
    return f"<footer>{text}</footer>" if text else ""
