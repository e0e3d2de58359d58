"""A whole "p -> w -> p" at growing sizes with a fake engine and its fake training: what is ours, and what it leaves.

    python tests/benchmarks/large_data.py [--sizes 1000 10000 100000] [--words 60] [--profile]
    python tests/benchmarks/large_data.py --packing 100000

A fifth as many validation examples as training examples, of `--words` words each; DSPy's caches off. The engine knows
60% of the labels, more with demos and after training, and keeps none of its requests. Prints for each size, which runs
in processes of its own: program calls; processor time of the passes over examples per call, less that of bare DSPy
calls of the same programs with the metric, a few of each pass (target: under 1 ms); processor time of making a training
row, for which DSPy formats its prompt once more; processor and wall time in all; peak memory above that of the
examples, in all and per training example; size and files of the run directory; and wall time and files opened when the
finished run is resumed, and when its first two rounds are. CPU only.

`--packing` is the training's side: so many rows of 200 tokens are kept as a training keeps them and once packed for all
of its passes, in the order of an epoch. It prints the memory above that of an empty process and the time, with rows in
lists and in an Arrow file.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import hashlib
import json
import logging
import pstats
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.lm15 import Request, Response
from orchestration import resident_mib
from sides import Figures, measure, report

from bettertogether import BetterTogether, Budget
from bettertogether.lm import engine_lm
from bettertogether.rollouts.traces import ExamplePass, Trace
from bettertogether.steps import weight_step
from bettertogether.testing import Answer, FakeEngine, FakeRequest

LABELS = ("animal", "body", "colour", "drink", "earth", "food", "garden", "house", "iron", "journey")
KNOWN, KNOWN_WITH_DEMOS, KNOWN_AFTER_TRAINING = 0.6, 0.7, 0.9
BARE_CALLS = 50
"""Of each pass, at most."""


class Topic(dspy.Signature):
    """Say what the text is about."""

    text: str = dspy.InputField()
    topic: Literal[LABELS] = dspy.OutputField()  # type: ignore[valid-type]


class ForgetfulEngine(FakeEngine):
    """Keeps no request and no training, whose number grows with that of the calls."""

    def complete(self, request: Request) -> Response:
        response = super().complete(request)
        self.requests.clear()
        return response

    def finetune(self, *arguments: Any, **options: Any) -> Any:
        result = super().finetune(*arguments, **options)
        self.trainings.clear()
        return result


def examples(count: int, start: int, words: int) -> list[dspy.Example]:
    """Texts whose last word is their number."""
    rng = random.Random(start)
    vocabulary = [f"{first}{second}" for first in LABELS for second in LABELS]
    found = []
    for number in range(start, start + count):
        text = " ".join([*rng.choices(vocabulary, k=words - 1), f"n{number}"])
        found.append(dspy.Example(text=text, topic=label(number)).with_inputs("text"))
    return found


def label(number: int) -> str:
    return LABELS[number % len(LABELS)]


def matches(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(example.topic == prediction.topic)


def answer(request: FakeRequest) -> Answer:
    number = int(request.user.split(" n")[1].split("\n")[0])
    rate = KNOWN_AFTER_TRAINING if request.trained_on else KNOWN_WITH_DEMOS if request.demos else KNOWN
    draw = hashlib.sha256(f"{number} {request.seed}".encode()).digest()[0] / 256
    return f"[[ ## topic ## ]]\n{label(number + (draw >= rate))}\n\n[[ ## completed ## ]]"


def student() -> dspy.Predict:
    program = dspy.Predict(Topic)
    program.set_lm(engine_lm(ForgetfulEngine(answer), cache=False, temperature=0.0))
    return program


class Passes:
    """Processor time of all passes over examples, and how much of it is DSPy's, the fake engine's and the metric's."""

    def __init__(self) -> None:
        self.seconds, self.bare_seconds, self.measuring_seconds = 0.0, 0.0, 0.0
        self._rng, self._over_many = random.Random(0), ExamplePass.over_many
        ExamplePass.over_many = lambda *given: self._over(*given)  # type: ignore[method-assign]

    def _over(self, options: ExamplePass, programs: Any, examples: Any, jobs: Any, labels: Any = None) -> list[Trace]:
        started = time.process_time()
        traces = self._over_many(options, programs, examples, jobs, labels)
        self.seconds += time.process_time() - started
        made = [job for job, trace in zip(jobs, traces, strict=True) if trace.ledger.prompt_tokens]
        some = self._rng.sample(made, min(len(made), BARE_CALLS))
        if some:
            bare = bare_seconds([(programs[program], examples[index]) for program, index, _ in some])
            self.bare_seconds += bare / len(some) * len(made)
            self.measuring_seconds += bare
        return traces


def bare_seconds(calls: list[tuple[dspy.Module, dspy.Example]]) -> float:
    """Processor time of these calls by DSPy alone, with the fake engine and the metric."""
    started = time.process_time()
    with dspy.context(trace=[], disable_history=True):
        for program, example in calls:
            matches(example, program(**example.inputs()))
            dspy.settings.trace.clear()
    return time.process_time() - started


class Timed:
    """Processor time of all calls of a function, which runs in one thread at a time; and what they gave."""

    def __init__(self, holder: Any, name: str) -> None:
        self.seconds, self.results = 0.0, list[Any]()
        self._function = getattr(holder, name)
        setattr(holder, name, functools.wraps(self._function)(lambda *given, **named: self._call(given, named)))

    def _call(self, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        started = time.process_time()
        result = self._function(*given, **named)
        self.seconds += time.process_time() - started
        self.results.append(result)
        return result


class PeakMemory:
    """The most memory that was resident meanwhile, in MiB: looked at, since what a system keeps is of the process."""

    def __init__(self) -> None:
        self.mib = resident_mib()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.mib = max(self.mib, resident_mib())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


class Opened:
    """Files of a folder that were opened meanwhile, and how often."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.counts = str(folder), Counter[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(self._folder):
            self.counts[arguments[0]] += 1


def compiled(run_dir: Path, size: int, words: int, budget: Budget | None = None) -> Figures:
    """Compile in a run directory, which may hold the run already."""
    trainset, valset = examples(size, 0, words), examples(size // 5, size, words)
    # Loads the modules that any run does.
    BetterTogether(matches).compile(student(), trainset=trainset[:20], valset=valset[:20], progress=False)
    before, opened = resident_mib(), Opened(run_dir)
    passes, rows = Passes(), Timed(weight_step, "rows_from_traces")
    wall, processor = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        program = BetterTogether(matches).compile(
            student(), trainset=trainset, valset=valset, run_dir=run_dir, progress=False, budget=budget
        )
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    calls = sum(record.ledger.lm_calls - record.ledger.cache_hits for record in program.report.rounds)
    return {
        "calls": calls,
        "ms": 1000 * (passes.seconds - passes.bare_seconds) / calls,
        "bare_ms": 1000 * passes.bare_seconds / calls,
        "ms_a_row": 1000 * rows.seconds / max(1, sum(len(collected.rows) for collected in rows.results)),
        "processor_s": processor - passes.measuring_seconds,
        "seconds": wall,
        "mib": peak.mib - before,
        "examples_mib": before,
        "files_opened": sum(opened.counts.values()),
        "scores": [record.score for record in program.report.rounds],
    }


def first_rounds_alone(run_dir: Path, target: Path) -> None:
    """A copy of a finished run as it was after its second round."""
    shutil.copytree(run_dir, target)
    records = (target / "records.jsonl").read_bytes().splitlines(keepends=True)
    (target / "records.jsonl").write_bytes(b"".join(records[:2]))


def run_one(options: argparse.Namespace) -> None:
    """One compile, as a process of its own."""
    logging.disable(logging.WARNING)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    dspy.configure(adapter=dspy.ChatAdapter())
    budget = Budget(tokens=1) if options.stop_at_once else None
    if not options.profile:
        report(compiled(options.run_dir, options.size, options.words, budget))
        return
    profile = cProfile.Profile(time.thread_time)
    figures = profile.runcall(compiled, options.run_dir, options.size, options.words, budget)
    statistics = pstats.Stats(profile, stream=sys.stderr)
    statistics.sort_stats("cumulative").print_stats(70)
    statistics.sort_stats("tottime").print_stats(40)
    report(figures)


def measured(size: int, words: int, profile: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="large-data-") as folder:
        run_dir = Path(folder) / "run"

        def side(run: Path, *more: str) -> Figures:
            return measure(__file__, ["--size", str(size), "--words", str(words), "--run-dir", str(run), *more])

        first = side(run_dir, *(["--profile"] if profile else []))
        files = [path for path in run_dir.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(run_dir)): path.stat().st_size for path in files}
        first_rounds_alone(run_dir, Path(folder) / "half")
        resumed, half = side(run_dir), side(Path(folder) / "half", "--stop-at-once")
    print(
        f"{size:>8,} {first['calls']:>9,} {first['ms']:>8.2f} {first['ms_a_row']:>7.2f} "
        f"{first['processor_s']:>8.0f} {first['seconds']:>7.0f} "
        f"{first['mib']:>9,.0f} {1024 * first['mib'] / size:>11.1f} {sum(sizes.values()) / 1e6:>9.1f} {len(files):>6} "
        f"{resumed['seconds']:>9.1f} {half['seconds']:>9.1f} {resumed['files_opened']:>7} {half['files_opened']:>5}",
        flush=True,
    )
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    details = {**first, "largest_files": {name: sizes[name] for name in largest}, "resumed_mib": resumed["mib"]}
    print(json.dumps(details), file=sys.stderr, flush=True)


def packing(count: int, in_lists: bool) -> Figures:
    """An epoch's packing, without a model."""
    from bettertogether.training import arrow_rows
    from bettertogether.training.packing import TokenizedRow, epoch_batches, micro_batches

    rng = random.Random(0)
    arrow_rows.MANY_ROWS = sys.maxsize if in_lists else 0
    # With what a training loads anyway.
    import datasets  # noqa: F401

    before, started = resident_mib(), time.process_time()
    with arrow_rows.row_folder(Path(tempfile.mkdtemp())) as folder, PeakMemory() as peak:
        made = (TokenizedRow(rng.choices(range(49152), k=190), rng.choices(range(49152), k=10)) for _ in range(count))
        rows = arrow_rows.kept(made, count, folder / "rows.arrow")
        tokens = 0
        for indices in epoch_batches(len(rows), 16, seed=0, epoch=1):
            tokens += sum(batch.tokens for batch in micro_batches([rows[i] for i in indices], 4096, 4096))
    return {"mib": peak.mib - before, "seconds": time.process_time() - started, "tokens": tokens}


def print_packing(options: argparse.Namespace) -> None:
    if options.size:
        report(packing(options.packing, options.in_lists))
        return
    print("rows in          peak MiB  processor s      tokens")
    for name, more in (("lists", ["--in-lists"]), ("an Arrow file", [])):
        found = measure(__file__, ["--packing", str(options.packing), "--size", "1", *more])
        print(f"{name:<16} {found['mib']:>8,.0f} {found['seconds']:>12.0f} {found['tokens']:>11,}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, to standard error")
    parser.add_argument("--packing", type=int, metavar="ROWS", help="measure the training's side alone")
    parser.add_argument("--in-lists", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("size", int), ("run-dir", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_dir:
        run_one(options)
        return
    if options.packing:
        print_packing(options)
        return
    print(
        "examples     calls  ms/call  ms/row    cpu s  wall s  peak MiB KiB/example    run MB  files "
        "resumed s    half s opened"
    )
    for size in options.sizes:
        measured(size, options.words, options.profile)


if __name__ == "__main__":
    main()
