"""One training in processes of its own: `accelerate launch ... -m bettertogether.training.worker spec.json`.

The spec is JSON: {"model": folder or hub id, "rows": file, "validation_rows": file, "lora": {...}, "training": {...},
"folder": where the adapter goes, "start_from": adapter folder or null, "progress": file, "result": file}. Rows are
JSON lines of the fields of `TokenizedRow`; progress and result are written as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from .. import errors
from ..errors import BetterTogetherError, ConfigError, TrainingError
from ..files import atomic_write
from ..processes import WatchedProcess, last_lines
from .config import LoRAConfig, TrainingConfig
from .held_out import HeldOutLosses
from .packing import TokenizedRow
from .progress import ProgressFunction, TrainingProgress
from .trainer import TrainedAdapter, train_adapter

POLL_S = 0.1


def launch(
    model: str | Path,
    rows: Sequence[TokenizedRow],
    *,
    validation_rows: Sequence[TokenizedRow] = (),
    lora: LoRAConfig = LoRAConfig(),
    training: TrainingConfig = TrainingConfig(),
    folder: Path,
    start_from: Path | None = None,
    on_progress: ProgressFunction | None = None,
) -> TrainedAdapter:
    """`train_adapter` in `training.num_processes` processes, which share each step's rows.

    `model` is the base model's folder or hub id; each process loads it. Each gets a GPU of its own where there is
    CUDA (ConfigError when there are too few), else they share the CPU. Progress comes back as it happens. An error of
    the library's own is raised here as in one process; any other failure is a TrainingError with the end of the log.
    """
    environment = _environment(training.num_processes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="launch-", dir=folder) as name:
        work = Path(name)
        spec = {
            "model": str(model),
            "rows": _write_rows(work / "rows.jsonl", rows),
            "validation_rows": _write_rows(work / "validation_rows.jsonl", validation_rows),
            "lora": lora.to_dict(),
            "training": training.to_dict(),
            "folder": str(folder),
            "start_from": None if start_from is None else str(start_from),
            "progress": str(work / "progress.jsonl"),
            "result": str(work / "result.json"),
        }
        atomic_write(work / "spec.json", json.dumps(spec))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--module"]
        command += ["--num_processes", str(training.num_processes), "--num_machines", "1", "--machine_rank", "0"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command += [__name__, str(work / "spec.json")]
        process = WatchedProcess(command, work / "log", environment)
        try:
            _follow(process, work / "progress.jsonl", on_progress)
        finally:
            process.stop()
        return result_of(work, process.exit_code, training.num_processes)


def _environment(processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    if torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        if torch.cuda.device_count() < processes:
            raise ConfigError(
                f"num_processes={processes}, but there are {torch.cuda.device_count()} CUDA devices: give at most "
                "that many, or set ACCELERATE_USE_CPU=true in the environment to train on the CPU."
            )
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    return environment


def _follow(process: WatchedProcess, path: Path, on_progress: ProgressFunction | None) -> None:
    """Pass progress lines on until the process ends."""
    path.touch()
    with path.open() as file:
        lines = _whole_lines(file)
        running = True
        while running:
            # Asked before reading, so that lines written just before the end are read as well.
            running = process.exit_code is None
            for line in lines:
                if line is None:
                    break
                if on_progress is not None:
                    on_progress(TrainingProgress(**json.loads(line)))
            if running:
                time.sleep(POLL_S)


def _whole_lines(file: IO[str]) -> Iterator[str | None]:
    """Lines of a file that is still being written; None whenever there is no whole one yet."""
    part = ""
    while True:
        part += file.readline()
        if part.endswith("\n"):
            yield part
            part = ""
        else:
            yield None


def result_of(work: Path, code: int | None, processes: int) -> TrainedAdapter:
    """What processes that ended with an exit code left in their folder. Raises the error they met, TrainingError where
    it is none of ours."""
    path = work / "result.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if values.get("error"):
        raise getattr(errors, values["error"])(values["message"])
    if code != 0 or "message" in values:
        log = values.get("message") or (work / "log").read_text(errors="replace")
        raise TrainingError(
            f"Training in {processes} processes ended with code {code}. The end of its log:\n{last_lines(log)}\n"
            "The checkpoint of the last full epoch is kept: the same call goes on from there. num_processes=1 "
            "trains in this process."
        )
    history = tuple(TrainingProgress(**line) for line in values.pop("history"))
    for name in ("base", "best"):
        values[name] = values[name] and HeldOutLosses(**values[name])
    return TrainedAdapter(folder=Path(values.pop("folder")), history=history, **values)


def _write_rows(path: Path, rows: Sequence[TokenizedRow]) -> str:
    atomic_write(path, "".join(json.dumps(vars(row)) + "\n" for row in rows))
    return str(path)


def _read_rows(path: str) -> list[TokenizedRow]:
    with open(path) as file:
        return [TokenizedRow(**json.loads(line)) for line in file]


def run(spec_file: Path) -> None:
    """Run the training that a spec describes, as one of the processes of `accelerate launch` or alone."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    spec = json.loads(spec_file.read_text())
    training = TrainingConfig(**spec["training"])
    accelerator = Accelerator()
    half = accelerator.device.type != "cpu" and training.dtype != "float32"
    dtype = torch.bfloat16 if half else torch.float32

    def report(line: TrainingProgress) -> None:
        with open(spec["progress"], "a") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    try:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, trust_remote_code=False)
        model = model.to(accelerator.device)
        result = train_adapter(
            model,
            _read_rows(spec["rows"]),
            validation_rows=_read_rows(spec["validation_rows"]),
            lora=LoRAConfig(**spec["lora"]),
            training=training,
            folder=Path(spec["folder"]),
            start_from=None if spec["start_from"] is None else Path(spec["start_from"]),
            on_progress=report,
        )
    except Exception as error:
        # The launcher's log ends with its own summary, so the reason is written where `launch` looks for it.
        if accelerator.is_main_process:
            own = isinstance(error, BetterTogetherError)
            values = {"error": type(error).__name__ if own else None}
            values["message"] = str(error) if own else traceback.format_exc()
            atomic_write(spec["result"], json.dumps(values))
        raise
    if accelerator.is_main_process:
        atomic_write(spec["result"], json.dumps(asdict(result) | {"folder": str(result.folder)}))
    accelerator.end_training()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
