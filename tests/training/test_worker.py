"""Training in two processes gives the result of one, and its errors are ours."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import random_rows, tiny_model

from bettertogether.errors import ConfigError, TrainingError
from bettertogether.training import TrainingConfig, launcher, worker
from bettertogether.training.launcher import launch, result_of
from bettertogether.training.machine import JOB
from bettertogether.training.packing import TokenizedRow
from bettertogether.training.progress import TrainingProgress
from bettertogether.training.trainer import train_adapter


def marked(rows: list[TokenizedRow]) -> list[TokenizedRow]:
    """Rows whose first token alone is free, and is field a; with two forms."""
    return [
        replace(
            row,
            forms=[[*range(3, 19), *row.prompt_ids], [*range(30, 46), *row.prompt_ids]],
            forced=[False, *[True] * (len(row.completion_ids) - 1)],
            fields=["a", *[""] * (len(row.completion_ids) - 1)],
        )
        for row in rows
    ]


ROWS = marked(random_rows(10, shared=20))
HELD_OUT = marked(random_rows(3, shared=20))


NOTE = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1], os.environ["RANK"] + ".environment").write_text(json.dumps(dict(os.environ)))
"""


class Forked:
    """The processes of a job as forks of this one, which has made their imports, most of the work of a short training.
    Accelerate itself starts, on what the job tells it, two scripts that note the environment they are given."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        work = Path(command[-1])
        (work / "note.py").write_text(NOTE)
        started = [sys.executable, *json.loads((work / JOB).read_text())["launch"], str(work / "note.py"), str(work)]
        with log.open("w") as said:
            subprocess.run(started, env=environment, stdout=said, stderr=said, check=True)
        given = [json.loads(path.read_text()) for path in work.glob("*.environment")]
        context = multiprocessing.get_context("fork")
        self._processes = [context.Process(target=self._work, args=(work, each)) for each in given]
        for process in self._processes:
            process.start()

    @staticmethod
    def _work(work: Path, environment: dict[str, str]) -> None:
        # The store of the processes was that of their launcher, which is gone.
        os.environ.update(environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
        AcceleratorState._reset_state(reset_partial_state=True)
        worker.run(work)

    @property
    def exit_code(self) -> int | None:
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()


def test_two_processes_give_the_result_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "WatchedProcess", Forked)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    # An odd batch, so that the processes have different numbers of rows and of completion tokens.
    options: dict[str, Any] = {"learning_rate": 1e-2, "dtype": "float32", "batch_size": 7, "epochs": 2}
    lines: list[TrainingProgress] = []
    one = train_adapter(
        model, ROWS, validation_rows=HELD_OUT, training=TrainingConfig(**options), folder=tmp_path / "one"
    )
    two = launch(
        tmp_path / "model",
        ROWS,
        validation_rows=HELD_OUT,
        training=TrainingConfig(num_processes=2, **options),
        folder=tmp_path / "two",
        on_progress=lines.append,
    )
    assert tuple(lines) == two.history
    losses = [[line.loss for line in result.history if line.loss is not None] for result in (one, two)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-4)
    assert one.best is not None
    assert two.best is not None
    assert two.best.all_tokens == pytest.approx(one.best.all_tokens, rel=1e-4)
    assert two.best.fields == {"a": pytest.approx(one.best.fields["a"], rel=1e-4)}
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-3
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint",
    ]


def fail(work: Path, number: int = 0, error: str | None = None, message: str = "", host: str = "node0") -> None:
    """What a process that fails leaves."""
    values = {"error": error, "message": message, "host": host, "time": 100.0 + number}
    (work / f"error-{number}.json").write_text(json.dumps(values))


def test_an_error_of_the_librarys_own_is_raised_as_in_one_process(tmp_path: Path) -> None:
    fail(tmp_path, error="ConfigError", message="what came")
    with pytest.raises(ConfigError, match="what came"):
        result_of(tmp_path, 1, processes=2)


def test_any_other_failure_is_a_training_error_with_the_traceback(tmp_path: Path) -> None:
    fail(tmp_path, message="Traceback ...\nOSError: no such model")
    with pytest.raises(TrainingError, match=r"2 processes ended with code 1(.|\n)*OSError: no such model"):
        result_of(tmp_path, 1, processes=2)


def test_a_process_that_was_killed_is_a_training_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(100)))
    with pytest.raises(TrainingError, match="line 99") as error:
        result_of(tmp_path, -9, processes=2)
    assert "line 69" not in str(error.value)


def test_a_machine_that_ended_without_a_word_is_named_beside_what_the_others_met(tmp_path: Path) -> None:
    for number, host in enumerate(("node0", "node1")):
        (tmp_path / f"process-{number}").write_text(host)
    fail(tmp_path, message="RuntimeError: Connection closed by peer")
    with pytest.raises(TrainingError, match=r"machine node1 is gone: .* node0 met:\nRuntimeError: Connection closed"):
        result_of(tmp_path, 1, processes=2)


def test_of_several_failures_the_librarys_own_is_the_reason(tmp_path: Path) -> None:
    fail(tmp_path, 0, message="RuntimeError: Connection closed by peer")
    fail(tmp_path, 1, error="ConfigError", message="what came")
    with pytest.raises(ConfigError, match="what came"):
        result_of(tmp_path, 1, processes=2)


FSDP_ON_TWO_MACHINES = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_activation_checkpointing: true
  fsdp_cpu_ram_efficient_loading: true
use_cpu: true
num_machines: 2
num_processes: 2
main_process_ip: 127.0.0.1
main_process_port: {port}
same_network: true
"""


def test_two_machines_that_share_the_weights_give_the_result_of_one_process(tmp_path: Path) -> None:
    """The machines are two launchers on this one. One row a step: the process without a row goes along."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    (tmp_path / "fsdp.yaml").write_text(FSDP_ON_TWO_MACHINES.format(port=port))
    start = 'NODE_RANK=0 "$@" & first=$!; NODE_RANK=1 "$@" & wait $! && wait $first'
    options: dict[str, Any] = {"learning_rate": 1e-2, "dtype": "float32", "batch_size": 3, "epochs": 1}
    training = TrainingConfig(
        accelerate_config=tmp_path / "fsdp.yaml", launch_command=("bash", "-c", start, "bash"), **options
    )
    rows: dict[str, Any] = {"rows": ROWS[:4], "validation_rows": HELD_OUT}
    one = train_adapter(model, **rows, training=TrainingConfig(**options), folder=tmp_path / "one")
    two = launch(tmp_path / "model", **rows, training=training, folder=tmp_path / "two")
    losses = [[line.loss or line.validation_loss for line in result.history] for result in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "two")
    learned = get_peft_model_state_dict(plain)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert learned.keys() == expected.keys()
    assert max(float((learned[key] - expected[key]).abs().max()) for key in expected) < 1e-3
