"""The preference step: `PreferenceFinetune`, which learns from failed runs too.

Answer the calls of the program's runs anew, each on the very inputs that it had and the others as they were; where one
answer leads to a run that passes and another to one that fails, the model learns to prefer the first. DPO with the
chosen answer's loss beside it, as in Iterative RPO (arXiv 2404.19733).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import dspy

from ..checks import require_whole
from ..other_names import FINE_TUNERS, knows
from ..rollouts.metrics import Metric, require_metric
from ..rollouts.tries import TEMPERATURES, Sampling
from ..training.config import LoRAConfig, TrainingConfig
from .pairs import pairs_from_traces
from .rows import Row
from .rows_from_traces import Collected, RowOptions, Runs, Trainable, rows_from_traces
from .training_step import TrainingStep


@knows(**FINE_TUNERS, metric_threshold="threshold=...")
class PreferenceFinetune(TrainingStep):
    """Fine-tune a program's local LMs to prefer the answers that made its runs pass to those that made them fail.

    Prompts are the program's own, with their demos, and stay as they are. Teachers are not asked: both answers of a
    pair are the student's.

    Args:
        metric: As for `LoRAFinetune`; it has to let some runs pass and others fail.
        lora: Shape of a new adapter; one that is trained further (`start_from`) keeps its own.
        training: How to train; `beta` and `nll_weight` are those of pairs.
        num_samples: New answers to each call of a run, at most three calls of a predictor in a run.
        temperature: One number above 0, or several used in turn.
        max_pairs_per_example: Pairs of an example and predictor, at most.
        start_from: "current" goes on with the adapter in use, which is the reference too; "base" trains a new adapter
            on the base weights.
        multitask, frozen, threshold, validation_share, num_threads, max_errors, seed, folder: As for `LoRAFinetune`.
    """

    learns_pairs = True
    asks_teachers = False

    def __init__(
        self,
        metric: Metric,
        *,
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        num_samples: int = 4,
        temperature: float | Sequence[float] = TEMPERATURES,
        max_pairs_per_example: int = 2,
        multitask: bool = True,
        start_from: Literal["base", "current"] = "current",
        frozen: Sequence[str] = (),
        threshold: float | None = None,
        validation_share: float = 0.1,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
    ) -> None:
        require_metric(metric)
        super().__init__(
            metric,
            lora=lora,
            training=training,
            multitask=multitask,
            start_from=start_from,
            frozen=frozen,
            threshold=threshold,
            validation_share=validation_share,
            num_threads=num_threads,
            max_errors=max_errors,
            seed=seed,
            folder=folder,
        )
        require_whole("num_samples", num_samples, 1)
        require_whole("max_pairs_per_example", max_pairs_per_example, 1)
        self.sampling = Sampling(0, temperature, rescue=False, sample_passing=True, branches=num_samples)
        self.rows_per_call = max_pairs_per_example

    def rows_of(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Collected:
        """The pairs of the calls that were answered anew. Raises NoTrainingDataError with the counts when there are
        none."""
        return pairs_from_traces(student, runs, trainable, self.rows_per_call)

    def probe_rows(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Sequence[Row]:
        """Each row with the answer of another."""
        options = RowOptions(train_prompt="optimized", balance=False)
        rows = rows_from_traces(student, runs, trainable, options).rows
        return [replace(row, rejected=rows[place - 1].completion) for place, row in enumerate(rows)]
