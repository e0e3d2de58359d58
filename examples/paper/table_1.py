"""Table 1 of the paper (arXiv 2407.10930), and a table of one's own numbers beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STRATEGIES = ("vanilla", "p", "w", "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")
BEST = "best on dev"
"""Not in the paper: of each seed's programs the one that a user gets, chosen on the validation examples."""
MODELS = ("mistral-7b-instruct-v0.2", "llama-2-7b-chat", "llama-3-8b-instruct")
TABLE_1 = {
    "HotPotQA": (
        (17.2, 33.8, 22.9, 33.8, 24.0, 36.3, 33.0, 37.6),
        (13.2, 33.3, 12.2, 32.6, 13.0, 32.7, 34.2, 34.8),
        (31.6, 46.9, 34.8, 46.5, 34.4, 42.8, 43.6, 46.7),
    ),
    "GSM8K": (
        (40.3, 46.4, 40.7, 47.7, 42.8, 47.3, 48.3, 46.8),
        (24.0, 26.0, 24.0, 24.7, 24.1, 27.3, 26.6, 26.3),
        (72.7, 77.9, 75.1, 77.6, 44.1, 77.6, 78.9, 77.0),
    ),
    "Iris": (
        (26.0, 57.3, 29.3, 59.3, 38.0, 30.7, 66.7, 52.7),
        (0.0, 56.7, None, 64.0, None, 26.7, None, 65.3),
        (48.0, 79.3, 37.3, 82.0, 39.3, 44.0, 78.7, 79.3),
    ),
}
"""Percent on the test set, mean of 3 seeds: for each of MODELS, by STRATEGIES. None: no run passed, so there was
nothing to train on."""


def table(task: str, model: str, scores: Mapping[str, Sequence[float | None]]) -> str:
    """`scores` has percent by strategy, one number a seed; None as in TABLE_1."""
    rows: list[tuple[str, ...]] = [("strategy", model, *MODELS)]
    for number, strategy in enumerate(STRATEGIES):
        theirs = (column[number] for column in TABLE_1[task])
        rows.append((strategy, _cell(scores[strategy]), *("-" if each is None else f"{each:.1f}" for each in theirs)))
    rows.append((BEST, _cell(scores[BEST]), *("" for _ in MODELS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(scores: Sequence[float | None]) -> str:
    """The mean, with the lowest and the highest where there are several."""
    known = [score for score in scores if score is not None]
    if not known:
        return "-"
    missing = len(scores) - len(known)
    text = f"{sum(known) / len(known):.1f}"
    if len(known) > 1:
        text += f" ({min(known):.1f} to {max(known):.1f})"
    return f"{text}, {missing} x -" if missing else text
