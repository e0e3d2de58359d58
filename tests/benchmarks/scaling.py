"""Time per program call by threads, demos in the prompt, and adapters in one batch.

    python tests/benchmarks/scaling.py [--calls 64] [--repeats 3]

The quickstart's program on the default model, DSPy's cache off, the engine's prefixes computed by a first run. Demos
are of different number, so that their cost is the attention to them; adapters are random (rank 16, all linear
layers) and take turns over the calls, so that every batch holds all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import dspy
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tasks import Sentiment, sentiment_data, sentiment_match

from bettertogether import default_model, local_lm
from bettertogether.rollouts.evaluation import Evaluator
from bettertogether.rollouts.settings import RunSettings


def program(lm: dspy.LM, demos: list[dspy.Example]) -> dspy.Predict:
    result = dspy.Predict(Sentiment)
    result.demos = demos
    result.set_lm(lm)
    return result


def milliseconds(programs: list[dspy.Predict], examples: list[dspy.Example], threads: int, repeats: int) -> float:
    """Median time per call; the examples are dealt to the programs."""
    shares = len(examples) // len(programs)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        Evaluator(sentiment_match, RunSettings(num_threads=threads)).evaluate(programs, examples[:shares], "score")
        times.append(1000 * (time.perf_counter() - started) / (shares * len(programs)))
    return statistics.median(times[1:])


def random_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A PEFT folder with weights that are not zero."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    tuned.save_pretrained(str(folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    demos, _, examples = sentiment_data(16, 4, options.calls, 0)
    model = default_model()
    lm = local_lm(model, max_tokens=64, cache=False)

    def line(what: str, programs: list[dspy.Predict], threads: int = 64) -> None:
        print(f"{what:12} {milliseconds(programs, examples, threads, options.repeats):7.1f} ms a call", flush=True)

    for threads in (1, 4, 16, 64):
        line(f"{threads} threads", [program(lm, demos[:4])], threads)
    for count in (0, 4, 8, 16):
        line(f"{count} demos", [program(lm, demos[:count])])
    with tempfile.TemporaryDirectory() as folder:
        folders = [random_adapter(Path(model), Path(folder) / str(seed), seed) for seed in range(8)]
        tuned = [local_lm(model, adapter=path, max_tokens=64, cache=False) for path in folders]
        for count in (1, 2, 4, 8):
            line(f"{count} adapters", [program(each, demos[:4]) for each in tuned[:count]])


if __name__ == "__main__":
    main()
