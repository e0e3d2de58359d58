"""Where the engine's time goes, against the arithmetic limit of the processor.

    python tests/benchmarks/profile_generation.py MODEL_FOLDER [--requests 64] [--demos 8] [--new-tokens 64]

Measures the rate of the model's own matrix products at the row counts that the engine gives them, counts the floating
point operations of the tokens that must go through the model (2 x parameters x tokens, the shared prefix once), and
prints the least time that takes, the time the engine takes, and the operators that take it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from generation import Bench, chats
from linear_layers import rate
from torch.profiler import ProfilerActivity, profile

ROWS = (1, 8, 32, 64, 256, 1024)
KINDS = {
    "matrix products": ("mkldnn", "linear", "addmm", "mm", "matmul", "bmm"),
    "attention": ("flash_attention", "scaled_dot", "lerp", "sigmoid"),
}


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def gemm_rates(model: torch.nn.Module) -> dict[int, float]:
    """GFLOP/s of one pass over all linear layers but the output head, by the number of rows."""
    layers = [layer for layer in linear_layers(model) if layer.out_features < 2**15]
    with torch.inference_mode():
        return {rows: rate(layers, rows) for rows in ROWS}


def operations(bench: Bench, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """GFLOP by part: the shared prefix once, each prompt's own tokens, the new tokens, and their logits."""
    shared = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    body = sum(layer.weight.numel() for layer in linear_layers(bench.model) if layer.out_features < 2**15)
    head = bench.model.get_output_embeddings().weight.numel()
    own = sum(len(prompt) - shared for prompt in prompts)
    config = bench.model.config
    # Scores and weighted values: 4 x head size x heads for each pair of a token and one that it sees.
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    seen = shared * shared / 2 + sum((len(p) + new_tokens) ** 2 / 2 - shared * shared / 2 for p in prompts)
    new = len(prompts) * new_tokens
    parts = {
        "shared prefix": 2 * body * shared,
        "own prompts": 2 * body * own,
        "new tokens": 2 * body * new,
        "logits": 2 * head * new,
        "attention": pair * seen,
    }
    return {name: value / 1e9 for name, value in parts.items()}


def by_kind(report: profile) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Seconds of own processor time by kind of operator, and by operator."""
    kinds: Counter[str] = Counter()
    operators: dict[str, Counter[str]] = defaultdict(Counter)
    for event in report.key_averages():
        seconds = event.self_cpu_time_total / 1e6
        found = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "the rest")
        kinds[found] += seconds
        operators[found][event.key] += seconds
    return kinds, operators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    for name, default in (("requests", 64), ("demos", 8), ("new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    bench = Bench(options)
    prompts = [bench.renderer.prompt_tokens(chat) for chat in chats(options.requests, options.demos)]
    rates = gemm_rates(bench.model)
    print("rows of a matrix product, GFLOP/s: " + ", ".join(f"{rows}: {rate:.0f}" for rows, rate in rates.items()))
    parts = operations(bench, prompts, options.new_tokens)
    slow = rates[min(ROWS, key=lambda rows: abs(rows - options.requests))]
    limits = {
        name: gflop / (slow if name in ("new tokens", "logits") else max(rates.values()))
        for name, gflop in parts.items()
    }
    for name, gflop in parts.items():
        print(f"  {name:14} {gflop:8.0f} GFLOP  {limits[name]:6.1f} s at the measured rate")
    bench.engine(prompts[:4])
    started = time.perf_counter()
    bench.engine(prompts)
    seconds = time.perf_counter() - started
    print(
        f"limit {sum(limits.values()):.1f} s, engine {seconds:.1f} s: {sum(limits.values()) / seconds:.0%} of the limit"
    )
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as report:
        bench.engine(prompts)
    kinds, operators = by_kind(report)
    total = sum(kinds.values())
    for kind, spent in kinds.most_common():
        largest = ", ".join(f"{name} {each / total:.0%}" for name, each in operators[kind].most_common(5))
        print(f"  {kind:16} {spent / total:4.0%}   {largest}")


if __name__ == "__main__":
    main()
