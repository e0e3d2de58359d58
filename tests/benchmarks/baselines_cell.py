"""One baseline of the benchmark `baselines.py` on one seed: fitted or compiled, and tested."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
from baselines_table import BASELINES, DEMOS, ROUNDS, SETS
from baselines_texts import CLASSIFIERS
from together_cell import model_lm
from together_results import Cell, Outcome
from together_tasks import TASKS, Task
from together_theirs import compile_theirs

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, TrainingConfig, evaluate

QUICKSTART = dataclasses.replace(TASKS["sentiment"], max_tokens=64, sizes=(32, 40, 200))
"""The task of examples/quickstart.py."""
PROPOSAL_TOKENS = 512
"""Of an instruction that the model writes for itself."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What an optimizer gets."""

    student: dspy.Module
    lm: Any
    """A `dspy.LM` over one of our engines."""
    train: list[dspy.Example]
    val: list[dspy.Example]
    seed: int
    run_dir: Path
    metric: Callable[..., bool] = QUICKSTART.metric

    @property
    def runs(self) -> int:
        """Runs of the program that a search may spend."""
        return ROUNDS * len(self.val)

    @property
    def proposer(self) -> Any:
        """The model as the writer of instructions, at temperature 1, so that no two are the same."""
        return self.lm.copy(temperature=1.0, max_tokens=PROPOSAL_TOKENS)

    @property
    def patience(self) -> dict[str, int]:
        """dspy's threads: as many as the engine answers at once; failing examples end no search."""
        return {"num_threads": self.lm.engine.concurrency, "max_errors": 100 * self.runs}


def _labeled(given: Given) -> dspy.Module:
    return dspy.LabeledFewShot().compile(given.student, trainset=given.train)


def _bootstrap(given: Given) -> dspy.Module:
    # Beside those that it draws it tries three: no demos, labels alone, the first runs in order.
    search = dspy.BootstrapFewShotWithRandomSearch(given.metric, num_candidate_programs=ROUNDS - 3, **given.patience)
    return search.compile(given.student, trainset=given.train, valset=given.val)


def _mipro(given: Given) -> dspy.Module:
    search = dspy.MIPROv2(
        given.metric,
        prompt_model=given.proposer,
        task_model=given.lm,
        auto=None,
        num_candidates=6,
        seed=given.seed,
        **given.patience,
    )
    # The untouched program is scored before the first trial.
    return search.compile(given.student, trainset=given.train, valset=given.val, num_trials=ROUNDS - 1, minibatch=False)


def _gepa(given: Given) -> dspy.Module:
    def feedback(
        example: dspy.Example,
        prediction: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        right = given.metric(example, prediction)
        told = "Right." if right else f"Wrong: the sentiment is {example.sentiment}, not {prediction.sentiment}."
        return dspy.Prediction(score=float(right), feedback=told)

    search = dspy.GEPA(
        metric=feedback,
        max_metric_calls=given.runs,
        reflection_lm=given.proposer,
        seed=given.seed,
        num_threads=given.patience["num_threads"],
    )
    return search.compile(given.student, trainset=given.train, valset=given.val)


def _together(given: Given) -> dspy.Module:
    return compile_theirs(given.metric, given.student, given.train, given.val, given.seed, (SETS, DEMOS))


def _ours(given: Given) -> dspy.Module:
    # What an earlier sitting did would be missing from what it took.
    shutil.rmtree(given.run_dir, ignore_errors=True)
    weights = LoRAFinetune(given.metric, training=TrainingConfig(epochs=3))
    return BetterTogether(given.metric, p=BootstrapFewShotRS(given.metric), w=weights).compile(
        given.student,
        trainset=given.train,
        valset=given.val,
        strategy="p -> w -> p",
        seed=given.seed,
        run_dir=given.run_dir,
        progress=False,
        on_step_error="raise",
    )


OPTIMIZERS: dict[str, Callable[[Given], dspy.Module]] = {
    "untouched": lambda given: given.student,
    "labeled": _labeled,
    "bootstrap": _bootstrap,
    "mipro": _mipro,
    "gepa": _gepa,
    "together": _together,
    "ours": _ours,
}
PROMPTS_ALONE = {"labeled", "bootstrap", "mipro", "gepa"}
"""Whose programs come back without the student's LM, or with another."""


class Stopwatch:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def minutes(self) -> dict[str, float]:
        """As the fields of a result."""
        return {"minutes": (time.monotonic() - self._wall) / 60, "cpu_minutes": self.cpu_s / 60}

    @property
    def cpu_s(self) -> float:
        """Processor seconds, summed over cores."""
        return time.process_time() - self._cpu


def run_baseline(cell: Cell, folder: Path) -> None:
    """Fit or compile what the cell names, and test it; the result file says what it took."""
    outcome = Outcome(cell, folder)
    train, val, test = QUICKSTART.data(cell.seed, cell.limit, cell.test)
    outcome.keep(sizes=[len(train), len(val), len(test)])
    run = run_program if BASELINES[cell.side].needs_lm else run_classifier
    run(outcome, train, val, test)
    outcome.keep(done=True)


def run_classifier(outcome: Outcome, train: list[Any], val: list[Any], test: list[Any]) -> None:
    """A tool that learns texts and labels and knows nothing of language models."""
    name, _, more = outcome.cell.side.partition("_")
    learned = [*train, *val] if more == "all" else train
    fit = CLASSIFIERS[name](outcome.cell.seed)
    watch = Stopwatch()
    predict = fit([example.text for example in learned], [example.sentiment for example in learned])
    outcome.keep(**watch.minutes(), lm_calls=0)
    watch = Stopwatch()
    labels = predict([example.text for example in test])
    right = [float(label == example.sentiment) for label, example in zip(labels, test, strict=True)]
    outcome.keep(tests={"returned": right}, answer_ms=1000 * watch.cpu_s / len(test))


def run_program(outcome: Outcome, train: list[Any], val: list[Any], test: list[Any]) -> None:
    """A program over the cell's model, as its optimizer leaves it."""
    cell, task = outcome.cell, QUICKSTART
    dspy.configure_cache(enable_disk_cache=False)
    student = task.program()
    lm: Any = model_lm(cell.model, task)
    student.set_lm(lm)
    dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
    given = Given(student, lm, train, val, cell.seed, outcome.path.parent / "runs" / cell.name)
    watch, before = Stopwatch(), lm.engine.counters()["requests"]
    program = OPTIMIZERS[cell.side](given)
    outcome.keep(**watch.minutes(), lm_calls=lm.engine.counters()["requests"] - before)
    if cell.side in PROMPTS_ALONE:
        program.set_lm(lm)
    outcome.keep(**tested(program, task, test), instructions=program.signature.instructions, demos=len(program.demos))


def tested(program: dspy.Module, task: Task, test: list[Any]) -> dict[str, Any]:
    """Scores on the test, and what an answer took."""
    watch = Stopwatch()
    scores = list(evaluate(program, test, task.metric).scores)
    return {"tests": {"returned": scores}, "answer_ms": 1000 * watch.cpu_s / len(test)}
