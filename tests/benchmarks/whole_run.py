"""A whole "p -> w -> p" against `dspy.BetterTogether` over plain `generate` and trl, with equal candidates and epochs.

    pip install trl
    python tests/benchmarks/whole_run.py [--train 12] [--val 8] [--test 40] [--seeds 0 1 2]

Both sides get the same program (ChatAdapter, DSPy's default), model, messages, metric, number of demo sets, examples to
score them on, rank, learning rate, epochs, batches and precision of training. Theirs is `dspy.BetterTogether` with
`BootstrapFewShotWithRandomSearch` and `BootstrapFinetune`, an engine that calls transformers' `generate` for one
request at a time, and a provider that trains with trl's SFTTrainer. Ours is this library with its own extras left on
(race, 2x2) but for more data (more tries, rescue, balance). Theirs drops unparseable answers before training, which
stop dspy 3.4.1 otherwise. Each side runs in a process of its own, DSPy's disk cache off; theirs takes a quarter of an
hour on two cores. Prints calls, rows, seconds, peak memory and scores, then the ratios (theirs / ours).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import dspy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from plain_engine import PlainEngine, plain_lm
from sides import Figures, measure, median, ratios, report
from tasks import Sentiment, sentiment_data, sentiment_match

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, TrainingConfig, default_model, local_lm
from bettertogether.records import WeightDetails
from bettertogether.rollouts.evaluation import evaluate

DEMO_SETS = 6
"""Sets of demos that each side samples; the zero-shot prompt and the labels alone come on top."""
MAX_TOKENS = 32
TRAINING: dict[str, Any] = {"learning_rate": 2e-4, "epochs": 3, "batch_size": 8}


def compile_ours(student: dspy.Module, lm: dspy.LM, data: tuple[list, list], seed: int) -> tuple[dspy.Module, int]:
    train, val = data
    student.set_lm(lm)
    own_data: dict[str, Any] = {"num_samples": 0, "rescue": False}
    p = BootstrapFewShotRS(sentiment_match, num_candidates=DEMO_SETS, **own_data)
    w = LoRAFinetune(sentiment_match, training=TrainingConfig(keep_best=False, **TRAINING), balance=False, **own_data)
    compiled = BetterTogether(sentiment_match, p=p, w=w).compile(student, trainset=train, valset=val, seed=seed)
    print(compiled.report, file=sys.stderr)
    details = [record.details for record in compiled.report.rounds]
    cards = [each.data_card for each in details if isinstance(each, WeightDetails)]
    return compiled, sum(sum(card.kept_by_source.values()) for card in cards)


class TolerantFinetune(dspy.BootstrapFinetune):
    """DSPy's, without the runs whose answer could not be parsed: dspy 3.4.1 counts them as passed, and fails."""

    def _prepare_finetune_data(self, trace_data: list[dict[str, Any]], *args: Any, **options: Any) -> Any:
        parsed = [data for data in trace_data if isinstance(data["prediction"], dspy.Prediction)]
        return super()._prepare_finetune_data(parsed, *args, **options)


def compile_theirs(student: dspy.Module, lm: dspy.LM, data: tuple[list, list], seed: int) -> tuple[dspy.Module, int]:
    train, val = data
    student.set_lm(lm)
    dspy.configure(lm=lm)
    # One of theirs is the first traces in order, without a draw: `DEMO_SETS` in all.
    p = dspy.BootstrapFewShotWithRandomSearch(
        sentiment_match,
        max_bootstrapped_demos=3,
        max_labeled_demos=3,
        num_candidate_programs=DEMO_SETS - 1,
        num_threads=1,
    )
    w = TolerantFinetune(sentiment_match, exclude_demos=True, train_kwargs=TRAINING, num_threads=1)
    compiled = dspy.BetterTogether(sentiment_match, p=p, w=w).compile(
        student, trainset=train, valset=val, seed=seed, num_threads=1
    )
    if compiled.flag_compilation_error_occurred:
        print("a step of dspy.BetterTogether failed, see the log above", file=sys.stderr)
    return compiled, lm.engine.trained_rows


def run_one(side: str, options: argparse.Namespace) -> None:
    """Compile one side and report its figures."""
    dspy.configure_cache(enable_disk_cache=False)
    train, val, test = sentiment_data(options.train, options.val, options.test, options.seeds[0])
    folder = options.model or default_model()
    student = dspy.Predict(Sentiment)
    lm = (
        local_lm(folder, max_tokens=MAX_TOKENS)
        if side == "ours"
        else plain_lm(PlainEngine(folder), max_tokens=MAX_TOKENS)
    )
    started = time.perf_counter()
    compiled, rows = (compile_ours if side == "ours" else compile_theirs)(student, lm, (train, val), options.seeds[0])
    seconds = time.perf_counter() - started
    calls = lm.engine.counters()["requests"]
    score = evaluate(compiled, test, sentiment_match).mean
    figures: Figures = {
        "seconds": seconds,
        "calls": calls,
        "rows": rows,
        "test": score,
        "strategies": {c["strategy"] or "student": c["score"] for c in compiled.candidate_programs},
        "seconds_by_part": getattr(lm.engine, "seconds", {}),
    }
    report(figures)


def run_side(side: str, arguments: list[str]) -> Figures:
    """Run one side in a process of its own, and print its line."""
    figures = measure(__file__, [*arguments, "--side", side])
    print(
        f"{side:6} {figures['seconds']:7.1f} s  {figures['calls']:5d} calls  {figures['rows']:3d} rows  "
        f"peak {figures['peak_gib']:5.2f} GiB  test {figures['test']:.3f}  {figures['strategies']} "
        f"{figures['seconds_by_part'] or ''}",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("train", 12), ("val", 8), ("test", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--side", choices=["ours", "theirs"], help="run this side alone")
    options = parser.parse_args()
    if options.side:
        run_one(options.side, options)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("This benchmark compares with trl, which is not installed: pip install trl")
    ours, theirs = [], []
    for seed in options.seeds:
        print(f"seed {seed}")
        arguments = [*sys.argv[1:], "--seeds", str(seed)]
        ours.append(run_side("ours", arguments))
        theirs.append(run_side("theirs", arguments))
    print(f"ratio  {ratios(ours, theirs, seconds='time', calls='calls', peak_gib='memory')}")
    print(f"median test  {median(ours, 'test'):.3f}, theirs {median(theirs, 'test'):.3f}")


if __name__ == "__main__":
    main()
