"""The weight step: `LoRAFinetune`, the paper's BFT (section 3.2) with a LoRA adapter.

Run the program as it is on all of the trainset, keep the calls of the runs that the metric accepts, train one adapter
per LM on them (or one per predictor), and put the tuned LM into the predictors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import dspy

from ..other_names import FINE_TUNERS, knows
from ..rollouts.metrics import Metric
from ..rollouts.tries import TEMPERATURES, Sampling
from ..training.config import LoRAConfig, TrainingConfig
from .rows import Row
from .rows_from_traces import Collected, Reasoning, RowOptions, Runs, Trainable, TrainPrompt, rows_from_traces
from .training_step import TrainingStep

ENOUGH_SOLVED = 16
"""Examples solved from which on those that failed are not tried more often than asked for."""


@knows(
    **FINE_TUNERS,
    exclude_demos='train_prompt="vanilla"',
    metric_threshold="threshold=...",
    teacher_settings="compile(teacher=...), a program with LMs of its own",
)
class LoRAFinetune(TrainingStep):
    """Fine-tune a program's local LMs on the program's own successful runs.

    Args:
        metric: `(example, prediction, trace=None)` to a bool, a number or `Prediction(score, feedback)`. It is given
            the trace. None accepts every run that does not fail.
        lora: Shape of a new adapter; one that is trained further (`start_from`) keeps its own.
        training: How to train.
        train_prompt: Prompts that the rows are shown with: "varied", the zero-shot prompt and prompts with demos of
            other examples, such as prompt steps search, and the tuned program keeps the prompts it had; "vanilla" (the
            paper's), the zero-shot prompt alone, and the tuned program runs without demos; "optimized", the program's
            own demos, which it keeps; "mixed", a row with them and one without.
        max_demos: Demos that are drawn for a "varied" prompt, at most.
        num_samples: More tries, at `temperature`, for an example whose run failed; up to 8 where fewer than 16 examples
            are solved, hints tried too. 0 turns them off.
        branches: New answers to each call of a run that failed (at most three calls of a predictor), at `temperature`
            too, the calls before it as they were: a program of several modules then learns the answers that alone
            repair a run, and the report says which module the failures come from. 0: none.
        temperature: One number, or several used in turn.
        rescue: Give an example that failed all tries one more, with its label as a hint that no row shows (STaR). Where
            predictors come before those that answer the label, they alone get the hint first, so that what they
            write is learned when it leads to the answer; only then those that answer it.
        max_rescue_share: Rescued traces are at most this share of all (below 1: none for a student that solves nothing
            by itself).
        sample_passing: Sample examples that passed as well, for more distinct traces (RFT).
        max_traces_per_example: Distinct passing traces kept of one example.
        balance: Give the rows the trainset's shares of labels, where labels repeat.
        label_field: Field that holds the label; None finds it.
        reasoning: What rows of a model that thinks before it answers hold: "strip", the answers alone, so that the
            tuned model answers at once; "keep", the thoughts of its passing runs too, so that it goes on thinking.
        multitask: One adapter per LM, fed by all predictors that use it; False: one adapter per predictor.
        start_from: "base" trains a new adapter on the base weights; "current" goes on with the one in use.
        frozen: Names of predictors, or of modules with some, to leave alone. Those whose LM is not local are left alone
            anyway.
        threshold: Score from which an example counts as solved; None: 1.0, the full mark, or where hardly any run gets
            that from a metric that grades, the mean of the first runs (see `rollouts/graded.py`).
        validation_share: Share of the trainset's examples with rows held out to choose the best epoch: at least 4,
            which may be a fifth of them, so that of fewer than 20 none is. Where it is fewer than 16 and there is a
            valset, up to 16 examples of that are run and measured instead, if 4 or more of them give rows, and all of
            the trainset is trained on. 0: none.
        num_threads, max_errors, seed: As in `dspy.Evaluate`; `compile` may be given its own.
        folder: Where adapters are written where the step is compiled by itself; None: the cache. In a `BetterTogether`
            run they go to the run directory.
    """

    def __init__(
        self,
        metric: Metric | None = None,
        *,
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        train_prompt: TrainPrompt = "varied",
        max_demos: int = 3,
        num_samples: int = 4,
        branches: int = 0,
        temperature: float | Sequence[float] = TEMPERATURES,
        rescue: bool = True,
        max_rescue_share: float = 1.0,
        sample_passing: bool = False,
        max_traces_per_example: int = 2,
        balance: bool = True,
        label_field: str | None = None,
        reasoning: Reasoning = "strip",
        multitask: bool = True,
        start_from: Literal["base", "current"] = "base",
        frozen: Sequence[str] = (),
        threshold: float | None = None,
        validation_share: float = 0.1,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
    ) -> None:
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
        self.sampling = Sampling(
            num_samples, temperature, rescue, sample_passing, branches=branches, enough=ENOUGH_SOLVED
        )
        self.rows = RowOptions(
            train_prompt=train_prompt,
            max_demos=max_demos,
            max_traces_per_example=max_traces_per_example,
            max_rescue_share=max_rescue_share,
            balance=balance,
            label_field=label_field,
            reasoning=reasoning,
        )
        self.label_field = label_field

    @property
    def shows_forms(self) -> bool:
        """Whether rows are shown with demos of other examples too."""
        return self.rows.train_prompt == "varied"

    @property
    def clears_demos(self) -> bool:
        """Whether the tuned program runs without demos: rows were shown without any."""
        return self.rows.train_prompt == "vanilla"

    @classmethod
    def paper(cls, metric: Metric | None = None, **options: Any) -> Self:
        """The paper's setting: r 32, alpha 64, query and key only, lr 1e-5, 5 epochs, zero-shot prompts, one run per
        example, no rescue and no balancing."""
        paper: dict[str, Any] = {
            "lora": LoRAConfig.paper(),
            "training": TrainingConfig.paper(),
            "num_samples": 0,
            "rescue": False,
            "balance": False,
            "validation_share": 0.0,
            "train_prompt": "vanilla",
        }
        return cls(metric, **(paper | options))

    def probe_rows(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Sequence[Row]:
        """The rows of these runs."""
        return rows_from_traces(student, runs, trainable, replace(self.rows, balance=False)).rows

    def rows_of(self, student: dspy.Module, runs: Runs, trainable: Trainable) -> Collected:
        """The rows of the passing runs. Raises NoTrainingDataError with the counts when there are none."""
        return rows_from_traces(student, runs, trainable, self.rows)
