"""LoRA training through `local_lm`'s engine and by the bare trainer, against trl's SFTTrainer: same rows, same order,
same adapter, one epoch of 64 rows in batches of 8.

    pip install trl
    python tests/benchmarks/training.py MODEL_FOLDER [--rows 64] [--demos 0 4] [--dtypes float32 bfloat16]
        [--repeats 3] [--their-batch 8] [--sides engine bare trl]

"engine" is what a user of `local_lm` gets (`engine.finetune` on the model that answers, tokenizing included); "bare"
is the trainer on a model of its own. The rows are an Iris program's (chain of thought, ChatAdapter) with 0 and with 4
demos in the prompt. All sides train the same LoRA (all linear layers, rank 16, equal initial weights) with AdamW at a
constant rate on the same batches; trl gets the tokens ready-made and its loss is on the completion too. Each side
runs in a process of its own. Prints seconds (wall and processor), peak memory and the mean loss of each side, then
the ratios of the medians (each of the others / engine).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import dspy
from generation import Iris
from sides import Figures, measure, ratios, report
from sklearn.datasets import load_iris

from bettertogether import local_lm
from bettertogether.engines import TrainingRow, TransformersEngine
from bettertogether.training.config import LoRAConfig, TrainingConfig
from bettertogether.training.packing import TokenizedRow, epoch_batches

Dtype = Literal["float32", "bfloat16"]
BATCH = 8
RATE = 2e-4
SIDES = ("engine", "bare", "trl")


def iris_rows(number: int, demos: int) -> list[TrainingRow]:
    """Rows of the Iris program."""
    data, adapter = load_iris(), dspy.ChatAdapter()
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    examples = []
    # 7 steps through the 150 flowers in an order that mixes the species.
    for index in (7 * step % 150 for step in range(number + demos)):
        values = dict(zip(names, map(float, data.data[index]), strict=True))
        species = str(data.target_names[data.target[index]])
        reasoning = f"The petal is {values['petal_length']} cm long and {values['petal_width']} cm wide: {species}."
        examples.append((values, {"reasoning": reasoning, "species": species}))
    shown = [dspy.Example(**inputs, **outputs) for inputs, outputs in examples[:demos]]
    rows = []
    for inputs, outputs in examples[demos:]:
        messages = adapter.format(Iris, shown, inputs)
        completion = adapter.format_assistant_message_content(Iris, outputs)
        rows.append(TrainingRow(tuple(messages), completion))
    return rows


def tokenized(model_folder: str, rows: Sequence[TrainingRow]) -> list[TokenizedRow]:
    """The rows as the engine's tokens."""
    engine = TransformersEngine(model_folder)
    return [TokenizedRow(engine.prompt_tokens(row.messages), engine.completion_tokens(row.completion)) for row in rows]


def training_config(dtype: Dtype, epochs: int = 1) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=RATE, epochs=epochs, batch_size=BATCH, scheduler="constant", warmup_ratio=0.0, dtype=dtype
    )


def train_in_engine(model_folder: str, rows: Sequence[TrainingRow], dtype: Dtype) -> tuple[float, list[float]]:
    """Seconds, and the loss of each step, on the engine of a `local_lm` that has answered."""
    lm = local_lm(model_folder, max_tokens=1, cache=False)
    lm("Hello")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = lm.engine.finetune(rows, training=training_config(dtype), lora=LoRAConfig(), folder=Path(folder))
        return time.perf_counter() - started, [line.loss for line in result.history if line.loss is not None]


def train_bare(model_folder: str, rows: Sequence[TokenizedRow], dtype: Dtype) -> tuple[float, list[float]]:
    """The same by the trainer alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from bettertogether.training.trainer import train_adapter

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = train_adapter(model, rows, training=training_config(dtype), lora=LoRAConfig(), folder=Path(folder))
        return time.perf_counter() - started, [line.loss for line in result.history if line.loss is not None]


def train_trl(
    model_folder: str, rows: Sequence[TokenizedRow], dtype: Dtype, micro_batch: int
) -> tuple[float, list[float]]:
    """The same with trl, in forward passes of `micro_batch` rows."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class OrderedTrainer(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **options: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoRAConfig()
    model = get_peft_model(
        base, LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    )
    order = [index for batch in epoch_batches(len(rows), BATCH, seed=0, epoch=1) for index in batch]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for row in (rows[index] for index in order):
        columns["input_ids"].append(row.prompt_ids + row.completion_ids)
        columns["completion_mask"].append([0] * len(row.prompt_ids) + [1] * len(row.completion_ids))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=BATCH // micro_batch,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=False,
        )
        trainer = OrderedTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
        )
        started = time.perf_counter()
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return time.perf_counter() - started, losses


def run_one(side: str, model_folder: str, rows_file: Path, dtype: Dtype, micro_batch: int) -> None:
    """Train one side and report its figures."""
    rows = [TrainingRow(**line) for line in json.loads(rows_file.read_text())]
    tokens = tokenized(model_folder, rows)
    before = resource.getrusage(resource.RUSAGE_SELF)
    if side == "engine":
        seconds, losses = train_in_engine(model_folder, rows, dtype)
    elif side == "bare":
        seconds, losses = train_bare(model_folder, tokens, dtype)
    else:
        seconds, losses = train_trl(model_folder, tokens, dtype, micro_batch)
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report({"seconds": seconds, "processor": processor, "losses": losses})


def run_side(side: str, arguments: Sequence[str]) -> Figures:
    """Run one side in a process of its own, and print its line."""
    figures = measure(__file__, [*arguments, "--side", side])
    losses = figures["losses"]
    print(
        f"  {side:6} {figures['seconds']:7.1f} s  processor {figures['processor']:7.1f} s  "
        f"peak {figures['peak_gib']:5.2f} GiB  loss {sum(losses) / len(losses):.4f} (first {losses[0]:.4f}, "
        f"last {losses[-1]:.4f})",
        flush=True,
    )
    return figures


def compare(options: argparse.Namespace, demos: int, dtype: Dtype) -> None:
    """Run the sides in turn, several times, and print the ratios of the medians."""
    rows = iris_rows(options.rows, demos)
    tokens = sum(map(len, tokenized(options.model, rows))) / len(rows)
    print(f"{options.rows} rows of {tokens:.0f} tokens, {demos} demos, {dtype}")
    figures: dict[str, list[Figures]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps([asdict(row) for row in rows]))
        arguments = [options.model, "--file", str(file), "--dtypes", dtype, "--their-batch", str(options.their_batch)]
        for _ in range(options.repeats):
            for side, found in figures.items():
                found.append(run_side(side, arguments))
    first, *others = figures
    names = {"seconds": "time", "processor": "processor time", "peak_gib": "memory"}
    for side in others:
        losses = zip(figures[first][0]["losses"], figures[side][0]["losses"], strict=True)
        gap = max(abs(a - b) for a, b in losses)
        print(
            f"  {side} / {first}  {ratios(figures[first], figures[side], **names)}; "
            f"largest difference of a step's loss {gap:.5f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--demos", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--their-batch",
        type=int,
        default=BATCH,
        choices=[1, 2, 4, 8],
        help="rows in a forward pass of trl's, which accumulates gradients over them up to 8 (memory)",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_one(options.side, options.model, options.file, options.dtypes[0], options.their_batch)
        return
    if "trl" in options.sides and importlib.util.find_spec("trl") is None:
        raise SystemExit("trl is not installed: pip install trl, or leave it out: --sides engine bare")
    for dtype in options.dtypes:
        for demos in options.demos:
            compare(options, demos, dtype)


if __name__ == "__main__":
    main()
