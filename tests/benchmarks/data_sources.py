"""What each source of training data gives: rows and labels covered, and the accuracy after training on them.

    python tests/benchmarks/data_sources.py --task sentiment

The untouched program runs on the trainset with the sources switched on in turn: its own runs only; more tries for
failing examples; a last try with the label as a hint; rows balanced by label. One adapter is trained on each set of
rows, and scored on the same test examples.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import dspy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tasks import Iris, Sentiment, iris_data, iris_match, sentiment_data, sentiment_match

from bettertogether import LoRAFinetune, default_model, local_lm
from bettertogether.errors import NoTrainingDataError
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.rollouts.settings import RunSettings

SOURCES: dict[str, dict[str, Any]] = {
    "own runs": {"num_samples": 0, "rescue": False, "balance": False},
    "+ 4 samples": {"num_samples": 4, "rescue": False, "balance": False},
    "+ rescue": {"num_samples": 4, "rescue": True, "balance": False},
    "+ balance": {"num_samples": 4, "rescue": True, "balance": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sentiment", "iris"), default="sentiment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--collect-only", action="store_true", help="count rows, train nothing")
    arguments = parser.parse_args()
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    if arguments.task == "iris":
        train, _, test = iris_data(arguments.seed)
        student, metric = dspy.ChainOfThought(Iris), iris_match
    else:
        train, _, test = sentiment_data(60, 0, arguments.test, arguments.seed)
        student, metric = dspy.Predict(Sentiment), sentiment_match
    student.set_lm(local_lm(default_model(), max_tokens=arguments.max_tokens))
    test, store, done = test[: arguments.test], RolloutStore(), {}
    if not arguments.collect_only:
        print(f"{'untouched':12} test {evaluate(student, test, metric).mean:.3f}", flush=True)
    for name, options in SOURCES.items():
        step = LoRAFinetune(metric, seed=arguments.seed, **options)
        started = time.monotonic()
        try:
            collected = step.collect(student, trainset=train, settings=RunSettings(store=store))
        except NoTrainingDataError as error:
            print(f"{name:12} {error}", flush=True)
            continue
        card = collected.card
        line = f"{name:12} {len(collected.rows):3} rows of {card.examples_covered:2} examples, {card.kept_by_label}, "
        line += f"from {card.kept_by_source}"
        content = repr(sorted((row.example, row.completion) for row in collected.rows))
        if not arguments.collect_only:
            if content not in done:
                tuned = step.compile(student, trainset=train, rows=collected.rows)
                done[content] = evaluate(tuned, test, metric).mean
            line += f"; test {done[content]:.3f}"
        print(f"{line}; {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
