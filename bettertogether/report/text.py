"""A `CompileReport` as a text table of at most 100 columns, and numbers as short text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..printable import one_line, printable
from ..records import Ledger
from ..rollouts.failures import STUDENT, failure_text
from .report import CompileReport

if TYPE_CHECKING:
    from .intervals import Effect

WIDTH = 100
"""Columns of the table at most."""

_HEADER = ("", "strategy", "score", "gain [95% interval]", "n", "LM calls", "tokens", "seconds", "status")
_RIGHT = frozenset({"score", "n", "LM calls", "tokens", "seconds"})


def render(report: CompileReport) -> str:
    """The table of rounds ("*" marks the selected one), the examples that failed, the 2x2 where it was measured, the
    warnings."""
    lines = [_title(report), "", *_rounds(report)]
    lines += _two_by_two(report)
    for text in (*_failed(report), *(f"Warning: {warning}" for warning in report.warnings)):
        lines += textwrap.wrap(printable(text), WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _failed(report: CompileReport) -> list[str]:
    return [
        f"{record.strategy or STUDENT}: {record.failed} examples failed and scored 0: {failure_text(record.failures)}"
        for record in report.rounds
        if record.failures
    ]


def compact(count: float) -> str:
    """A count in at most 5 characters: 950, 45.2k, 1.3M."""
    if count < 10_000:
        return f"{count:.0f}"
    scaled, unit = next((count / size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= size)
    return f"{scaled:.1f}{unit}" if scaled < 99.95 else f"{scaled:.0f}{unit}"


def seconds_text(seconds: float) -> str:
    """Seconds, with a decimal below 100."""
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:,.0f}"


def effect_text(effect: Effect | None, report: CompileReport) -> str:
    """A gain with its interval: "+0.080 [+0.020, +0.140]"; "-" when not known."""
    if effect is None:
        return "-"
    gain = report.number(effect.gain, sign=True)
    if not math.isfinite(effect.low):
        return gain
    return f"{gain} [{report.number(effect.low, sign=True)}, {report.number(effect.high, sign=True)}]"


def _title(report: CompileReport) -> str:
    examples = f"{report.valset_size} validation examples" if report.valset_size else "no validation examples"
    return one_line(f"{shorten(report.strategy, 60)}, seed {report.seed}, {examples}")


def _rounds(report: CompileReport) -> list[str]:
    rows = [_row(report, position) for position in range(len(report.rounds))]
    rows.append(["", "total", "", "", "", *_cost(report.ledger), ""])
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in range(len(_HEADER))]
    widths[1] -= max(0, sum(widths) + 2 * (len(widths) - 1) - WIDTH)
    lines = [_line(row, widths) for row in (_HEADER, *rows)]
    return [lines[0], *lines[1:-1], "-" * len(max(lines, key=len)), lines[-1]]


def _row(report: CompileReport, position: int) -> list[str]:
    record = report.rounds[position]
    return [
        "*" if position == report.selected else "",
        one_line(record.strategy or STUDENT),
        report.number(record.score),
        "" if position == 0 else effect_text(report.gain(position), report),
        str(len(record.scores)) if record.scores is not None else "-",
        *_cost(record.ledger),
        one_line(record.status),
    ]


def _cost(ledger: Ledger) -> list[str]:
    return [compact(ledger.lm_calls), compact(ledger.tokens), seconds_text(ledger.seconds)]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if name in _RIGHT else shorten(cell, width).ljust(width)
        for name, cell, width in zip(_HEADER, row, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()


def shorten(text: str, width: int) -> str:
    """The end of a text that is too wide: of a strategy, the last steps tell it apart."""
    return text if len(text) <= width else "..." + text[len(text) - max(0, width - 3) :]


def _two_by_two(report: CompileReport) -> list[str]:
    cells, split = report.two_by_two, report.attribution
    if cells is None or split is None:
        return []

    def mean(cell: str) -> str:
        return report.number(sum(cells[cell]) / len(cells[cell]))

    return [
        "",
        f"{'':17}{'old prompts':>12}{'new prompts':>13}",
        f"{'base weights':17}{mean('base_old'):>12}{mean('base_new'):>13}",
        f"{'tuned weights':17}{mean('tuned_old'):>12}{mean('tuned_new'):>13}",
        f"{'gain from weights':20}{effect_text(split.weights, report)}",
        f"{'gain from prompts':20}{effect_text(split.prompts, report)}",
        f"{'from both together':20}{effect_text(split.interaction, report)}",
        "",
    ]
