"""The engine that answers through a vLLM server and trains in this process, or in several."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch
from dspy.lm15 import Request, Response

from ...errors import ConfigError, EngineBusyError, ModelError
from ...files import new_folder
from ...printable import get_logger
from ...training.adapter import save_adapter
from ...training.adapter_folder import read_adapter_config, write_round
from ...training.config import LoRAConfig, TrainingConfig
from ...training.progress import ProgressFunction
from .._upstream import StreamEvent
from ..adapters import adapter_name
from ..answers import FinishedAnswer
from ..base_engine import PARAMS, AsyncSide, BaseEngine
from ..finetuning import TrainingJob, check_training, train
from ..held_adapters import HeldAdapters
from ..loading import model_to_train, pick_device, pick_dtype
from ..memory_plan import announce_memory
from ..protocol import MODEL_PREFIX, FinetuneResult, TrainingRow
from ..responses import ResponseWriter
from ..streaming import Begin, Put
from ..structured import after_thoughts, answer_grammar
from .api import Piece, answer_of, pieces_of, sampled_of, sampling_fields
from .breakable import Breakable
from .fleet import Fleet, meet
from .gate import Gate
from .member import Adapter, Member
from .options import VLLMOptions, is_cut, server_options_for
from .serve_options import replicas
from .server import VLLMServer
from .stream import StreamReader

if TYPE_CHECKING:
    from ...training.policy import PolicyTraining

logger = get_logger(__name__)

COUNTERS = ("requests", "prompt_tokens", "prefix_tokens_reused", "generated_tokens")


class VLLMEngine(BaseEngine):
    """Answers requests through vLLM's HTTP API, base and adapters side by side, and trains adapters for it.

    Prompts are rendered here and sent as tokens, so that the rows of a training and the prompts of a program are the
    same, as with `TransformersEngine`. A server of ours is started at the first request, put to sleep (CUDA) or stopped
    while a training in this process needs its memory, and woken or started again after it; it ends with this process,
    however that ends. Servers that run already share the requests (`Fleet`), and load adapters when they are first
    asked for them. vLLM does not promise the same text for the same seed whatever runs beside it.

    Args:
        model: Folder of a transformers model, or a hub id.
        adapters: PEFT folders to serve from the start.
        options: The fields of `VLLMOptions`.

    Raises ModelError for a folder or id that holds no causal language model, a `url` where no vLLM answers, or servers
    of different models; and ConfigError.
    """

    kind = "vllm"
    supported_params = PARAMS | {"response_format"}
    supports_response_schema = True
    options_class = VLLMOptions
    options: VLLMOptions

    def __init__(self, model: str | Path, *, adapters: Sequence[str | Path] = (), **options: Any) -> None:
        given = VLLMOptions.of(options)
        super().__init__(model, given)
        self._base_model = MODEL_PREFIX + self.base_name
        server_options = server_options_for(self._card, given)
        self.servers = self._servers_for(given, server_options)
        self.server = self.servers[0]
        """Our server, or the first of those that run already."""
        self.concurrency = given.concurrency * max(len(given.addresses), replicas(server_options))
        self._client = self._new_client(kept=self.concurrency)
        self._unkept = self._new_client(kept=0)
        self._pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="bettertogether-vllm")
        members = [Member(server, self._client, given.max_adapters) for server in self.servers]
        self.fleet = Fleet(members, self._base_model, given.request_timeout_s)
        """The servers, with what is known of each."""
        self._writer = ResponseWriter(self._card.tokenizer, thinks=self._renderer.thinks)
        self._gate = Gate()
        self._mixed_batches = given.mixed_batches
        if given.mixed_batches is None:
            self._mixed_batches = not self.server.ours or torch.cuda.is_available()
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._adapters = HeldAdapters(self.base_name)
        if self.server.ours:
            self.max_length = min(self.max_length, int(server_options.get("max_model_len") or self.max_length))
        else:
            self._meet_servers()
        for folder in adapters:
            self.add_adapter(Path(folder))

    def _new_client(self, kept: int) -> httpx.Client:
        """One that keeps so many connections open for further requests."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=kept)
        timeout = httpx.Timeout(self.options.request_timeout_s, connect=10.0)
        # A proxy of the environment's is not for a server on this machine.
        return httpx.Client(timeout=timeout, limits=limits, trust_env=not self.server.ours)

    def _servers_for(self, given: VLLMOptions, server_options: Mapping[str, Any]) -> tuple[VLLMServer, ...]:
        urls: Sequence[str | None] = given.addresses or [None]
        return tuple(
            VLLMServer(
                self._card.source,
                self._base_model,
                url=url,
                api_key=given.api_key,
                options=server_options,
                command=given.words,
                startup_timeout_s=given.startup_timeout_s,
            )
            for url in urls
        )

    def _check_options(self, asked: Mapping[str, Any]) -> None:
        key = asked.get("api_key")
        if key is not None and key != self.server.api_key:
            raise ConfigError(
                f"Another api_key was given than the one with which {self.short_name!r} is served in this process. Use "
                "the same one, or close() the engine first."
            )
        super()._check_options(asked)

    def _meet_servers(self) -> None:
        """Learn the base model's name and the context length from servers that are not ours."""
        self.fleet.base, served_length = meet(self.fleet.members)
        served_length = served_length or self.max_length
        if is_cut(self._card) and self.max_length < served_length:
            logger.warning(
                "The server at %s takes texts of %d tokens, for which vLLM changes this model's rotary factors in "
                "texts of any length; training keeps to those of short ones. Start it with --max-model-len %d.",
                self.server.url,
                served_length,
                self.max_length,
            )
        self.max_length = min(self.max_length, served_length)

    def complete(self, request: Request) -> Response:
        """Answer one request; `request.model` names the base or an adapter.

        Raises UnknownAdapterError, ModelError when no server comes up or an adapter can't be loaded there,
        AnswerTimeoutError, and lm15's ContextLengthError, UnsupportedFeatureError, InvalidRequestError, AuthError,
        RateLimitError, TransportError and ServerError. What was answered and got lost on the way is not counted.
        """
        return self._completed(request, None)

    def _completed(self, request: Request, breakable: Breakable | None) -> Response:
        request = self._named(request)
        body = self._body(request)
        with self._gate.together(self._kind(request.model)), self._asked(request, body, breakable) as reply:
            answer, choice = answer_of(reply)
            self._count(answer)
            if request.config.store:
                answer = replace(answer, sampled=sampled_of(choice, request, body["prompt"]))
        return self._writer.response(request, answer)

    def _prepared(self, request: Request) -> Begin:
        request = self._named(request)
        body = self._body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        return partial(self._begin, request, body)

    def _begin(self, request: Request, body: Mapping[str, Any], put: Put) -> Callable[[], object]:
        reader = StreamReader(self._unkept, put)
        reader.start(self._pool, lambda reader: self._events(request, body, reader))
        return reader.stop

    async def complete_async(self, request: Request) -> Response:
        """`complete` for an event loop; where it is cancelled, the server stops writing the answer."""
        self.server.check_open()
        breakable = Breakable(self._unkept)
        try:
            job = self._pool.submit(copy_context().run, self._completed, request, breakable)
            return await asyncio.wrap_future(job)
        finally:
            breakable.stop()

    def _events(self, request: Request, body: Mapping[str, Any], reader: StreamReader) -> Iterator[StreamEvent]:
        with self._gate.together(self._kind(request.model)):
            yield self._writer.start(request)
            deltas = self._writer.deltas()
            with self._asked(request, body, reader, stream=True) as reply:
                for piece in reader.until_stopped(pieces_of(reply)):
                    if isinstance(piece, Piece):
                        yield from deltas(*piece)
                    else:
                        answer = piece
        if not reader.stopped:
            self._count(answer)
            yield from deltas.finish()
            yield self._writer.end(answer)

    @property
    def asynchronous(self) -> AsyncVLLMEngine:
        """The same engine for `dspy.LM(async_engine=...)`."""
        return AsyncVLLMEngine(self)

    def _named(self, request: Request) -> Request:
        return replace(request, model=self.canonical(request.model))

    def _body(self, request: Request) -> dict[str, Any]:
        """What is asked of the server. A request that can't be answered fails here, before any server is started."""
        self.server.check_open()
        if self._turn.in_callback and self._stops_for_training:
            raise EngineBusyError(
                f"A callback of a training of {self.short_name} asks the model, whose server rests until the "
                "training ends. Ask when it has, or make the engine with stop_while_training=False."
            )
        self.adapter_folder(request.model)
        prompt_ids, max_tokens, sampling = self._rendered(request)
        model = self.fleet.base if request.model == self._base_model else request.model
        body = {"model": model, "prompt": prompt_ids, "max_tokens": max_tokens, **sampling_fields(sampling)}
        body["stop_token_ids"] = sorted(self._eos_ids)
        if request.config.response_format is not None:
            body["structured_outputs"] = {"grammar": self._grammar(request.config.response_format)}
        return body

    def _grammar(self, response_format: Mapping[str, Any]) -> str:
        grammar = answer_grammar(response_format)
        return after_thoughts(grammar) if self._renderer.thinks else grammar

    def _kind(self, model: str) -> str:
        """Requests of one kind may run together."""
        if self._mixed_batches:
            return "any"
        return "base" if model == self._base_model else "adapters"

    @contextmanager
    def _asked(
        self, request: Request, body: Mapping[str, Any], breakable: Breakable | None, *, stream: bool = False
    ) -> Iterator[httpx.Response]:
        """The reply to a request, from the server where the prompts of its predictor meet."""
        folder = self.adapter_folder(request.model)
        adapter = None if folder is None else Adapter(request.model, folder)
        with self.fleet.reply(self._key(request), body, adapter, breakable, stream=stream) as reply:
            yield reply

    def _key(self, request: Request) -> str:
        """The same for requests with a common prefix: the model, and all of the chat before its last message."""
        return json.dumps([request.model, *self.messages(request)[:-1]])

    def _count(self, answer: FinishedAnswer) -> None:
        counted = (1, answer.prompt_tokens, answer.reused_tokens, answer.generated_tokens)
        with self._lock:
            self._counts.update(dict(zip(COUNTERS, counted, strict=True)))

    def add_adapter(self, folder: Path) -> str:
        """Serve the adapter in a PEFT folder; returns its model name. Raises ModelError."""
        folder = Path(folder).expanduser().absolute()
        self._check_rank(int(read_adapter_config(folder)["r"]), f"The adapter in {folder}", ModelError)
        name = adapter_name(self.base_name, folder)
        self._adapters.hold(name, folder)
        return name

    def _check_rank(self, rank: int, what: str, error: type[Exception]) -> None:
        most = int(self.server.options.get("max_lora_rank") or rank)
        if rank > most:
            raise error(
                f"{what} has rank {rank}, and the server takes {most} at most. Give server_options="
                "{'max_lora_rank': ...} when the engine is made, or a lower rank."
            )

    def remove_adapter(self, model: str) -> None:
        """Serve an adapter no more; the servers unload it."""
        model = self.canonical(model)
        self._adapters.remove(model)
        for member in self.fleet.members:
            member.forget(model)

    @property
    def _stops_for_training(self) -> bool:
        return self.server.ours and self.options.stop_while_training

    @contextmanager
    def _paused(self) -> Iterator[None]:
        if not self._stops_for_training:
            yield
            return
        with self._gate.alone():
            self.server.pause()
            try:
                yield
            finally:
                self.server.resume()

    def check_training(self, lora: LoRAConfig | None, training: TrainingConfig) -> None:
        """Refuse a training before there are rows for it, also for a rank that the server doesn't take."""
        if lora is not None:
            self._check_rank(lora.rank, "lora", ConfigError)
        check_training(self._card, pick_device("auto"), lora, training)

    def finetune(self, rows: Sequence[TrainingRow], **options: Any) -> FinetuneResult:
        """Train an adapter and serve it under a new name. See `LocalEngine.finetune`."""
        self.server.check_open()
        return super().finetune(rows, **options)

    def _train(self, job: TrainingJob, on_progress: ProgressFunction | None) -> FinetuneResult:
        self._check_rank(job.lora.rank, "lora", ConfigError)
        self._check_unchanged()
        with self._paused():
            if job.training.launched:
                return train(self, job, None, self._card.source, on_progress)
            return self._train_here(job, on_progress)

    def _train_here(self, job: TrainingJob, on_progress: ProgressFunction | None) -> FinetuneResult:
        """Train in this process, on a model of its own that is freed afterwards."""
        device, four_bit = pick_device("auto"), job.training.quantize_base is not None
        announce_memory(self._card, device, pick_dtype("auto", device), lora=job.lora, training=job.training)
        with model_to_train(self._card, device, four_bit=four_bit) as model:
            return train(self, job, model, self._card.source, on_progress)

    def trained_model(self, training: TrainingConfig) -> AbstractContextManager[Any]:
        """A model of this process's own, beside that of the server, freed after the block. Raises ConfigError for one
        that thinks: the server has another grammar for its thoughts."""
        self.server.check_open()
        if self._renderer.thinks:
            raise ConfigError(
                f"{self.short_name} thinks before it answers: behind a server it can't learn from rewards. Use "
                "local_lm(...), or engine_options={'chat_template_kwargs': {'enable_thinking': False}}."
            )
        self._check_unchanged()
        return model_to_train(self._card, pick_device("auto"), four_bit=training.quantize_base is not None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Train inside the block; a server of ours rests meanwhile, see `stop_while_training`."""
        with self._turn.taken(self.short_name), self._paused():
            yield

    def serve(self, training: PolicyTraining, round_number: int, folder: Path) -> str:
        """Answer with the adapter as it is now, which the server loads from `folder`."""
        work = new_folder(folder)
        save_adapter(work, training.adapter_config, training.weights())
        write_round(work, round_number, self.base_name)
        return self.add_adapter(work)

    def counters(self) -> dict[str, int]:
        """requests, prompt_tokens, prefix_tokens_reused, generated_tokens."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTERS}

    def close(self) -> None:
        """Stop the server where it is ours; others run on. In a fork, only forget this engine."""
        for server in self.servers:
            server.close()
        if self.server.made_in.is_this:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()
            self._unkept.close()
        super().close()


class AsyncVLLMEngine(AsyncSide):
    """A `VLLMEngine` whose `complete` is awaited."""

    engine_class = VLLMEngine
