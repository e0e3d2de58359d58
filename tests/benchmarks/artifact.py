"""Size and load time of a compiled program that was saved, and of its merged model.

    python examples/quickstart.py --save FOLDER
    python tests/benchmarks/artifact.py FOLDER

Loads the program in this new process and scores it on the quickstart's test messages, which must give the
quickstart's own score; then merges adapter and base into a plain model, and compares its answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import dspy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tasks import sentiment_data, sentiment_match

import bettertogether
from bettertogether.rollouts.evaluation import Evaluation, evaluate


def mib(folder: Path) -> float:
    """Size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def answers(result: Evaluation) -> list[str]:
    """What the program said."""
    return [trace.prediction.sentiment for trace in result.traces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="the quickstart's")
    arguments = parser.parse_args()
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    test = sentiment_data(32, 40, 200, arguments.seed)[2]
    for file in sorted(arguments.folder.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.relative_to(arguments.folder)}")
    print(f"{mib(arguments.folder):8.2f} MiB  in all")
    started = time.perf_counter()
    program = bettertogether.load(arguments.folder)
    print(f"{time.perf_counter() - started:8.2f} s    to load the program")
    started = time.perf_counter()
    program(**test[0].inputs())
    print(f"{time.perf_counter() - started:8.2f} s    to the first answer, the base weights loaded for it")
    tuned = evaluate(program, test, sentiment_match)
    print(f"{tuned.mean:8.3f}      on {len(test)} test messages")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        merged = bettertogether.merge(arguments.folder, Path(folder) / "merged")
        print(f"{time.perf_counter() - started:8.2f} s    to merge, {mib(merged):.0f} MiB")
        program.set_lm(bettertogether.local_lm(merged, max_tokens=64))
        plain = evaluate(program, test, sentiment_match)
    same = sum(a == b for a, b in zip(answers(tuned), answers(plain), strict=True))
    print(f"{plain.mean:8.3f}      with the merged model; the same answer on {same} of {len(test)}")


if __name__ == "__main__":
    main()
