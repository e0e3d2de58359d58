"""What a device does with a model of a given size: answers, a training, and their peak memory beside the memory plan.

    python tests/benchmarks/device.py [--sizes 135M 8B] [--device cuda] [--requests 64] [--new-tokens 64] [--rows 64]

The weights are random, in bfloat16, of SmolLM2-135M's and of Llama-3.1-8B's layers (with SmolLM2's vocabulary: 7.4B
parameters), so that no download is needed; the tokenizer is `default_model()`'s. Requests share a prompt of about 1,300
tokens and are answered three times; the training is two epochs of an Iris program's rows with 4 demos, in batches of 8.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import torch
from training import iris_rows, training_config
from transformers import AutoModelForCausalLM, LlamaConfig

from bettertogether import LoRAConfig, default_model, local_lm

SIZES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "rope_theta": 500_000.0},
}
TEXT = "Tell the species of an iris flower from its measures in centimetres: setosa, versicolor or virginica. " * 60


def random_model(size: str, device: str, folder: Path) -> None:
    """A model folder with random weights."""
    source = default_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, folder)
    tokens: dict[str, Any] = {
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[size], **tokens), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def measure(size: str, folder: Path, options: argparse.Namespace) -> None:
    """Print what one size takes."""
    on_gpu, new_tokens = options.device.startswith("cuda"), options.new_tokens
    engine_options = {"device": options.device, "dtype": "bfloat16"}
    lm = local_lm(str(folder), max_tokens=new_tokens, cache=False, engine_options=engine_options)
    lm("Hello")

    def peak() -> str:
        return f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_gpu else ""

    prompts = [f"{TEXT}{number} and {number * number}" for number in range(options.requests)]
    for _ in range(3):
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lm, prompts))
        seconds = time.perf_counter() - started
        rate = len(prompts) * new_tokens / seconds
        print(
            f"{size}: answers {seconds:.2f} s, {rate:.0f} tokens/s, {1000 * seconds / new_tokens:.1f} ms a step{peak()}"
        )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        rows, training = iris_rows(options.rows, 4), training_config("bfloat16", epochs=2)
        done = lm.engine.finetune(rows, training=training, lora=LoRAConfig(), folder=Path(out))
        seconds = time.perf_counter() - started
    losses = [line.loss for line in done.history if line.loss is not None]
    print(f"{size}: training {seconds / len(losses):.2f} s a step, loss {losses[0]:.2f} -> {losses[-1]:.2f}{peak()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    # The plan of memory.
    logging.getLogger("bettertogether").setLevel(logging.INFO)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            random_model(size, options.device, Path(name))
            measure(size, Path(name), options)


if __name__ == "__main__":
    main()
