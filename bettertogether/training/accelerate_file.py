"""The user's own configuration of accelerate, as `accelerate config` writes it, checked before anything is started.

Of DeepSpeed's ZeRO, stages 1 and 2 share out gradients and optimizer states, which of an adapter are small: such a
training is plain data parallelism. Stage 3 shares out the weights: FSDP2 does that here. DeepSpeed itself doesn't run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from ..errors import ConfigError
from ..printable import get_logger

if TYPE_CHECKING:
    from .config import TrainingConfig

PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")
"""Kinds of distribution under which each process holds the whole model."""
SHARDED = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class AccelerateFile:
    """What `accelerate launch` is told."""

    text: str
    """The configuration as JSON."""
    processes: int
    """Of all machines together."""
    machines: int = 1
    main_address: str | None = None
    main_port: int | None = None
    static: bool = True
    """Each machine's number is given to it, not found out by the machines among themselves."""
    on_cpu: bool = False
    bfloat16: bool = False
    """Mixed precision in bfloat16."""


def default_file(processes: int) -> AccelerateFile:
    """Plain data parallelism on one machine, whatever the user's default configuration is."""
    values = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO" if processes == 1 else "MULTI_GPU"}
    return AccelerateFile(text=json.dumps(values), processes=processes)


def read_accelerate_file(training: TrainingConfig) -> AccelerateFile:
    """The configuration that a training names, or the default one.

    Raises ConfigError where the file can't be read, asks for what training doesn't do, or contradicts `training`.
    """
    if training.accelerate_config is None:
        return default_file(training.num_processes)
    path = Path(training.accelerate_config)
    config = _loaded(path)
    _check_supported(path, config)
    processes = _processes(path, config, training.num_processes)
    if config.num_machines > 1:
        _check_machines(path, config, processes, bool(training.launch_command))
    zero = _zero_options(path, config) if config.distributed_type.value == "DEEPSPEED" else {}
    bfloat16 = str(config.mixed_precision or "no") == "bf16" or zero.get("bf16") is True
    if bfloat16 and training.dtype == "float32":
        raise ConfigError(f'dtype="float32", but {path} says mixed_precision: bf16. Change one of them.')
    return AccelerateFile(
        processes=processes,
        machines=config.num_machines,
        main_address=config.main_process_ip,
        main_port=config.main_process_port,
        static=config.rdzv_backend in (None, "static"),
        on_cpu=config.use_cpu,
        bfloat16=bfloat16,
        text=_as_launched(config, processes, zero),
    )


def _loaded(path: Path) -> Any:
    try:
        config = load_config_from_file(str(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"accelerate_config={str(path)!r} is not there. Give the file that `accelerate config --config_file FILE` "
            "wrote."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(
            f"accelerate_config={str(path)!r} can't be read as a configuration of accelerate: {error} Write it anew "
            f"with `accelerate config --config_file {path.name}`."
        ) from error
    if not isinstance(config, ClusterConfig):
        raise ConfigError(f"{path} is for Amazon SageMaker. Give one with compute_environment: LOCAL_MACHINE.")
    return config


def _check_supported(path: Path, config: Any) -> None:
    """Raise ConfigError for what adapters are not trained with."""
    kind, precision = config.distributed_type.value, str(config.mixed_precision or "no")
    if kind not in (*PLAIN, "FSDP", "DEEPSPEED"):
        raise ConfigError(
            f"{path} says distributed_type: {kind}, which adapters are not trained with here. Give one of "
            f"{', '.join(PLAIN)}, or FSDP with fsdp_version: 2, which shards the base model."
        )
    if kind == "FSDP" and str(config.fsdp_config.get("fsdp_version", 1)) != "2":
        raise ConfigError(
            f"{path} asks for the first version of FSDP, which can't shard a model of which only an adapter learns. "
            "Say fsdp_version: 2 in its fsdp_config (`accelerate to-fsdp2` converts a file)."
        )
    if kind == "FSDP" and str(config.fsdp_config.get("fsdp_offload_params", False)).lower() == "true":
        raise ConfigError(
            f"{path} keeps weights in the machine's memory, which training here does not. Say "
            "fsdp_offload_params: false."
        )
    if precision not in ("no", "bf16"):
        raise ConfigError(f"{path} says mixed_precision: {precision}. Say bf16, or no with TrainingConfig(dtype=...).")
    if str(config.dynamo_config.get("dynamo_backend", "no")).lower() != "no":
        raise ConfigError(f"{path} asks for torch.compile, under which packed rows don't run. Say dynamo_backend: no.")
    sizes = {key: size for key, size in config.parallelism_config.items() if key.endswith(("tp_size", "cp_size"))}
    if any(size != 1 for size in sizes.values()):
        raise ConfigError(
            f"{path} asks for {sizes}. Adapters are trained with rows or weights in parts, not layers: 1."
        )


def _zero_options(path: Path, config: Any) -> dict[str, Any]:
    """{"stage", "bf16"} of a DeepSpeed configuration. Raises ConfigError for what FSDP2 doesn't do in its place."""
    options = dict(config.deepspeed_config)
    found = {"stage": int(options.get("zero_stage", 2)), "bf16": False}
    offload, half = options.get("offload_param_device"), False
    if own := options.get("deepspeed_config_file"):
        try:
            values = json.loads(Path(own).expanduser().read_text())
            zero = values.get("zero_optimization", {})
            found = {"stage": int(zero.get("stage", 0)), "bf16": values.get("bf16", {}).get("enabled") is True}
            offload, half = zero.get("offload_param", {}).get("device"), values.get("fp16", {}).get("enabled") is True
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} names deepspeed_config_file: {own}, which can't be read ({error}).") from error
    if half:
        raise ConfigError(f"{path} asks for fp16 by {own}. Say bf16 there, or no half precision.")
    if found["stage"] == 3 and offload not in (None, "none"):
        raise ConfigError(
            f"{path} keeps weights off the GPUs (offload_param on {offload}), which training here does not. Say none."
        )
    return found


def _as_launched(config: Any, processes: int, zero: dict[str, Any]) -> str:
    """The configuration as JSON, in terms of what runs here."""
    values: dict[str, Any] = dict(config.to_dict())
    if values["distributed_type"] == "MULTI_CPU" or zero:
        # accelerate starts several processes on processors through mpirun alone, for other kinds by itself.
        values["distributed_type"] = "MULTI_GPU" if processes > 1 else "NO"
        values.pop("deepspeed_config", None)
    if zero.get("stage") == 3:
        logger.info("ZeRO stage 3: FSDP2 shards the model in DeepSpeed's place.")
        values |= {"distributed_type": "FSDP", "fsdp_config": SHARDED}
    return json.dumps(values)


def _processes(path: Path, config: Any, asked: int) -> int:
    found: int = config.num_processes
    if found < 1:
        return asked
    if asked not in (1, found):
        raise ConfigError(
            f"num_processes={asked}, but {path} says num_processes: {found}. Leave num_processes out, or change the "
            "file."
        )
    if found > 1 and config.distributed_type.value == "NO":
        raise ConfigError(f"{path} says num_processes: {found} with distributed_type: NO. Say MULTI_GPU or MULTI_CPU.")
    return found


def _check_machines(path: Path, config: Any, processes: int, has_command: bool) -> None:
    machines = config.num_machines
    if processes % machines:
        raise ConfigError(f"{path} says num_processes: {processes} on num_machines: {machines}. Give as many to each.")
    if not (config.main_process_ip and config.main_process_port):
        raise ConfigError(
            f"{path} says num_machines: {machines}, without main_process_ip and main_process_port: the address of the "
            "first machine, and a free port of it."
        )
    if not has_command:
        raise ConfigError(
            f"{path} says num_machines: {machines}, and nothing starts the others. Give what runs a command on each, "
            'such as launch_command=("srun", "--nodes=2", "--ntasks-per-node=1").'
        )
