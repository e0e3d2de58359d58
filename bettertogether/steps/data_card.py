"""The data card: what the rows are made of, counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..records import DataCard
from .prompt_forms import PromptForms
from .rows import Row

if TYPE_CHECKING:
    from .rows_from_traces import Trainable

WHOLE_TRACE = ""
"""Stands where a predictor's name would: all calls of a trace were left out."""


def make_data_card(
    rows: Sequence[Row],
    trainable: Trainable,
    *,
    dropped: Mapping[tuple[str, str], int],
    examples: int,
    forms: PromptForms | None = None,
    warnings: Iterable[str] = (),
) -> DataCard:
    """Count the rows; `dropped` maps (predictor or `WHOLE_TRACE`, reason) to counts, and `forms` knows the prompts
    with demos that the rows were given."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        engine = (trainable.get(row.predictor) or next(iter(trainable.values()))).engine
        lengths["prompt"].append(len(engine.prompt_tokens(row.messages)))
        lengths["completion"].append(len(engine.completion_tokens(row.completion)))
    by_reason: Counter[str] = Counter()
    by_predictor: Counter[str] = Counter()
    for (predictor, reason), count in dropped.items():
        by_reason[reason] += count
        by_predictor[predictor] += count
    step = max(1, len(rows) // 5)
    return DataCard(
        kept_by_predictor=dict(Counter(row.predictor for row in rows)),
        kept_by_label=dict(Counter(row.label for row in rows if row.label is not None)),
        kept_by_source=dict(Counter(row.source for row in rows)),
        dropped_by_reason=dict(by_reason.most_common()),
        dropped_by_predictor=dict(by_predictor),
        examples=examples,
        examples_covered=len({row.example for row in rows}),
        prompt_tokens=_spread(lengths["prompt"]),
        completion_tokens=_spread(lengths["completion"]),
        samples=tuple(row.sample for row in rows[::step][:5]),
        warnings=tuple(warnings),
        rows_with_demos=sum(bool(row.forms) for row in rows),
        demo_sets=dict(forms.count_by_source()) if forms else {},
        forms_left_out=dict(forms.left_out) if forms else {},
        pairs=sum(row.rejected is not None for row in rows),
    )


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]} if ordered else {}
