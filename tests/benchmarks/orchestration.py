"""What this library adds to a program call, and whether memory stays flat: a fake LM, DSPy's caches off.

    python tests/benchmarks/orchestration.py

Prints, per program call, the processor time of `evaluate()`, of the bare DSPy calls and metric in it, and of what is
left, which is ours (target: under 1 ms); where the time goes by package; and the memory after each 1,000 of 10,000
calls. CPU only, half a minute.
"""

from __future__ import annotations

import cProfile
import gc
import logging
import pstats
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy

sys.path.insert(0, str(Path(__file__).parents[1]))
from fakes import Parity, TwoSteps, numbers, parity_match, plain_lm, two_step_engine

from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.runner import Runner
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.testing import FakeEngine

CALLS, REPEATS = 1000, 5
ANSWER = "[[ ## parity ## ]]\nodd\n\n[[ ## completed ## ]]"


def one_step() -> dspy.Module:
    program = dspy.Predict(Parity)
    program.set_lm(plain_lm(FakeEngine(lambda _: ANSWER)))
    return program


def two_steps() -> dspy.Module:
    program = TwoSteps()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    return program


def processor_ms(work: Callable[[], object]) -> float:
    """Median processor time of `work`, in ms per call."""
    times = []
    for _ in range(REPEATS):
        gc.collect()
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1000 * statistics.median(times) / CALLS


def bare(program: dspy.Module, examples: list[dspy.Example]) -> None:
    with dspy.context(trace=[], disable_history=True):
        for example in examples:
            parity_match(example, program(**example.inputs()))
            dspy.settings.trace.clear()


def overhead(name: str, program: dspy.Module) -> None:
    examples = numbers(CALLS)
    bare_ms = processor_ms(lambda: bare(program, examples))
    lines: dict[str, Callable[[], Any]] = {
        "evaluate, 1 thread": lambda: evaluate(program, examples, parity_match, num_threads=1),
        "evaluate, 8 threads": lambda: evaluate(program, examples, parity_match, num_threads=8),
        "collect_traces, 8 threads": lambda: collect_traces(
            program,
            examples,
            ExamplePass(parity_match, settings=RunSettings(num_threads=8)),
            sampling=Sampling(0, rescue=False),
        ),
    }
    print(f"{name}: {bare_ms:.3f} ms a call are DSPy's, the fake LM's and the metric's")
    for label, work in lines.items():
        total = processor_ms(work)
        print(f"  {label:<26} {total:.3f} ms a call, ours {total - bare_ms:.3f} ms ({1 - bare_ms / total:.0%})")


def shares(program: dspy.Module) -> None:
    """Own time of the functions of each package, over the calls of one thread."""
    runner = Runner(program)
    profile = cProfile.Profile()
    profile.enable()
    for example in numbers(CALLS):
        runner.run(example)
    profile.disable()
    times: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        times[package_of(file)] += own
    total = sum(times.values())
    listed = ", ".join(f"{name} {own / total:.0%}" for name, own in sorted(times.items(), key=lambda kv: -kv[1]))
    print(f"own time by package (profiled): {listed}")


def package_of(file: str) -> str:
    if "bettertogether" in file:
        return "fake LM" if "/testing/" in file or "fakes" in file else "bettertogether"
    for package in ("dspy", "pydantic", "litellm"):
        if f"/{package}" in file:
            return package
    return "Python and its built-ins"


def memory(program: dspy.Module) -> None:
    engine = program.predictors()[0].lm.engine
    sizes = []
    for start in range(0, 10 * CALLS, CALLS):
        evaluate(program, numbers(CALLS, start), parity_match, num_threads=8)
        engine.requests.clear()
        gc.collect()
        sizes.append(resident_mib())
    print("resident MiB after each 1,000 calls:", " ".join(f"{size:.0f}" for size in sizes))
    print(f"growth from 2,000 to 10,000 calls: {sizes[-1] - sizes[1]:+.1f} MiB")


def resident_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    logging.disable(logging.WARNING)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    overhead("one predictor", one_step())
    overhead("two predictors", two_steps())
    shares(one_step())
    memory(one_step())


if __name__ == "__main__":
    main()
