"""A model of 135M parameters teaches itself to tell positive from negative messages, on two CPU cores.

    pip install 'torch==2.13.*' '.[structured]' && python examples/quickstart.py

`--fast` does the same on less data. The README holds the table that this prints, and the machine it ran on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import dspy
from tasks import Sentiment, sentiment_data, sentiment_match

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    TrainingConfig,
    compare,
    default_model,
    evaluate,
    local_lm,
    save,
    vllm_lm,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="less data, in less time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder or hub id of another model")
    parser.add_argument("--vllm", nargs="?", const="vllm", help="let vLLM answer: the program, where not on the PATH")
    parser.add_argument("--strategy", default="p -> w -> p")
    parser.add_argument("--run-dir", help="where to keep records, adapters and the report; the same call goes on")
    parser.add_argument("--save", help="folder for the compiled program")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    clock = Clock()
    model = arguments.model or default_model()
    if arguments.vllm:
        lm = vllm_lm(model, max_tokens=64, engine_options={"command": arguments.vllm})
    else:
        lm = local_lm(model, max_tokens=64)
    # The times below would mean nothing if answers came from an earlier run's disk cache.
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    sizes = (24, 24, 100) if arguments.fast else (32, 40, 200)
    trainset, valset, testset = sentiment_data(*sizes, seed=arguments.seed)
    student = dspy.Predict(Sentiment)
    student.set_lm(lm)
    clock.lap("model and data ready")

    before = evaluate(student, testset, sentiment_match, phase="test the untouched program")
    clock.lap("untouched program tested")

    # Three passes are enough here. The default would wait longer for a lower loss.
    w = LoRAFinetune(sentiment_match, training=TrainingConfig(epochs=3))
    compiled = BetterTogether(sentiment_match, p=BootstrapFewShotRS(sentiment_match), w=w).compile(
        student,
        trainset=trainset,
        valset=valset,
        strategy=arguments.strategy,
        seed=arguments.seed,
        run_dir=arguments.run_dir,
    )
    clock.lap("compiled")

    after = evaluate(compiled, testset, sentiment_match, phase="test the compiled program")
    clock.lap("compiled program tested")

    if arguments.save:
        save(compiled, arguments.save)
    print(compiled.report)
    print(f"\nOn {len(testset)} test messages that no step has seen:")
    print(compare({"untouched": before, "compiled": after}))
    print(f"\n{clock}\npeak memory {peak_memory_bytes() / 2**30:.1f} GiB")


def peak_memory_bytes() -> int:
    """What this process had at most."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, float]] = []
        self._last = self._start = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps.append((name, now - self._last))
        self._last = now

    def __str__(self) -> str:
        lines = [f"{seconds:7.1f} s  {name}" for name, seconds in [*self._laps, ("total", self._last - self._start)]]
        return "\n".join(lines)


if __name__ == "__main__":
    main()
