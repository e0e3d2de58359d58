"""Options of a server of ours: those that split a model over GPUs and machines, and the command line they make."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from bettertogether.engines.vllm.options import VLLMOptions
from bettertogether.engines.vllm.serve_options import arguments, checked
from bettertogether.errors import ConfigError

PARALLEL: dict[str, Any] = {
    "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "data_parallel_size": 2,
    "distributed_executor_backend": "ray", "data_parallel_backend": "ray",
}  # fmt: skip


def test_parallel_sizes_and_their_executor_are_passed_on() -> None:
    words = arguments(checked(PARALLEL, gpus=1))
    pairs = dict(pairwise(words))
    assert {name: pairs[f"--{name.replace('_', '-')}"] for name in PARALLEL} == {
        name: str(value) for name, value in PARALLEL.items()
    }


def test_copies_of_a_model_share_one_front_end_as_vllm_loads_no_adapters_with_more() -> None:
    assert checked({"data_parallel_size": 2}, gpus=2)["api_server_count"] == 1
    assert "api_server_count" not in checked({"tensor_parallel_size": 2}, gpus=2)


def test_parallel_sizes_are_no_part_of_the_models_name() -> None:
    assert VLLMOptions(server_options=PARALLEL).traits()["server_options"] == {}


def test_switches_lists_and_mappings_are_written_as_vllm_reads_them() -> None:
    options = {"enforce_eager": True, "enable_prefix_caching": False, "seed": None, "a": [1, 2], "b": {"c": 1}}
    assert arguments(options) == ["--enforce-eager", "--no-enable-prefix-caching", "--a", "1", "2", "--b", '{"c": 1}']


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, r"server_options\['tensor_parallel_size'\]=0 is not allowed: give a whole"),
        ({"data_parallel_size": "2"}, r"server_options\['data_parallel_size'\]='2' is not allowed"),
        ({"distributed_executor_backend": "dask"}, r"'dask' is not allowed: give one of \('mp', 'ray'"),
        ({"data_parallel_size": 2, "api_server_count": 2}, "loads no adapters while it runs"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, "ask for 4 GPUs .* and 2 are visible here"),
        ({"headless": True}, r"'headless'\] are for servers that you start yourself"),
        ({"tensor-parallel-size": 2}, "write them with underscores"),
        ({"port": 8000}, r"'port'\] can't be given"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_before_anything_is_started(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(options, gpus=2)


def test_gpus_of_other_machines_are_not_counted_here() -> None:
    checked({"tensor_parallel_size": 8, "distributed_executor_backend": "ray"}, gpus=2)
    checked({"tensor_parallel_size": 8, "nnodes": 4}, gpus=2)
    checked({"data_parallel_size": 4, "data_parallel_size_local": 2}, gpus=2)
    checked({"tensor_parallel_size": 8}, gpus=0)
