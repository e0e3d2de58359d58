"""What training costs here: two steps of a weight step's own training, timed and thrown away."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dspy

from ..files import adapters_cache, disk_errors
from ..rollouts.metrics import FULL_MARK, Verdict
from ..rollouts.traces import TraceSet
from ..training.config import TrainingConfig
from ..training.progress import TrainingProgress
from .adapter_rows import adapter_key, rows_by_adapter
from .rows_from_traces import Runs
from .training_step import TrainingStep


@dataclass(frozen=True)
class TrainingCosts:
    """What a training takes, all shares of a batch's common beginning included."""

    row_tokens: float
    """Tokens of a row that is trained on once."""
    row_s: float
    """Seconds of a row that is trained on once."""
    held_out_row_s: float
    """Seconds to measure the loss of a row."""
    set_up_s: float
    """Seconds of a training besides."""
    most_s: float
    """Seconds after which a training ends in any case."""


def time_training(
    step: TrainingStep, student: dspy.Module, examples: Sequence[dspy.Example], traces: TraceSet
) -> TrainingCosts:
    """Train on a batch of what these runs answered, right or wrong, twice. The adapter's folder is deleted and its
    engine forgets it. Raises what `finetune` raises, and NoTrainingDataError where no call was seen."""
    started, lines = time.monotonic(), list[tuple[float, TrainingProgress]]()
    taken = replace(traces, traces=tuple(replace(each, verdict=Verdict(FULL_MARK, True)) for each in traces.traces))
    trainable = step.trainable(student)
    rows = step.probe_rows(student, Runs(examples, taken), trainable)
    key, group = max(rows_by_adapter(rows, trainable, step.multitask).items(), key=lambda item: len(item[1]))
    engine = next(each.engine for name, each in trainable.items() if adapter_key(name, each.lm, step.multitask) == key)
    batch = [row.training_row for row in group[: step.training.batch_size]]
    training = replace(step.training, epochs=2, form_share=0.0, max_minutes=None)
    with _folder(step.training) as folder:
        result = engine.finetune(
            batch,
            validation_rows=batch,
            lora=step.lora,
            training=training,
            folder=Path(folder),
            on_progress=lambda line: lines.append((time.monotonic(), line)),
        )
        engine.remove_adapter(result.model)
    step_s, measure_s = _seconds(lines, result.seconds)
    minutes = step.training.max_minutes
    return TrainingCosts(
        row_tokens=result.tokens / (2 * len(batch)),
        row_s=step_s / len(batch),
        held_out_row_s=measure_s / len(batch),
        set_up_s=max(0.0, time.monotonic() - started - 2 * step_s - 3 * measure_s),
        most_s=math.inf if minutes is None else 60 * minutes,
    )


def _folder(training: TrainingConfig) -> tempfile.TemporaryDirectory[str]:
    """One for a training, where its launch command's machines see it."""
    if not training.launch_command:
        return tempfile.TemporaryDirectory(prefix="bettertogether-probe-")
    with disk_errors(adapters_cache()):
        adapters_cache().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="probe-", dir=adapters_cache())


def _seconds(lines: Sequence[tuple[float, TrainingProgress]], whole_s: float) -> tuple[float, float]:
    """Of the last step, since the first is slower, and of measuring the loss after it."""
    steps = [number for number, (_, line) in enumerate(lines) if line.loss is not None]
    if not steps or steps[-1] in (0, len(lines) - 1):
        return whole_s / 2, 0.0
    before, done, measured = (at for at, _ in lines[steps[-1] - 1 : steps[-1] + 2])
    return done - before, measured - done
