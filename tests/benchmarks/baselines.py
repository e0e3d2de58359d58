"""Does the quickstart's task need all this? Simpler tools and dspy's own optimizers on the same data and test.

    pip install '.[structured,baselines]'
    python tests/benchmarks/baselines.py --results FOLDER [--seeds 0 1 2] [--model smollm|gemma|fake|FOLDER]
        [--baselines untouched tfidf setfit labeled bootstrap mipro gepa together ours] [--limit 8] [--test 20]
    python tests/benchmarks/baselines.py --results FOLDER --table           # print what is there

Every baseline and seed runs in a process of its own, one at a time, and is one JSON file in FOLDER; its log lies
beside it. The same command goes on where it was stopped; a baseline that fails leaves the others to run.

Prints accuracy on the test with its 95% interval, the gain over ours, wall and processor minutes to fit or compile
(the model's loading and the test left out), LM calls, what an answer takes, and in sentences which tool wins.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from baselines_table import BASELINES, NO_MODEL, tables
from together import run
from together_results import Cell


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", default="smollm", help="smollm, gemma, fake or the folder of a model")
    parser.add_argument("--limit", type=int, help="examples to train and to choose on, at most")
    parser.add_argument("--test", type=int, help="examples of the test, at most")
    parser.add_argument("--table", action="store_true", help="print the table alone")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for: seed by seed."""
    return [
        {
            "task": "quickstart",
            "seed": seed,
            "side": name,
            "model": options.model if BASELINES[name].needs_lm else NO_MODEL,
            "limit": options.limit,
            "test": options.test,
        }
        for seed in options.seeds
        for name in options.baselines
    ]


def main() -> None:
    # A run that is killed takes the cell's process with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments().parse_args()
    if options.cell:
        from baselines_cell import run_baseline

        run_baseline(Cell(**json.loads(options.cell)), options.results)
        return
    asked = [] if options.table else cells(options)
    failed = sum(not run(cell, options.results, script=__file__) for cell in asked)
    print(tables(options.results))
    if failed:
        raise SystemExit(f"{failed} baselines failed. The same command tries them again.")


if __name__ == "__main__":
    main()
