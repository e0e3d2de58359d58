"""A machine that can't take part in a training says so, by its name and with the cure, before anything is loaded."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny import random_rows

from bettertogether.errors import ConfigError
from bettertogether.training import TrainingConfig, launcher, machine
from bettertogether.training.launcher import launch

HERE = socket.gethostname()
JOB: dict[str, Any] = {"machines": 2, "static": True, "address": "node0", "port": 29500, "paths": []}


@pytest.fixture(autouse=True)
def _no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.NUMBERS:
        monkeypatch.delenv(name, raising=False)


def refusal(folder: Path, **job: Any) -> str:
    """What the machine says when it is started for a job."""
    (folder / machine.JOB).write_text(json.dumps(JOB | job))
    with pytest.raises(SystemExit) as ended:
        machine.main(folder)
    return str(ended.value).removeprefix(f"{machine.REFUSED}{HERE} ")


def test_a_job_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"{HERE} does not see the job's folder .*/gone \(No such file"):
        machine.main(tmp_path / "gone")


def test_a_model_that_is_not_shared_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, paths=["/models/m"]).startswith("does not see /models/m. Put it on a file system")


def test_a_machine_without_a_number_is_told_where_to_get_one(tmp_path: Path) -> None:
    assert "set NODE_RANK" in refusal(tmp_path)


def test_a_number_that_there_are_not_enough_machines_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert refusal(tmp_path).startswith("is number 2 by SLURM_NODEID, but there are 2 machines")


def test_two_machines_of_one_number_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "0")
    (tmp_path / "machine-0").write_text("node7")
    assert refusal(tmp_path).startswith("is number 0, and so is node7.")


def test_a_main_machine_that_is_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any) -> socket.socket:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert refusal(tmp_path).startswith("can't reach the main machine at node0:29500 (No route to host).")


def test_a_machine_becomes_the_launcher_of_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setattr(machine, "check_reachable", lambda *address: None)
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command[1:]))
    job = JOB | {"environment": {}, "launch": ["-m", "accelerate"], "script": ["--module", "worker"]}
    (tmp_path / machine.JOB).write_text(json.dumps(job))
    machine.main(tmp_path)
    assert commands == [["-m", "accelerate", "--machine_rank", "1", "--module", "worker"]]
    assert (tmp_path / "machine-1").read_text() == HERE


def test_a_machine_that_refuses_ends_the_training_with_its_words(tmp_path: Path) -> None:
    other_host = 'for last; do :; done; "${@:1:$#-1}" "$last/elsewhere"; sleep 600'
    training = TrainingConfig(launch_command=("bash", "-c", other_host, "bash"))
    with pytest.raises(ConfigError, match=f"{HERE} does not see the job's folder {tmp_path}/launch-.*/elsewhere"):
        launch("model", random_rows(2, shared=5), training=training, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_machines_that_do_not_all_come_end_the_training_with_the_names_of_those_that_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hosts.yaml"
    file.write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 2\n"
        "main_process_ip: node0\nmain_process_port: 29500\n"
    )
    only_one = 'for last; do :; done; echo -n node0 > "$last/machine-0"; sleep 600'
    training = TrainingConfig(accelerate_config=file, launch_command=("bash", "-c", only_one, "bash"))
    monkeypatch.setattr(launcher, "TOGETHER_S", 0.0)
    with pytest.raises(ConfigError, match="Of 2 machines only node0 came"):
        launch("model", random_rows(2, shared=5), training=training, folder=tmp_path / "job")
