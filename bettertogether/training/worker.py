"""One process of a training: `accelerate launch ... -m bettertogether.training.worker FOLDER`.

In the folder are `spec.json`, {"model": folder or hub id, "rows": file, "validation_rows": file, "lora": {...},
"training": {...}, "folder": where the adapter goes, "start_from": adapter folder or null}, and the rows, Arrow files
of the fields of `TokenizedRow`. The processes write there `progress.jsonl` and `result.json`, each `process-N` with the
name of its machine, and `error-N.json` when it fails.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import BetterTogetherError
from ..files import atomic_write
from .arrow_rows import ArrowRows
from .config import LoRAConfig, TrainingConfig
from .precision import four_bit_model
from .progress import TrainingProgress
from .sharing import Sharing
from .trainer import TrainingResult, train_adapter


def run(work: Path) -> None:
    """Take part in the training that a folder describes."""
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    number = os.environ.get("RANK", "0")
    (work / f"process-{number}").write_text(socket.gethostname())
    try:
        sharing = Sharing.of_this_process()
        result = _train(work, sharing)
    except Exception as error:
        # The launcher's log ends with its own summary, so the reason is written where `launch` looks for it.
        own = isinstance(error, BetterTogetherError)
        values = {"error": type(error).__name__ if own else None, "host": socket.gethostname(), "time": time.time()}
        values["message"] = str(error) if own else traceback.format_exc()
        atomic_write(work / f"error-{number}.json", json.dumps(values))
        raise
    if sharing.is_main:
        atomic_write(work / "result.json", json.dumps(asdict(result) | {"folder": str(result.folder)}))
    sharing.accelerator.end_training()


def _train(work: Path, sharing: Sharing) -> TrainingResult:
    spec: dict[str, Any] = json.loads((work / "spec.json").read_text())
    training = TrainingConfig(**spec["training"])

    def report(line: TrainingProgress) -> None:
        with (work / "progress.jsonl").open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    return train_adapter(
        _base_model(spec["model"], training, sharing),
        ArrowRows(Path(spec["rows"])),
        validation_rows=ArrowRows(Path(spec["validation_rows"])),
        lora=LoRAConfig(**spec["lora"]),
        training=training,
        folder=Path(spec["folder"]),
        start_from=None if spec["start_from"] is None else Path(spec["start_from"]),
        on_progress=report,
    )


def _base_model(source: str, training: TrainingConfig, sharing: Sharing) -> PreTrainedModel:
    device = sharing.accelerator.device
    if training.quantize_base is not None and not sharing.sharded:
        return four_bit_model(source, device)
    half = device.type != "cpu" and training.dtype != "float32"
    dtype = torch.bfloat16 if half else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    return model if sharing.sharded else model.to(device)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
