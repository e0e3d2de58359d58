"""A `CompileReport` as a text table of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ..printable import one_line, printable
from ..records import PromptDetails
from .view import ReportView, RoundView, TwoByTwoView

WIDTH = 100
"""Columns of the table at most."""

_HEADER = ("", "strategy", "score", "gain [95% interval]", "n", "LM calls", "tokens", "cost", "seconds", "status")
_RIGHT = frozenset({"score", "n", "demos", "calls", "LM calls", "tokens", "cost", "seconds"})


def render(view: ReportView) -> str:
    """The table of rounds ("*" marks the selected one), why "auto" ran them, what each prompt step's race says of its
    candidates ("*" marks the chosen one), which predictors failures came from, the 2x2 where it was measured, the
    examples that failed and why, the warnings."""
    lines = [_title(view), "", *_rounds(view)]
    if view.reasons:
        lines += ["", *_wrapped(view.reasons)]
    for each in view.rounds:
        if isinstance(each.record.details, PromptDetails):
            lines += ["", *_candidates(view, each.name, each.record.details)]
        if each.blame:
            lines += ["", *_blame(each)]
    if view.two_by_two is not None:
        lines += _two_by_two(view.two_by_two)
    losses = [f"{each.name}: {text}" for each in view.rounds for text in each.losses]
    if losses:
        lines += ["", *_wrapped(losses)]
    lines += _wrapped((*view.failed, *(f"Warning: {warning}" for warning in view.report.warnings)))
    return "\n".join(lines)


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(printable(text), WIDTH, subsequent_indent="  ")]


def compact(count: float) -> str:
    """A count in at most 5 characters: 950, 45.2k, 1.3M."""
    if count < 10_000:
        return f"{count:.0f}"
    scaled, unit = next((count / size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= size)
    return f"{scaled:.1f}{unit}" if scaled < 99.95 else f"{scaled:.0f}{unit}"


def _title(view: ReportView) -> str:
    return one_line(f"{shorten(view.report.strategy, 60)}, seed {view.report.seed}, {view.examples}")


def _rounds(view: ReportView) -> list[str]:
    ledger = view.report.ledger
    total = ["", "total", "", "", "", compact(ledger.lm_calls), compact(ledger.tokens), view.cost, view.seconds, ""]
    rows = [list(_HEADER), *map(_row, view.rounds), total]
    if not view.cost:
        rows = [[cell for name, cell in zip(_HEADER, row, strict=True) if name != "cost"] for row in rows]
    header = rows[0]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[1] -= max(0, sum(widths) + 2 * (len(widths) - 1) - WIDTH)
    lines = [_line(row, widths, header) for row in rows]
    return [lines[0], *lines[1:-1], "-" * len(max(lines, key=len)), lines[-1]]


def _row(each: RoundView) -> list[str]:
    return [
        "*" if each.selected else "",
        one_line(each.name),
        each.score,
        each.gain_text,
        each.examples,
        compact(each.record.ledger.lm_calls),
        compact(each.record.ledger.tokens),
        each.cost,
        each.seconds,
        one_line(each.record.status),
    ]


def _line(row: Sequence[str], widths: Sequence[int], header: Sequence[str]) -> str:
    cells = [
        cell.rjust(width) if name in _RIGHT else shorten(cell, width).ljust(width)
        for name, cell, width in zip(header, row, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()


def shorten(text: str, width: int) -> str:
    """The end of a text that is too wide: of a strategy, the last steps tell it apart."""
    return text if len(text) <= width else "..." + text[len(text) - max(0, width - 3) :]


def _candidates(view: ReportView, name: str, details: PromptDetails) -> list[str]:
    header = ("", f"candidates of {one_line(name)}", "score", "n", "demos", "")
    rows = [
        [
            "*" if candidate.name == details.chosen else "",
            one_line(candidate.name),
            view.report.number(candidate.score),
            compact(candidate.scored_on),
            compact(candidate.demos),
            "stopped early" if candidate.stopped else "",
        ]
        for candidate in details.candidates
    ]
    return _small_table(header, rows)


def _small_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose second column is shortened."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[1] = min(widths[1], WIDTH // 2)
    return [_line(row, widths, header) for row in (header, *rows)]


def _blame(each: RoundView) -> list[str]:
    header = ("", f"failures before {one_line(each.name)}", "repaired by it alone [95% interval]", "runs", "calls")
    return _small_table(header, [["", one_line(b.predictor), b.share, b.runs, b.calls] for b in each.blame])


def _two_by_two(cells: TwoByTwoView) -> list[str]:
    means, other = cells.means, shorten(one_line(cells.other_round), WIDTH // 2)
    return [
        "",
        *([f"2x2 of {other}, which is not the selected round:"] if other else []),
        f"{'':17}{'old prompts':>12}{'new prompts':>13}",
        f"{'base weights':17}{means['base_old']:>12}{means['base_new']:>13}",
        f"{'tuned weights':17}{means['tuned_old']:>12}{means['tuned_new']:>13}",
        f"{'gain from weights':20}{cells.weights.text}",
        f"{'gain from prompts':20}{cells.prompts.text}",
        f"{'from both together':20}{cells.both.text}",
        "",
    ]
