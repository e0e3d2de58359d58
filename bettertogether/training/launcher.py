"""A training in processes of its own, on one machine or several, through `accelerate launch`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pydantic
import torch

from .. import errors
from ..errors import ConfigError, TrainingError
from ..files import atomic_write
from ..processes import WatchedProcess, last_lines
from .accelerate_file import AccelerateFile, read_accelerate_file
from .arrow_rows import arrow_file
from .config import LoRAConfig, TrainingConfig
from .machine import JOB, REFUSED
from .packing import TokenizedRow
from .progress import ProgressFunction, TrainingProgress
from .trainer import TrainingResult

POLL_S = 0.1
TOGETHER_S = 300.0
"""Time within which all machines have to come, after the first."""
_RESULT = pydantic.TypeAdapter(TrainingResult)


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
) -> TrainingResult:
    """`train_adapter` in the processes that `training` asks for, which share each step's rows.

    `model` is the base model's folder or hub id; each process loads it. Each gets a GPU of its own where there is
    CUDA (ConfigError when there are too few), else they share the CPU. With several machines, `folder` and the model
    are on a file system that all of them share. Progress comes back as it happens. An error of the library's own is
    raised here as in one process, a machine that can't take part is a ConfigError that names it; any other failure is
    a TrainingError with the end of the log.
    """
    file = read_accelerate_file(training)
    recipe = replace(training.recipe(), dtype="bfloat16") if file.bfloat16 else training.recipe()
    environment = _environment(file, bool(training.launch_command))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="launch-", dir=folder.absolute()) as name:
        work = Path(name)
        spec = {
            "model": str(model),
            "rows": str(arrow_file(rows, work / "rows.arrow")),
            "validation_rows": str(arrow_file(validation_rows, work / "validation_rows.arrow")),
            "lora": lora.to_dict(),
            "training": recipe.to_dict(),
            "folder": str(folder.absolute()),
            "start_from": None if start_from is None else str(start_from.absolute()),
        }
        atomic_write(work / "spec.json", json.dumps(spec))
        _write_job(work, file, environment, [Path(model), start_from])
        command = [*training.launch_command, sys.executable, "-m", f"{__package__}.machine", str(work)]
        process = WatchedProcess(command, work / "log", dict(os.environ) | environment)
        try:
            _follow(process, work, file.machines, on_progress)
        finally:
            process.stop()
        return result_of(work, process.exit_code, file.processes)


def _environment(file: AccelerateFile, elsewhere: bool) -> dict[str, str]:
    """Variables that the processes need. `elsewhere`: they may run on other machines than this."""
    on_cpu = file.on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu or not (elsewhere or torch.cuda.is_available()):
        threads = {} if elsewhere else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // file.processes))}
        return {"ACCELERATE_USE_CPU": "true"} | threads
    if not elsewhere and torch.cuda.device_count() < file.processes:
        raise ConfigError(
            f"num_processes={file.processes}, but there are {torch.cuda.device_count()} CUDA devices: give at most "
            "that many, or set ACCELERATE_USE_CPU=true in the environment to train on the CPU."
        )
    return {}


def _write_job(work: Path, file: AccelerateFile, environment: dict[str, str], needed: Sequence[Path | None]) -> None:
    atomic_write(work / "accelerate.json", file.text)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(work / "accelerate.json")]
    launch += ["--num_processes", str(file.processes), "--num_machines", str(file.machines)]
    if file.machines == 1 and file.main_port is None:
        launch += ["--main_process_port", "0"]
    job = {
        "machines": file.machines,
        "static": file.static,
        "address": file.main_address,
        "port": file.main_port,
        "paths": [str(path.absolute()) for path in needed if path is not None and path.exists()],
        "environment": environment,
        "launch": launch,
        "script": ["--module", f"{__package__}.worker", str(work)],
    }
    atomic_write(work / JOB, json.dumps(job))


def _follow(process: WatchedProcess, work: Path, machines: int, on_progress: ProgressFunction | None) -> None:
    """Pass progress lines on until the process ends. Raises ConfigError where a machine can't take part."""
    path = work / "progress.jsonl"
    path.touch()
    arrivals = _Arrivals(work, machines)
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
            arrivals.check()
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


class _Arrivals:
    """Whether all machines of a training have come."""

    def __init__(self, work: Path, machines: int) -> None:
        self._work, self._machines = work, machines
        self._first: float | None = None
        self._started = False

    def check(self) -> None:
        """Raise ConfigError where a machine can't take part, or doesn't come."""
        if self._started:
            return
        self._started = any(self._work.glob("process-*"))
        log = (self._work / "log").read_text(errors="replace")
        if REFUSED in log:
            raise ConfigError(log[log.index(REFUSED) :].splitlines()[0])
        came = sorted(path.read_text() for path in self._work.glob("machine-*"))
        if self._first is None and came:
            self._first = time.monotonic()
        if self._first is None or len(came) == self._machines or time.monotonic() < self._first + TOGETHER_S:
            return
        raise ConfigError(
            f"Of {self._machines} machines only {', '.join(came)} came within {TOGETHER_S:.0f} s. The launch command "
            f"has to start its command once on each. The end of its log:\n{last_lines(log)}"
        )


def result_of(work: Path, code: int | None, processes: int) -> TrainingResult:
    """What processes that ended with an exit code left in their folder. Raises the error they met, TrainingError where
    it is none of ours."""
    path = work / "result.json"
    failures = sorted(map(_failure, work.glob("error-*.json")), key=lambda failure: failure["time"])
    for failure in failures:
        if failure["error"]:
            raise getattr(errors, failure["error"])(failure["message"])
    if code != 0 or failures or not path.exists():
        raise TrainingError(
            f"Training in {processes} processes ended with code {code}. {_what_happened(work, failures)}\n"
            "The checkpoint of the last full epoch is kept: the same call goes on from there, also where the file that "
            "accelerate_config names has fewer machines by then. num_processes=1 trains in this process."
        )
    return _RESULT.validate_json(path.read_bytes())


def _failure(path: Path) -> dict[str, Any]:
    failure: dict[str, Any] = json.loads(path.read_bytes())
    return failure


def _what_happened(work: Path, failures: Sequence[dict[str, Any]]) -> str:
    if not failures:
        return f"The end of its log:\n{last_lines((work / 'log').read_text(errors='replace'))}"
    hosts = {path.read_text() for path in work.glob("process-*")}
    gone = sorted(hosts - {failure["host"] for failure in failures})
    first = failures[0]
    if gone:
        last = first["message"].strip().splitlines()[-1]
        lost = f"The machine {', '.join(gone)} is gone: its processes ended without a word."
        return f"{lost} {first['host']} met:\n{last}"
    return f"What {first['host']} met:\n{last_lines(first['message'])}"
