"""The arguments of `VLLMEngine`: their checks, and what becomes of a server's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ..loading import ModelCard

SERVER_RESOURCES = frozenset(
    {
        "gpu_memory_utilization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "max_num_seqs", "max_num_batched_tokens", "max_loras", "max_cpu_loras", "max_lora_rank", "swap_space",
        "cpu_offload_gb", "enforce_eager", "download_dir", "enable_prefix_caching",
    }
)  # fmt: skip
"""Options of a server that decide where and how fast it answers, not what."""

Rule = tuple[Callable[[Any], bool], str]


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_command(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list | tuple) and bool(words) and all(isinstance(word, str) and word for word in words)


RULES: Mapping[str, Rule] = {
    "url": (
        lambda value: value is None or (isinstance(value, str) and value.startswith(("http://", "https://"))),
        'the address of a server, "http://host:8000", or None',
    ),
    "api_key": (lambda value: value is None or (isinstance(value, str) and value.isascii() and bool(value)), "a text"),
    "command": (_is_command, 'a program, "vllm", or a list of a program and its first arguments'),
    "server_options": (
        lambda value: value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)),
        'a mapping such as {"gpu_memory_utilization": 0.8}',
    ),
    "concurrency": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        "a whole number above 0",
    ),
    "stop_while_training": (lambda value: isinstance(value, bool), "True or False"),
    "mixed_batches": (lambda value: value is None or isinstance(value, bool), "True, False or None"),
    "request_timeout_s": (_is_seconds, "a number of seconds above 0"),
    "startup_timeout_s": (_is_seconds, "a number of seconds above 0"),
    "chat_template_kwargs": (lambda value: value is None or isinstance(value, Mapping), "a mapping or None"),
}


def check_options(**options: Any) -> None:
    """Raises ConfigError for a value that its option can't have."""
    for name, value in options.items():
        allowed, description = RULES[name]
        if not allowed(value):
            shown = "" if name == "api_key" else f"={value!r}"
            raise ConfigError(f"{name}{shown} is not allowed (a {type(value).__name__}): give {description}.")


def is_cut(card: ModelCard) -> bool:
    """Whether the model takes longer texts than this library uses, as its rotary factors change with the length."""
    return card.max_length < int(card.config.get_text_config().max_position_embeddings)


def server_options_for(card: ModelCard, url: str | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options given, and for a server of ours the context length where the model's own is cut: vLLM takes the
    rotary factors of long texts for every text, unless it is told that none is long."""
    options = dict(given or {})
    if url is None and is_cut(card):
        options["max_model_len"] = min(int(options.get("max_model_len") or card.max_length), card.max_length)
    return options
