"""Do prompts and weights gain from each other? Several tasks and seeds, every strategy, on examples no step sees.

    pip install scikit-learn
    python tests/benchmarks/together.py --results FOLDER
        [--tasks sentiment iris router hops arithmetic orders sentence scene reply]
        [--seeds 0 1 2] [--model smollm|gemma|fake|FOLDER] [--repeats] [--preference] [--policy]
        [--auto] [--theirs] [--limit 50] [--test 150]
    python tests/benchmarks/together.py --results FOLDER --train-prompt vanilla      # an ablation, beside the default
    python tests/benchmarks/together.py --results FOLDER --table                     # print what is there

For each task and seed one `BetterTogether.compile` runs "p -> w -> p" and "w"; each round is then scored on the test.
`--repeats` adds a compile of "w -> w" and "w -> p", `--preference` one of "w -> r" (r: PreferenceFinetune), `--policy`
one of "w -> g" (g: PolicyFinetune), `--auto` one with strategy="auto", `--theirs` one of
`dspy.BetterTogether` with dspy's own optimizers over the same engine (together_theirs.py). Ablations, one flag each:
`--train-prompt vanilla|optimized|mixed|varied`, `--skeleton-weight X`, `--learning-rate X|auto`, `--epochs N|auto`,
`--scheduler averaged|cosine`, `--no-balance-fields`, `--strengths none|0.5,1`, `--no-earlier`. Every cell (task,
seed, side, ablation, model) runs in a process of its own, one at a time, and is one JSON file in FOLDER; its log lies
beside it. The same command goes on where it was stopped.

Prints, per model and ablation: the mean on TEST of each strategy by task; paired differences with 95% intervals; the
2x2 of weights and prompts; minutes and LM calls of each round; and the ablations beside the default.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from together_results import Cell, Outcome
from together_tables import load, tables

TASK_NAMES = ("sentiment", "iris", "router", "hops", "arithmetic", "orders", "sentence", "scene", "reply")
MORE = ("repeats", "preference", "policy", "auto", "theirs")
"""Sides that are run where they are asked for."""


def number_or_word(text: str) -> float | int | str:
    """ "auto" stays a word."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=list(TASK_NAMES), choices=TASK_NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm", help="smollm, gemma, fake or the folder of a model")
    parser.add_argument("--repeats", action="store_true", help='also "w -> w" and "w -> p"')
    parser.add_argument("--preference", action="store_true", help='also "w -> r"')
    parser.add_argument("--policy", action="store_true", help='also "w -> g"')
    parser.add_argument("--auto", action="store_true", help='also strategy="auto"')
    parser.add_argument("--theirs", action="store_true", help="also dspy.BetterTogether")
    parser.add_argument("--only", nargs="+", choices=["ours", *MORE], help="these sides alone")
    parser.add_argument("--limit", type=int, help="examples to train and to choose on, at most")
    parser.add_argument("--test", type=int, help="examples of the test, at most")
    parser.add_argument("--table", action="store_true", help="print the tables alone")
    parser.add_argument("--train-prompt")
    for name in ("--skeleton-weight", "--learning-rate", "--epochs"):
        parser.add_argument(name, type=number_or_word)
    parser.add_argument("--scheduler", choices=["averaged", "cosine", "linear", "constant"])
    parser.add_argument("--no-balance-fields", dest="balance_fields", action="store_const", const=False)
    parser.add_argument("--strengths")
    parser.add_argument("--no-earlier", dest="earlier", action="store_const", const=False)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for: seed by seed, so that a stopped run has all tasks."""
    names = (
        *("train_prompt", "skeleton_weight", "learning_rate", "epochs", "scheduler", "balance_fields"),
        *("strengths", "earlier"),
    )
    ablation = {name: value for name in names if (value := getattr(options, name)) is not None}
    sides = options.only or ["ours", *(side for side in MORE if getattr(options, side))]
    common = {"model": options.model, "limit": options.limit, "test": options.test}
    return [
        {"task": task, "seed": seed, "side": side, "options": {} if side == "theirs" else ablation, **common}
        for seed in options.seeds
        for task in options.tasks
        for side in sides
    ]


def run(cell: dict[str, Any], folder: Path, script: str = __file__) -> bool:
    """Run a cell in a process of its own, a call of `script`, where it is not done; False when it failed."""
    asked = Cell(**cell)
    if Outcome(asked, folder).data["done"]:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    log, started = folder / f"{asked.name}.log", time.monotonic()
    command = [sys.executable, script, "--results", str(folder), "--cell", json.dumps(cell)]
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    state = "done"
    if done.returncode != 0:
        said = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        state = f"FAILED, {said} (see {log})"
    print(f"{asked.name}: {state}, {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return done.returncode == 0


def main() -> None:
    # A run that is killed takes the cell's process with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments().parse_args()
    if options.cell:
        from together_cell import run_cell

        run_cell(Cell(**json.loads(options.cell)), options.results)
        return
    failed = 0 if options.table else sum(not run(cell, options.results) for cell in cells(options))
    print(tables(load(options.results)))
    if failed:
        raise SystemExit(f"{failed} cells failed. The same command tries them again.")


if __name__ == "__main__":
    main()
