"""Time of the engine against the other ways to answer the same prompts, side by side in one process.

    python tests/benchmarks/generation.py MODEL_FOLDER [--requests 64] [--demos 8] [--new-tokens 64] [--repeats 3]

64 requests of an Iris program (chain of thought, JSON) with 8 demos each, greedy and of a fixed length, so that every
way does the same work. A way that is slow is timed on a part of the requests, and the time is scaled to all of them
(`--share one_by_one=8`): one by one and in padded batches it is proportional to their number. The texts of all ways
are compared. llama.cpp is timed when `llama_cpp` can be imported and --gguf names its file; vLLM when --vllm is the
address of its server, on the same processors:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL_FOLDER --dtype float32 --max-num-seqs 64

With `--own-tokens 3000` the prompts are random and long, as where each brings passages of its own; what the engine's
answers took in memory, and how many rows got a token in a step, is said too.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import dspy
import httpx
import psutil
import torch
from sklearn.datasets import load_iris
from transformers import GenerationConfig

from bettertogether.engines.adapters import AdapterBank, linear_shapes
from bettertogether.engines.loading import load_model, pick_dtype, read_card
from bettertogether.engines.local.choice import make_decoder
from bettertogether.engines.local.decoder import BatchRow, Decision, Decoder
from bettertogether.engines.local.job import Job
from bettertogether.engines.local.packed_linear import pack_linear_layers
from bettertogether.engines.local.scheduler import Scheduler
from bettertogether.engines.local.text_stream import TextStream
from bettertogether.engines.protocol import ChatMessage
from bettertogether.engines.rendering import PromptRenderer

Prompts = Sequence[list[int]]
Answers = list[list[int]]
Way = Callable[[Prompts], Answers]
OTHERS = {"llama_cpp": "gguf", "vllm": "vllm"}
"""Ways with arithmetic of their own, which may write other texts; and the option by which they find the model."""
WAYS = ("engine", "one_by_one", "padded", "continuous", *OTHERS)


class Iris(dspy.Signature):
    """Tell the species of an iris flower from its measures in centimetres."""

    sepal_length: float = dspy.InputField()
    sepal_width: float = dspy.InputField()
    petal_length: float = dspy.InputField()
    petal_width: float = dspy.InputField()
    reasoning: str = dspy.OutputField()
    species: Literal["setosa", "versicolor", "virginica"] = dspy.OutputField()


def chats(requests: int, demos: int) -> list[list[ChatMessage]]:
    """The messages that DSPy's JSONAdapter sends for Iris flowers."""
    data = load_iris()
    names = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    flowers = [
        dict(zip(names, map(float, data.data[place * 37 % 150]), strict=True))
        | {"species": str(data.target_names[data.target[place * 37 % 150]])}
        for place in range(requests + demos)
    ]
    shots = [
        {
            **flower,
            "reasoning": f"The petals are {flower['petal_length']} cm long and {flower['petal_width']} cm wide, "
            f"as those of {flower['species']} are.",
        }
        for flower in flowers[:demos]
    ]
    adapter = dspy.JSONAdapter()
    return [adapter.format(Iris, shots, {name: flower[name] for name in names}) for flower in flowers[demos:]]


def long_prompts(requests: int, own_tokens: int) -> list[list[int]]:
    """Random prompts with 100 tokens in common."""
    numbers = random.Random(0)
    shared, *own = ([numbers.randrange(200) for _ in range(size)] for size in (100, *[own_tokens] * requests))
    return [shared + tokens for tokens in own]


class Bench:
    """One model in memory, and the ways to answer with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.card = read_card(options.model)
        device = torch.device("cpu")
        self.model = load_model(self.card, device, pick_dtype(options.dtype, device))
        pack_linear_layers(self.model)
        self.renderer = PromptRenderer(self.card.tokenizer, self.card.eos_ids, None)
        adapters = AdapterBank("model", lambda: linear_shapes(self.model))
        adapters.attach(self.model)
        self._adapters = adapters
        self.rows_a_step: list[int] = []

    def _make_decoder(self) -> Decoder:
        """The engine's decoder, watched."""
        decoder = make_decoder(self.model, self._adapters, None)
        step = decoder.step

        def watched(rows: Sequence[BatchRow]) -> list[Decision]:
            decisions = step(rows)
            self.rows_a_step += [sum(bool(decision.token_ids) for decision in decisions)]
            return decisions

        decoder.step = watched  # type: ignore[method-assign]
        return decoder

    def engine(self, prompts: Prompts) -> Answers:
        """This library's, from nothing cached."""
        scheduler = Scheduler(
            self._make_decoder,
            eos_ids=frozenset(),
            max_batch_size=64,
            out_of_memory=lambda error: False,
            check_adapter=lambda name: None,
        )
        rows = [BatchRow(prompt, self.options.new_tokens) for prompt in prompts]
        jobs = [Job(row, TextStream(lambda ids: "")) for row in rows]
        for job in jobs:
            scheduler.submit(job)
        for job in jobs:
            job.future.result()
        scheduler.close()
        return [row.output_ids for row in rows]

    def one_by_one(self, prompts: Prompts) -> Answers:
        """`model.generate` for each prompt."""
        return [self._generate([prompt])[0] for prompt in prompts]

    def padded(self, prompts: Prompts) -> Answers:
        """`model.generate` for padded batches."""
        size = self.options.padded_batch
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [answer for batch in batches for answer in self._generate(batch)]

    def continuous(self, prompts: Prompts) -> Answers:
        """transformers' continuous batching (`generate_batch`)."""
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.options.new_tokens, eos_token_id=-1, pad_token_id=0
        )
        results = self.model.generate_batch(inputs=list(prompts), generation_config=config)
        return [list(results[key].generated_tokens) for key in sorted(results, key=lambda key: int(key.split("_")[-1]))]

    def llama_cpp(self, prompts: Prompts) -> Answers:
        """llama.cpp, one by one, with its own reuse of the prefix."""
        import llama_cpp

        context = max(map(len, prompts)) + self.options.new_tokens + 8
        llama = llama_cpp.Llama(
            str(self.options.gguf), n_ctx=context, n_threads=torch.get_num_threads(), verbose=False, logits_all=False
        )
        answers = []
        for prompt in prompts:
            stream = llama.generate(prompt, temp=0.0, top_k=1)
            answers.append([next(stream) for _ in range(self.options.new_tokens)])
        return answers

    def vllm(self, prompts: Prompts) -> Answers:
        """vLLM's server, from nothing cached."""
        with httpx.Client(base_url=self.options.vllm, timeout=None) as server:
            server.post("/reset_prefix_cache").raise_for_status()
            body = {
                "model": server.get("/v1/models").json()["data"][0]["id"],
                "prompt": list(prompts),
                "max_tokens": self.options.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = server.post("/v1/completions", json=body).raise_for_status().json()
        return [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

    def _generate(self, prompts: Prompts) -> Answers:
        longest = max(map(len, prompts))
        ids_B_T = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask_B_T = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self.model.generate(
            ids_B_T,
            attention_mask=mask_B_T,
            do_sample=False,
            max_new_tokens=self.options.new_tokens,
            min_new_tokens=self.options.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, longest:].tolist()


def timed(way: Way, prompts: Prompts, repeats: int, clock: Callable[[], float]) -> tuple[float, Answers]:
    """Median seconds, and the answers."""
    seconds = []
    answers: Answers = []
    for _ in range(repeats):
        start = clock()
        answers = way(prompts)
        seconds.append(clock() - start)
    return statistics.median(seconds), answers


def main() -> int:
    """Time the ways and print the ratios; fails where texts differ in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, help="file of the model for llama.cpp")
    parser.add_argument("--vllm", help="address of vLLM's server of the model")
    parser.add_argument("--dtype", default="float32")
    numbers = {"requests": 64, "demos": 8, "new-tokens": 64, "repeats": 3, "padded-batch": 16, "own-tokens": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--share", nargs="*", default=["one_by_one=8", "padded=16"], help="WAY=REQUESTS, then scaled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1: fair on a machine that others use")
    options = parser.parse_args()
    shares = dict(share.split("=") for share in options.share)
    if unknown := sorted(shares.keys() - {*WAYS}):
        parser.error(f"--share names {unknown}, the ways are {[*WAYS]}.")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    bench = Bench(options)
    if options.own_tokens:
        prompts = long_prompts(options.requests, options.own_tokens)
    else:
        prompts = [bench.renderer.prompt_tokens(chat) for chat in chats(options.requests, options.demos)]
    print(f"{len(prompts)} prompts of {len(prompts[0])} tokens, {options.new_tokens} new ones each, {options.dtype}")
    reference: Answers = []
    base = 0.0
    wrong = 0
    for name in options.ways:
        if name in OTHERS and getattr(options, OTHERS[name]) is None:
            print(f"{name:11} skipped: no --{OTHERS[name]}")
            continue
        part = prompts[: min(int(shares.get(name, len(prompts))), len(prompts))]
        before_bytes = psutil.Process().memory_info().rss
        seconds, answers = timed(getattr(bench, name), part, options.repeats, clock)
        seconds *= len(prompts) / len(part)
        reference, base = (reference, base) if reference else (answers, seconds)
        same = sum(a == b for a, b in zip(answers, reference, strict=False))
        wrong += name not in ("engine", *OTHERS) and same < len(part)
        text = f"same text {same}/{len(part)} (timed on {len(part)})"
        print(f"{name:11} {seconds:8.1f} s {seconds / base:6.1f}x   {text}", flush=True)
        if name == "engine" and options.own_tokens:
            rows = [count for count in bench.rows_a_step if count]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before_bytes / 2**30
            print(f"rows a step: {statistics.mean(rows):.1f}, {max(rows)} at most; {grown:.1f} GiB at the peak")
    return int(wrong > 0 and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())
