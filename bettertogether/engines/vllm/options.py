"""The options of `VLLMEngine`, and what becomes of those of its server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..loading import ModelCard
from ..options import SECONDS, SWITCH, WHOLE, EngineOptions, Rule, option, plain

SERVER_RESOURCES = frozenset(
    {
        "gpu_memory_utilization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "max_num_seqs", "max_num_batched_tokens", "max_loras", "max_cpu_loras", "max_lora_rank", "swap_space",
        "cpu_offload_gb", "enforce_eager", "download_dir", "enable_prefix_caching",
    }
)  # fmt: skip
"""Options of a server that decide where and how fast it answers, not what."""


def _is_address(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.startswith(("http://", "https://")))


def _is_key(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isascii() and bool(value))


def _is_command(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list | tuple) and bool(words) and all(isinstance(word, str) and word for word in words)


def _is_server_options(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value))


ADDRESS = Rule(_is_address, 'the address of a server, "http://host:8000", or None')
KEY = Rule(_is_key, "a text")
COMMAND = Rule(_is_command, 'a program, "vllm", or a list of a program and its first arguments')
SERVER_OPTIONS = Rule(_is_server_options, 'a mapping such as {"gpu_memory_utilization": 0.8}')
MAYBE = Rule(lambda value: isinstance(value, bool | None), "True, False or None")


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(EngineOptions):
    """Which server answers, and how it is used."""

    url: str | None = field(default=None, metadata=option(ADDRESS, own_engine=True))
    """Server that runs already, "http://host:8000"; None starts one on this machine. It must have been started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora, and must see the adapters' folders under the same paths."""
    api_key: str | None = field(default=None, repr=False, metadata=option(KEY, secret=True))
    """Key of a server that runs already; the environment's VLLM_API_KEY when None. It is not saved. A server of ours
    gets a random one."""
    command: str | Sequence[str] = field(default="vllm", metadata=option(COMMAND))
    """Program to start: "vllm", or its path in another environment."""
    server_options: Mapping[str, Any] | None = field(
        default=None, metadata=option(SERVER_OPTIONS, changes_answers=True)
    )
    """Options of `vllm serve`: {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 2}."""
    concurrency: int = field(default=64, metadata=option(WHOLE))
    """Requests worth having in flight at once."""
    stop_while_training: bool = field(default=True, metadata=option(SWITCH))
    """Stop a server of ours while an adapter is trained."""
    mixed_batches: bool | None = field(default=None, metadata=option(MAYBE))
    """Whether the server may answer for the base and for adapters in one batch. vLLM's CPU build gets that wrong
    (vllm-project/vllm#48421: base answers come out as an adapter's), so None is False for a server of ours on a
    machine without CUDA, and True otherwise."""
    request_timeout_s: float = field(default=600.0, metadata=option(SECONDS))
    """Longest time between two pieces of an answer from the server."""
    startup_timeout_s: float = field(default=600.0, metadata=option(SECONDS))
    """How long a server may take until it answers."""

    def resolved(self) -> Self:
        """The same options, with no options of the server as an empty mapping."""
        return replace(self, server_options=self.server_options or {})

    def traits(self) -> dict[str, Any]:
        """The options that decide the answers, without the server's that don't."""
        server = {name: each for name, each in (self.server_options or {}).items() if name not in SERVER_RESOURCES}
        return {**super().traits(), "server_options": plain(server)}

    @property
    def words(self) -> list[str]:
        """The command as a program and its first arguments."""
        return [self.command] if isinstance(self.command, str) else list(self.command)


def is_cut(card: ModelCard) -> bool:
    """Whether the model takes longer texts than this library uses, as its rotary factors change with the length."""
    return card.max_length < int(card.config.get_text_config().max_position_embeddings)


def server_options_for(card: ModelCard, given: VLLMOptions) -> dict[str, Any]:
    """The options given, and for a server of ours the context length where the model's own is cut: vLLM takes the
    rotary factors of long texts for every text, unless it is told that none is long."""
    options = dict(given.server_options or {})
    if given.url is None and is_cut(card):
        options["max_model_len"] = min(int(options.get("max_model_len") or card.max_length), card.max_length)
    return options
