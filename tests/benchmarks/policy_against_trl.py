"""Learning from rewards through `local_lm`'s engine, against trl's GRPOTrainer: same model, prompts, group size, length
of the answers and update, on a task whose optimum is known.

    pip install trl
    python tests/benchmarks/policy_against_trl.py MODEL_FOLDER [--steps 20] [--examples 4] [--group 8] [--tokens 16]
        [--shared 60] [--rate 3e-4] [--seeds 0] [--sides ours trl]

The reward of an answer is the share of its characters that are digits: 1.0 is the best there is. Prompts are chats
whose system message, `--shared` short sentences, is the same for all. Each step samples `--group` answers to each of
`--examples` prompts at temperature 1 and makes one update of a LoRA adapter (all linear layers, rank 16) with AdamW at
a constant rate: advantages without division by the deviation, one divisor for all tokens (trl's "dapo"), no reference.
Both sides run in float32 on the processor, each in a process of its own. Prints each side's mean reward in quarters of
the steps, seconds of the steps by the clock and by the processor (on a machine that does other work, the second count),
and peak memory, then the ratios (trl / ours).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from sides import Figures, measure, ratios, report

BETA_2 = 0.95
SIDES = ("ours", "trl")


def prompts(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    """One chat for each example of each step."""
    rules = " ".join(f"Rule {number}: be clear and short." for number in range(options.shared))
    return [
        [{"role": "system", "content": rules}, {"role": "user", "content": f"Tell me something about item {number}."}]
        for number in range(options.steps * options.examples)
    ]


def reward(text: str) -> float:
    """The share of digits."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of this process's threads."""
    return time.perf_counter(), time.process_time()


def train_ours(options: argparse.Namespace) -> tuple[float, float, list[float]]:
    """Seconds by both clocks, and the mean reward of each step."""
    from dspy.lm15 import Config, Message, Request

    from bettertogether.engines import TransformersEngine
    from bettertogether.engines.answers import SampledAnswer
    from bettertogether.engines.protocol import RewardedAnswer
    from bettertogether.training.config import LoRAConfig, PolicyConfig, TrainingConfig

    engine = TransformersEngine(options.model, dtype="float32")
    training = TrainingConfig(
        learning_rate=options.rate, warmup_ratio=0.0, scheduler="constant", dtype="float32", seed=options.seed
    )
    policy, chats, means = PolicyConfig(steps=options.steps), prompts(options), list[float]()

    def answer(model: str, chat: Sequence[dict[str, str]], seed: int) -> tuple[SampledAnswer, float]:
        config = Config(max_tokens=options.tokens, temperature=1.0, seed=seed, store=True)
        request = Request(model, (Message.user(chat[1]["content"]),), system=chat[0]["content"], config=config)
        response = engine.complete(request)
        return SampledAnswer(**response.provider_data or {}), reward(response.text or "")

    answer(f"local/{engine.base_name}", chats[0], 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.examples * options.group) as pool,
        engine.policy_session(policy=policy, lora=LoRAConfig(), training=training, folder=Path(folder)) as session,
    ):
        started, began = clocks()
        for step in range(options.steps):
            numbers = range(step * options.examples, (step + 1) * options.examples)
            asked = [
                (session.model, chats[number], options.group * (options.seed * len(chats) + number) + draw)
                for number in numbers
                for draw in range(options.group)
            ]
            answers = list(pool.map(lambda each: answer(*each), asked))
            groups = [answers[start : start + options.group] for start in range(0, len(answers), options.group)]
            rewarded = []
            for group in groups:
                mean = fmean(earned for _, earned in group)
                rewarded += [RewardedAnswer(sampled, earned - mean) for sampled, earned in group]
            means.append(fmean(earned for _, earned in answers))
            session.update(rewarded)
        ended, done = clocks()
        return ended - started, done - began, means


def train_trl(options: argparse.Namespace) -> tuple[float, float, list[float]]:
    """The same with trl."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [reward(turns[0]["content"]) for turns in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=options.steps,
            seed=options.seed,
            per_device_train_batch_size=options.examples * options.group,
            gradient_accumulation_steps=1,
            num_generations=options.group,
            max_completion_length=options.tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="none",
            learning_rate=options.rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            adam_beta2=BETA_2,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": chat} for chat in prompts(options)]),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        started, began = clocks()
        trainer.train()
        ended, done = clocks()
        return ended - started, done - began, [line["reward"] for line in trainer.state.log_history if "reward" in line]


def run_side(side: str, seed: int, arguments: Sequence[str]) -> Figures:
    """Run one side in a process of its own, and print its line."""
    figures = measure(__file__, [*arguments, "--side", side, "--seed", str(seed)])
    means = figures["rewards"]
    size = max(1, len(means) // 4)
    quarters = ", ".join(f"{fmean(means[start : start + size]):.3f}" for start in range(0, 4 * size, size))
    print(
        f"  {side:5} seed {seed} {figures['seconds']:7.1f} s, of the processor {figures['cpu_s']:7.1f} s  "
        f"peak {figures['peak_gib']:5.2f} GiB  reward {quarters}",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=4, help="prompts in a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each of them")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer at most")
    parser.add_argument("--shared", type=int, default=60, help="sentences that all prompts begin with")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        seconds, cpu_s, means = (train_ours if options.side == "ours" else train_trl)(options)
        report({"seconds": seconds, "cpu_s": cpu_s, "rewards": means})
        return
    if "trl" in options.sides and importlib.util.find_spec("trl") is None:
        raise SystemExit("trl is not installed: pip install trl, or leave it out: --sides ours")
    names = ("steps", "examples", "group", "tokens", "shared", "rate")
    arguments = [options.model, *(text for name in names for text in (f"--{name}", str(getattr(options, name))))]
    figures = {side: [run_side(side, seed, arguments) for seed in options.seeds] for side in options.sides}
    if len(figures) == len(SIDES):
        told = {"seconds": "time", "cpu_s": "processor time", "peak_gib": "memory"}
        print(f"  trl / ours  {ratios(figures['ours'], figures['trl'], **told)}")


if __name__ == "__main__":
    main()
