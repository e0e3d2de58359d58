"""The prompt step against `dspy.BootstrapFewShotWithRandomSearch`, with equal candidates, demos and data.

    python tests/benchmarks/prompt_step.py --seeds 3

Both search on the same engine and model, one after the other in one process, DSPy's cache off; the chosen program is
scored on the same held-out messages. Prints calls, tokens, seconds and scores, then the ratios (theirs / ours).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tasks import Sentiment, sentiment_data, sentiment_match

from bettertogether import BootstrapFewShotRS, default_model, local_lm
from bettertogether.rollouts.evaluation import evaluate


def measure(
    name: str,
    optimizer: Teleprompter,
    student: dspy.Module,
    train: list[dspy.Example],
    validation: list[dspy.Example],
    test: list[dspy.Example],
) -> tuple[float, int, int, float, float]:
    """Seconds, calls and prompt tokens of a compile; the scores on the validation and test examples."""
    lm = student.get_lm()
    before = lm.engine.counters()
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), dspy.context(lm=lm):
        if isinstance(optimizer, BootstrapFewShotRS):
            compiled = optimizer.compile(student, trainset=train, valset=validation)
        else:
            compiled = optimizer.compile(student, trainset=train, valset=validation)
            compiled.set_lm(lm)
    seconds = time.monotonic() - started
    after = lm.engine.counters()
    score = evaluate(compiled, test, sentiment_match).mean
    validation_score = evaluate(compiled, validation, sentiment_match).mean
    calls = after["requests"] - before["requests"]
    tokens = after["prompt_tokens"] - before["prompt_tokens"]
    print(
        f"{name:>6}: {calls:5d} calls {tokens:8d} prompt tokens {seconds:7.1f} s  "
        f"validation {validation_score:.3f}  test {score:.3f}",
        flush=True,
    )
    return seconds, calls, tokens, validation_score, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=30)
    parser.add_argument("--val", type=int, default=60)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=6)
    arguments = parser.parse_args()
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter(), num_threads=32)
    lm = local_lm(default_model(), max_tokens=64, cache=False)
    results: dict[str, list[tuple[float, int, int, float, float]]] = {"ours": [], "dspy": []}
    for seed in range(arguments.seeds):
        train, validation, test = sentiment_data(arguments.train, arguments.val, arguments.test, seed)
        student = dspy.Predict(Sentiment)
        student.set_lm(lm)
        ours = BootstrapFewShotRS(sentiment_match, num_candidates=arguments.candidates, seed=seed)
        theirs = dspy.BootstrapFewShotWithRandomSearch(
            metric=sentiment_match,
            max_bootstrapped_demos=3,
            max_labeled_demos=3,
            # One of theirs is the first traces in order, without a draw.
            num_candidate_programs=arguments.candidates - 1,
            num_threads=32,
        )
        for name, optimizer in (("ours", ours), ("dspy", theirs)):
            results[name].append(measure(name, optimizer, student, train, validation, test))
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in results.items()}
    ratio = [theirs / mine if mine else float("nan") for mine, theirs in zip(*medians.values(), strict=True)]
    print(
        f"\ndspy / ours, medians of {arguments.seeds} seeds: seconds {ratio[0]:.2f}, calls {ratio[1]:.2f}, "
        f"prompt tokens {ratio[2]:.2f}; validation {medians['ours'][3]:.3f} against {medians['dspy'][3]:.3f}, "
        f"test {medians['ours'][4]:.3f} against {medians['dspy'][4]:.3f}"
    )


if __name__ == "__main__":
    main()
