"""The user's configuration of accelerate is read where it is named, and what training can't do with it said there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bettertogether.errors import ConfigError
from bettertogether.training import TrainingConfig
from bettertogether.training.accelerate_file import read_accelerate_file

PLAIN = "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
FSDP = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config:\n  fsdp_version: 2\n"
TWO_MACHINES = PLAIN + "num_machines: 2\nmain_process_ip: node0\nmain_process_port: 29500\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  zero_stage: {}\n"
SLURM = ("srun", "--nodes=2")


def training(folder: Path, text: str, **options: Any) -> TrainingConfig:
    path = folder / "accelerate.yaml"
    path.write_text(text)
    return TrainingConfig(accelerate_config=path, **options)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("distributed_type: [", {}, "can't be read"),
        ("just words", {}, "can't be read"),
        ("num_processes: 2", {}, "`distributed_type` must be specified"),
        (PLAIN + "colour: red\n", {}, r"unknown keys \(\['colour'\]\)"),
        ("compute_environment: AMAZON_SAGEMAKER\n" + PLAIN, {}, "can't be read"),
        ("distributed_type: MEGATRON_LM\n", {}, "distributed_type: MEGATRON_LM"),
        ("distributed_type: MULTI_XPU\n", {}, "Give one of NO, MULTI_GPU, MULTI_CPU, or FSDP"),
        ("distributed_type: FSDP\n", {}, "Say fsdp_version: 2"),
        (FSDP + "  fsdp_offload_params: true\n", {}, "fsdp_offload_params: false"),
        (PLAIN + "mixed_precision: fp16\n", {}, "mixed_precision: fp16"),
        (PLAIN + "mixed_precision: bf16\n", {"dtype": "float32"}, "mixed_precision: bf16"),
        (PLAIN + "dynamo_config:\n  dynamo_backend: INDUCTOR\n", {}, "dynamo_backend: no"),
        (FSDP + "parallelism_config:\n  parallelism_config_tp_size: 2\n", {}, "'parallelism_config_tp_size': 2"),
        (PLAIN, {"num_processes": 4}, "num_processes=4, but .* says num_processes: 2"),
        ("distributed_type: 'NO'\nnum_processes: 2\n", {}, "Say MULTI_GPU or MULTI_CPU"),
        (TWO_MACHINES, {}, "nothing starts the others. Give"),
        (TWO_MACHINES.replace("num_processes: 2", "num_processes: 3"), {"launch_command": SLURM}, "as many to each"),
        (ZERO.format(3) + "  offload_param_device: cpu\n", {}, "offload_param on cpu"),
        (ZERO.format(3) + "  deepspeed_config_file: nowhere.json\n", {}, r"nowhere\.json, which can't be read"),
        (PLAIN + "num_machines: 2\n", {"launch_command": SLURM}, "main_process_ip and main_process_port"),
    ],
)
def test_a_configuration_that_can_not_be_had_is_an_error_at_once(
    tmp_path: Path, text: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        training(tmp_path, text, **options)
    assert "accelerate.yaml" in str(error.value)


def test_a_file_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' is not there"):
        TrainingConfig(accelerate_config=tmp_path / "nowhere.yaml")


def test_the_file_says_how_many_processes_and_machines_there_are(tmp_path: Path) -> None:
    file = read_accelerate_file(training(tmp_path, TWO_MACHINES, launch_command=list(SLURM)))
    assert (file.processes, file.machines, file.main_address, file.main_port) == (2, 2, "node0", 29500)


def test_a_file_without_a_number_of_processes_leaves_it_to_the_training(tmp_path: Path) -> None:
    text = PLAIN.replace("num_processes: 2\n", "")
    assert read_accelerate_file(training(tmp_path, text, num_processes=3)).processes == 3


def test_where_a_training_runs_makes_it_no_other_training(tmp_path: Path) -> None:
    assert training(tmp_path, TWO_MACHINES, launch_command=SLURM, seed=3).recipe() == TrainingConfig(seed=3)


@pytest.mark.parametrize(("stage", "kind"), [(1, "MULTI_GPU"), (2, "MULTI_GPU"), (3, "FSDP")])
def test_zero_shards_the_model_in_its_third_stage_alone(tmp_path: Path, stage: int, kind: str) -> None:
    values = json.loads(read_accelerate_file(training(tmp_path, ZERO.format(stage))).text)
    assert (values["distributed_type"], values.get("fsdp_config", {}).get("fsdp_version")) == (
        kind,
        2 if stage == 3 else None,
    )
    assert "deepspeed_config" not in values


def test_a_deepspeed_file_of_its_own_says_the_stage_and_the_precision(tmp_path: Path) -> None:
    own = tmp_path / "zero.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    file = read_accelerate_file(training(tmp_path, ZERO.format(1) + f"  deepspeed_config_file: {own}\n"))
    assert file.bfloat16
    assert json.loads(file.text)["distributed_type"] == "FSDP"


def test_processes_that_share_the_cpu_are_started_without_mpirun(tmp_path: Path) -> None:
    file = read_accelerate_file(training(tmp_path, PLAIN))
    assert json.loads(file.text)["distributed_type"] == "MULTI_GPU"
    assert file.on_cpu
