"""Options of `vllm serve`: which of them may be given, and what becomes of them on its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...checks import require, require_whole
from ...errors import ConfigError

PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""Into how many parts a layer is split, into how many groups the layers, and how many copies answer side by side."""
RESOURCES = frozenset(
    {
        *PARALLEL, "distributed_executor_backend", "data_parallel_backend", "data_parallel_size_local",
        "data_parallel_address", "data_parallel_rpc_port", "nnodes", "master_addr", "master_port",
        "enable_expert_parallel", "all2all_backend", "disable_custom_all_reduce", "api_server_count",
        "max_parallel_loading_workers", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs",
        "max_num_batched_tokens", "max_loras", "max_cpu_loras", "max_lora_rank", "swap_space", "cpu_offload_gb",
        "enforce_eager", "download_dir", "enable_prefix_caching", "enable_sleep_mode", "sleep_mode_backend",
    }
)  # fmt: skip
"""Options that decide where and how fast a server answers, not what."""
OWN = ("host", "port", "served_model_name", "api_key", "uds", "ssl_keyfile", "ssl_certfile")
ELSEWHERE = (
    "headless", "node_rank", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_external_lb",
    "data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb",
)  # fmt: skip
"""Options that make a server one of several that somebody starts and spreads requests over."""
BACKENDS = {
    "distributed_executor_backend": ("mp", "ray", "uni", "external_launcher"),
    "data_parallel_backend": ("mp", "ray"),
}
DEFAULTS: Mapping[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": 64,
    # It reads the grammars that this library writes (lark).
    "structured_outputs_config": {"backend": "guidance"},
    "enable_prompt_tokens_details": True,
}


def checked(given: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The options of a server of ours, with those that it has by default.

    `gpus` is how many of them this process sees; 0 where that says nothing. Raises ConfigError.
    """
    _check_names(given)
    for name in (*PARALLEL, "nnodes", "max_lora_rank", "max_loras", "api_server_count"):
        require_whole(f"server_options[{name!r}]", given.get(name), 1, optional=True)
    for name, allowed in BACKENDS.items():
        value = given.get(name)
        require(value is None or value in allowed, f"server_options[{name!r}]", value, f"one of {allowed}")
    options = {**DEFAULTS, **given}
    if replicas(given) > 1:
        # vLLM starts as many front ends by default, and then loads no adapters while it runs.
        options.setdefault("api_server_count", 1)
    if (options.get("api_server_count") or 1) > 1:
        raise ConfigError(
            "server_options['api_server_count'] above 1 is not allowed: vLLM then loads no adapters while it runs. "
            "Leave it out; for more servers give their addresses, url=[...]."
        )
    _check_gpus(given, gpus)
    return options


def _check_names(given: Mapping[str, Any]) -> None:
    if refused := sorted(set(given) & set(OWN)):
        raise ConfigError(f"server_options {refused} can't be given: any but {OWN}.")
    if refused := sorted(set(given) & set(ELSEWHERE)):
        raise ConfigError(
            f"server_options {refused} are for servers that you start yourself. Start them, and give their addresses: "
            'url=["http://node1:8000", "http://node2:8000"].'
        )
    if refused := sorted(name for name in given if not name.isidentifier()):
        raise ConfigError(
            f"server_options {refused} are not names of options: write them with underscores and no dashes in front, "
            "as tensor_parallel_size for --tensor-parallel-size."
        )


def _check_gpus(given: Mapping[str, Any], gpus: int) -> None:
    """Raises ConfigError where a server on this machine alone needs more GPUs than it has."""
    elsewhere = "ray" in (given.get("distributed_executor_backend"), given.get("data_parallel_backend"))
    if not gpus or elsewhere or (given.get("nnodes") or 1) > 1:
        return
    local = given.get("data_parallel_size_local")
    copies = replicas(given) if local is None else int(local)
    needed = (given.get("tensor_parallel_size") or 1) * (given.get("pipeline_parallel_size") or 1) * copies
    if needed > gpus:
        raise ConfigError(
            f"server_options ask for {needed} GPUs ({' x '.join(PARALLEL)}), and {gpus} are visible here. Give smaller "
            "sizes, 'distributed_executor_backend': 'ray' for a Ray cluster, or url= the address of a server that "
            "runs elsewhere."
        )


def replicas(given: Mapping[str, Any]) -> int:
    """How many copies of the model answer side by side in one server."""
    return int(given.get("data_parallel_size") or 1)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as command line arguments: True is a bare flag, False its --no- form, None nothing."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words
