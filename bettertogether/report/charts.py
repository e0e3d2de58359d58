"""Charts as inline SVG that keeps its line widths and its text at any page width. No script, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..printable import printable

Point = tuple[float, float]


def escaped(value: object) -> str:
    """`value` as text that is safe in HTML, in an attribute too."""
    return escape(printable(value), quote=True)


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot: a value with its interval."""

    label: str
    value: float | None
    low: float
    high: float
    text: str
    """What stands to the right of the plot."""
    marked: bool = False


@dataclass(frozen=True)
class Curve:
    """One line of a line chart."""

    name: str
    points: tuple[Point, ...]
    color: str
    dots: bool = False
    """Mark each point, as for the few values of a held-out loss."""
    width: float = 2.0


def forest_plot(rows: Sequence[ForestRow], reference: float, number_text: Mapping[float, str]) -> str:
    """Values with intervals, one below the other on one scale; a dashed line at `reference`.

    `number_text` maps the ticks to their texts; see `ticks`.
    """
    scale = list(number_text)
    low, high = scale[0], scale[-1]

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    lines = [_forest_row(row, at, scale, reference) for row in rows]
    texts = "".join(f'<span style="left:{at(tick)}">{escaped(text)}</span>' for tick, text in number_text.items())
    axis = f'<div class="axis">{texts}</div>'
    return f'<div class="forest">{"".join(lines)}{axis}</div>'


def _forest_row(row: ForestRow, at: Callable[[float], str], scale: Sequence[float], reference: float) -> str:
    parts = [f'<line class="grid" x1="{at(tick)}" x2="{at(tick)}" y1="0" y2="100%"/>' for tick in scale]
    parts.append(f'<line class="reference" x1="{at(reference)}" x2="{at(reference)}" y1="0" y2="100%"/>')
    if row.value is not None:
        if math.isfinite(row.low):
            parts.append(f'<line class="interval" x1="{at(row.low)}" x2="{at(row.high)}" y1="50%" y2="50%"/>')
        parts.append(f'<circle cx="{at(row.value)}" cy="50%" r="6"/>')
    kind = "marked" if row.marked else "plain"
    label = f"{escaped(row.label)}: {escaped(row.text)}"
    return (
        f'<div class="name {kind}">{escaped(row.label)}</div>'
        f'<div class="value {kind}">{escaped(row.text)}</div>'
        f'<svg class="{kind}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers that enclose the values, about `count` of them, at least two."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9:
        low, high = low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Curves over one pair of axes, with a legend; "" without points."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks([y for _, y in points], 4)
    x_span, y_span = (x_high - x_low) or 1.0, y_ticks[-1] - y_ticks[0]

    def place(point: Point) -> Point:
        return 100 * (point[0] - x_low) / x_span, 100 - 100 * (point[1] - y_ticks[0]) / y_span

    grid = "".join(
        f'<line class="grid" x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}"/>'
        for _, y in (place((x_low, tick)) for tick in y_ticks)
    )
    drawn = "".join(_curve(curve, [place(point) for point in curve.points]) for curve in curves)
    y_texts = "".join(f'<span style="top:{place((x_low, t))[1]:.2f}%">{t:.4g}</span>' for t in y_ticks)
    legend = "".join(f'<span><i style="background:{curve.color}"></i>{escaped(curve.name)}</span>' for curve in curves)
    return (
        f'<figure class="lines"><figcaption>{escaped(y_label)} <span class="legend">{legend}</span></figcaption>'
        f'<div class="plot"><div class="y">{y_texts}</div><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{escaped(y_label)} over {escaped(x_label)}">{grid}{drawn}</svg></div>'
        f'<div class="x"><span>{x_low:g}</span><span>{escaped(x_label)}</span><span>{x_high:g}</span></div></figure>'
    )


def _curve(curve: Curve, points: Sequence[Point]) -> str:
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    style = f'stroke="{curve.color}" stroke-width="{curve.width:g}"'
    line = f'<polyline points="{path}" {style}/>'
    if not curve.dots:
        return line
    # A line without length and with round ends is a dot that the stretched viewBox leaves round.
    dots = "".join(
        f'<line x1="{x:.2f}" y1="{y:.2f}" x2="{x:.2f}" y2="{y:.2f}" stroke="{curve.color}" stroke-width="7"/>'
        for x, y in points
    )
    return line + dots


def bars(values: Mapping[str, float]) -> str:
    """Named counts as horizontal bars, in the order given; each as a share of the largest."""
    whole = max([*values.values(), 1])
    rows = "".join(
        f'<div class="name">{escaped(name) or "(none)"}</div>'
        f'<div class="bar"><i style="width:{100 * value / whole:.1f}%"></i></div><div class="value">{value:,g}</div>'
        for name, value in values.items()
    )
    return f'<div class="bars">{rows}</div>'
