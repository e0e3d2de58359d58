"""What a weight step's trainings came to: what is recorded of them, and where."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean

from ..engines.protocol import FinetuneResult
from ..records import HeldOutLoss, LossLine, TrainedAdapter, WeightDetails
from ..training.progress import TrainingProgress
from .adapter_rows import AdapterKey, Start
from .rows_from_traces import Collected


def rows_file(result: FinetuneResult) -> Path:
    """The rows that an adapter was trained on, beside its folder, which peft alone fills."""
    return result.folder.with_name(f"{result.folder.name}.rows.jsonl")


def held_out_file(result: FinetuneResult) -> Path:
    """The rows that its epoch was chosen on, beside those."""
    return result.folder.with_name(f"{result.folder.name}.held_out.jsonl")


def weight_details(
    collected: Collected,
    results: Mapping[AdapterKey, FinetuneResult],
    starts: Mapping[AdapterKey, Start],
    given: Mapping[AdapterKey, int],
) -> WeightDetails:
    """What is recorded of the step: its rows, and the adapters trained on as many of them as were `given`."""
    adapters = {
        result.model: TrainedAdapter(
            trained_from=f"{starts[key].model} {key.predictor}".strip(),
            folder=str(result.folder),
            rows=str(rows_file(result)),
            best_epoch=result.best_epoch,
            held_out_loss=HeldOutLoss(result.base_validation_loss, result.validation_loss),
            skipped_rows=result.skipped_rows,
            all_tokens_loss=HeldOutLoss(*result.all_tokens_loss),
            field_losses={name: HeldOutLoss(*losses) for name, losses in result.field_losses.items()},
            row_count=given[key] - len(result.skipped_rows),
        )
        for key, result in results.items()
    }
    history = tuple(_loss_line(result.model, line) for result in results.values() for line in result.history)
    return WeightDetails(collected.card, adapters, history, collected.blame)


def _loss_line(adapter: str, line: TrainingProgress) -> LossLine:
    kept = {field.name for field in fields(LossLine)}
    return LossLine(adapter, **{name: value for name, value in asdict(line).items() if name in kept})


def time_warnings(results: Collection[FinetuneResult], max_minutes: float | None) -> tuple[str, ...]:
    """Of each training that `max_minutes` ended, how far it came."""
    several, warnings = len(results) > 1, []
    for result in results:
        if result.out_of_time:
            last, name = result.history[-1], f" of {result.model}" if several else ""
            most = round(last.epoch * last.total_steps / last.step)
            cut = f"ended by max_minutes={max_minutes:g} after {last.epoch:.3g} of up to {most} epochs."
            warnings.append(f"Training{name} {cut}")
    return tuple(warnings)


def fall_held_out(results: Iterable[FinetuneResult]) -> float | None:
    """By how much training lowered what chose the epoch, measured of the rows held out: their error, or their loss
    where no error was measured; the mean of the adapters."""
    falls = []
    for result in results:
        before, after = result.validation_error
        if before is None or after is None:
            before, after = result.base_validation_loss, result.validation_loss
        if before is not None and after is not None:
            falls.append(before - after)
    return fmean(falls) if falls else None
