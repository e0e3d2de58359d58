"""What the evaluations of a round add to its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..callbacks import events
from ..records import Ledger, StepRecord
from ..rollouts.evaluation import Evaluation
from ..rollouts.failures import count_failures, cut_warning, failure_warning, scored_example


def with_scores(
    record: StepRecord,
    scored: Evaluation | None,
    cells: Mapping[str, Evaluation],
    started: float,
    warnings: Sequence[str] = (),
) -> StepRecord:
    """The record with the scores of its round, and of the cells of its 2x2. `warnings`: of their measuring."""
    evaluations = [*([scored] if scored else []), *cells.values()]
    ledger = Ledger.total([record.ledger, *(evaluation.ledger for evaluation in evaluations)])
    return replace(
        record,
        score=scored.mean if scored else None,
        scores=scored.scores if scored else None,
        failures=scored.failures if scored else (),
        scored_example=scored_example(scored.traces) if scored and len(set(scored.scores)) == 1 else None,
        ledger=ledger.with_seconds(time.monotonic() - started),
        score_warnings=(*warnings, *_cut_answers(record.name, scored), *events.told(_cell_warning(cells))),
        two_by_two={cell: evaluation.scores for cell, evaluation in cells.items()} or None,
    )


def _cut_answers(name: str, scored: Evaluation | None) -> list[str]:
    """What to say of a round in which answers were cut; said at once."""
    warning = cut_warning(scored.traces) if scored else None
    if warning is None:
        return []
    events.warn(f"{name}: {warning}")
    return [warning]


def _cell_warning(scored: Mapping[str, Evaluation]) -> str | None:
    """What to say of the cells of a 2x2 in which most examples failed."""
    failing = {c: e for c, e in scored.items() if failure_warning(e.failures, len(e.scores), c)}
    traces = [trace for evaluation in failing.values() for trace in evaluation.traces]
    return failure_warning(count_failures(traces), len(traces), f"2x2 ({', '.join(failing)})", "run")
