"""The options of `VLLMEngine`, and what becomes of those of its server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from ...errors import ConfigError
from ..loading import ModelCard
from ..options import SECONDS, SWITCH, WHOLE, EngineOptions, Rule, as_json, option
from .serve_options import RESOURCES, checked


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://")) and len(value.split("://", 1)[1]) > 0


def _are_addresses(value: Any) -> bool:
    if isinstance(value, list | tuple):
        places = [address_of(each) for each in value if _is_address(each)]
        return bool(value) and len(set(places)) == len(value)
    return value is None or _is_address(value)


def address_of(url: str) -> str:
    """A server's address as this library writes it, without the "/v1" that OpenAI's clients want."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_key(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isascii() and bool(value))


def _is_command(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list | tuple) and bool(words) and all(isinstance(word, str) and word for word in words)


def _is_server_options(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value))


ADDRESS = Rule(
    _are_addresses, 'the address of a server, "http://host:8000", a list of such addresses, each once, or None'
)
KEY = Rule(_is_key, "a text")
COMMAND = Rule(_is_command, 'a program, "vllm", or a list of a program and its first arguments')
SERVER_OPTIONS = Rule(_is_server_options, 'a mapping such as {"gpu_memory_utilization": 0.8}')
MAYBE = Rule(lambda value: isinstance(value, bool | None), "True, False or None")


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(EngineOptions):
    """Which server answers, and how it is used."""

    url: str | Sequence[str] | None = field(default=None, metadata=option(ADDRESS, own_engine=True))
    """Server that runs already, "http://host:8000" or "https://host"; several of one model share the requests; None
    starts one on this machine. Each must have been started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
    --enable-lora, under one --served-model-name, and must see the adapters' folders under the same paths. An authority
    of your own behind https goes into the environment's SSL_CERT_FILE."""
    api_key: str | None = field(default=None, repr=False, metadata=option(KEY, secret=True))
    """Key of the servers that run already; the environment's VLLM_API_KEY when None. It is not saved. A server of ours
    gets a random one."""
    command: str | Sequence[str] = field(default="vllm", metadata=option(COMMAND))
    """Program to start: "vllm", or its path in another environment."""
    server_options: Mapping[str, Any] | None = field(
        default=None, metadata=option(SERVER_OPTIONS, changes_answers=True)
    )
    """Options of `vllm serve`, with underscores: {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2, "data_parallel_size": 2, "distributed_executor_backend": "ray"}. True is a bare flag,
    False its --no- form."""
    concurrency: int = field(default=64, metadata=option(WHOLE))
    """Requests worth having in flight at once on each server, or each data parallel copy of one of ours."""
    max_adapters: int = field(default=32, metadata=option(WHOLE))
    """Adapters that this process keeps loaded on each server at most: for another one, the one that was asked for
    longest ago is unloaded, unless a request is in flight for it."""
    stop_while_training: bool = field(default=True, metadata=option(SWITCH))
    """Take a server of ours off its memory while an adapter is trained: on CUDA it sleeps, unless server_options has
    enable_sleep_mode=False; elsewhere, or where its version can't sleep, it is stopped and started again."""
    mixed_batches: bool | None = field(default=None, metadata=option(MAYBE))
    """Whether the server may answer for the base and for adapters in one batch. vLLM's CPU build gets that wrong
    (vllm-project/vllm#48421: base answers come out as an adapter's), so None is False for a server of ours on a
    machine without CUDA, and True otherwise."""
    request_timeout_s: float = field(default=600.0, metadata=option(SECONDS))
    """Longest time between two pieces of an answer from a server, which is all of an answer that is no stream. A
    server that is well but takes longer is told to stop, and the request is an error that is not tried again."""
    startup_timeout_s: float = field(default=600.0, metadata=option(SECONDS))
    """How long a server may take until it answers."""

    def resolved(self) -> Self:
        """The same options, with addresses written in one way, and no options of the server as an empty mapping."""
        url = self.url if self.url is None or len(self.addresses) > 1 else self.addresses[0]
        url = url if url is None or isinstance(url, str) else tuple(self.addresses)
        return replace(self, url=url, server_options=self.server_options or {})

    def traits(self) -> dict[str, Any]:
        """The options that decide the answers, without the server's that don't."""
        server = {name: each for name, each in (self.server_options or {}).items() if name not in RESOURCES}
        return {**super().traits(), "server_options": as_json(server)}

    @property
    def addresses(self) -> list[str]:
        """Of the servers that run already."""
        urls = [self.url] if isinstance(self.url, str) else self.url or ()
        return [address_of(url) for url in urls]

    @property
    def words(self) -> list[str]:
        """The command as a program and its first arguments."""
        return [self.command] if isinstance(self.command, str) else list(self.command)


def is_cut(card: ModelCard) -> bool:
    """Whether the model takes longer texts than this library uses, as its rotary factors change with the length."""
    return card.max_length < int(card.config.get_text_config().max_position_embeddings)


def server_options_for(card: ModelCard, given: VLLMOptions) -> dict[str, Any]:
    """The options of a server of ours, none for others. The context length is among them where the model's own is cut:
    vLLM takes the rotary factors of long texts for every text, unless it is told that none is long. Raises ConfigError.
    """
    options = dict(given.server_options or {})
    if given.url is not None:
        if options:
            raise ConfigError(f"server_options {sorted(options)} can't be given with url=: the server runs already.")
        return {}
    if is_cut(card):
        options["max_model_len"] = min(int(options.get("max_model_len") or card.max_length), card.max_length)
    on_cuda = torch.version.cuda is not None and torch.cuda.is_available()
    if on_cuda and given.stop_while_training:
        options.setdefault("enable_sleep_mode", True)
    return checked(options, torch.cuda.device_count() if on_cuda else 0)
