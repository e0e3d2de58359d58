"""The engine that runs a Hugging Face model in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from dspy.lm15 import Request, Response

from ...errors import ConfigError
from ...extras import is_installed
from ...printable import get_logger
from ...training.adapter import adapter_digest, config_json
from ...training.config import LoRAConfig, TrainingConfig
from ...training.lending import ModelState, lent_out
from ...training.precision import give_back_memory, is_out_of_memory
from ...training.progress import ProgressFunction, TrainingProgress
from ..adapters import AdapterBank, linear_shapes
from ..answers import FinishedAnswer, TokenScore
from ..base_engine import PARAMS, AsyncSide, BaseEngine
from ..finetuning import TrainingJob, check_training, train
from ..loading import load_model, meta_model, model_to_train
from ..memory_plan import announce_memory
from ..protocol import MODEL_PREFIX, FinetuneResult, TrainingRow, adapter_model_name
from ..responses import ResponseWriter
from ..streaming import Begin, Put, off_the_loop
from ..structured import structured_output_available
from .choice import make_decoder
from .closing import ClosingConstraint
from .decoder import BatchRow, Decoder, TokenConstraint
from .job import Job
from .options import TransformersOptions
from .packed_linear import pack_linear_layers
from .scheduler import Scheduler
from .text_stream import TextStream
from .thinking import ThinkingConstraint

if TYPE_CHECKING:
    from ...training.policy import PolicyTraining

logger = get_logger(__name__)

WAIT_S = 0.2
"""A waiting thread wakes so often, so that Ctrl-C reaches it."""


class TransformersEngine(BaseEngine):
    """Answers requests with a model of transformers, many at once, and trains LoRA adapters on it.

    The weights are loaded at the first request. Threads may call `complete` at the same time; their requests are
    decoded together, and the part that their prompts share is computed once. `copy`, `deepcopy` and `pickle` give the
    same engine.

    Args:
        model: Folder of a transformers model, or a hub id.
        adapters: PEFT folders to serve from the start.
        options: The fields of `TransformersOptions`.

    Raises ModelError for a folder or id that holds no causal language model, and ConfigError.
    """

    options_class = TransformersOptions
    options: TransformersOptions
    _adapters: AdapterBank

    def __init__(self, model: str | Path, *, adapters: Sequence[str | Path] = (), **options: Any) -> None:
        super().__init__(model, TransformersOptions.of(options))
        if self.options.torch_device.type == "cuda" and is_installed("vllm"):
            logger.warning("vLLM is installed, which answers faster on a GPU: vllm_lm(...) in place of local_lm(...).")
        self.concurrency = self.options.max_batch_size
        self.supports_response_schema = structured_output_available() and self._card.tokenizer.is_fast
        if structured_output_available() and not self.supports_response_schema:
            logger.warning("%s has no fast tokenizer: its answers can't be held to a schema.", self.short_name)
        self.supported_params = PARAMS | ({"response_format"} if self.supports_response_schema else frozenset())
        self._writer = ResponseWriter(self._card.tokenizer, thinks=self._renderer.thinks)
        self._model: Any = None
        self._shapes: Mapping[str, tuple[int, int]] = {}
        self._load_lock = threading.Lock()
        self._adapters = AdapterBank(self.base_name, self._layer_shapes)
        self._scheduler = Scheduler(
            self._make_decoder,
            eos_ids=self._eos_ids,
            max_batch_size=self.options.max_batch_size,
            out_of_memory=is_out_of_memory,
            check_adapter=self._adapters.check,
        )
        for folder in adapters:
            self.add_adapter(Path(folder))

    def complete(self, request: Request) -> Response:
        """Answer one request; `request.model` names the base or an adapter.

        Raises UnknownAdapterError, and lm15's ContextLengthError, UnsupportedFeatureError and InvalidRequestError.
        """
        job = self._job(request)
        self._scheduler.submit(job)
        return self._writer.response(request, _wait(job.future))

    def _prepared(self, request: Request) -> Begin:
        return partial(self._begin, request, self._job(request))

    def _begin(self, request: Request, job: Job, put: Put) -> Callable[[], object]:
        deltas = self._writer.deltas()

        def take(text: str, scores: Sequence[TokenScore]) -> None:
            for event in deltas(text, scores):
                put(event)

        def end(future: Future[FinishedAnswer]) -> None:
            try:
                # Of one that was broken off nobody reads on, while `take` may still be at work.
                held_back = () if future.cancelled() else deltas.finish()
                for event in held_back:
                    put(event)
                put(self._writer.end(future.result()))
                put(None)
            except BaseException as error:
                put(error)

        job.sink = take
        job.future.add_done_callback(end)
        put(self._writer.start(request))
        self._scheduler.submit(job)
        return job.future.cancel

    async def complete_async(self, request: Request) -> Response:
        """`complete` for an event loop, which stays free."""
        job = await off_the_loop(self._job, request)
        self._scheduler.submit(job)
        return self._writer.response(request, await asyncio.wrap_future(job.future))

    @property
    def asynchronous(self) -> AsyncTransformersEngine:
        """The same engine for `dspy.LM(async_engine=...)`."""
        return AsyncTransformersEngine(self)

    def _job(self, request: Request) -> Job:
        self._scheduler.check_open()
        model = self.canonical(request.model)
        self._adapters.check(model)
        adapter = "" if model == MODEL_PREFIX + self.base_name else model
        prompt_ids, max_new_tokens, sampling = self._rendered(request)
        row = BatchRow(prompt_ids, max_new_tokens, adapter, sampling)
        row.constraint = self._constraint(request.config.response_format, max_new_tokens)
        return Job(row, TextStream(self._writer.decode, sampling.stop), request.config.response_format)

    def _constraint(self, response_format: Mapping[str, Any] | None, room: int) -> TokenConstraint | None:
        answer: ClosingConstraint | None = None
        if response_format is not None:
            answer = ClosingConstraint(self._grammars.constraint(response_format), room)
        if not self._renderer.thinks:
            return answer
        return ThinkingConstraint(
            answer,
            most=room // 2,
            encode=self._renderer.after_prompt,
            decode=self._card.tokenizer.decode,
            eos_ids=self._eos_ids,
            spend=(lambda tokens: None) if answer is None else answer.spend,
        )

    def add_adapter(self, folder: Path) -> str:
        """Serve the adapter in a PEFT folder; returns its model name. Raises ModelError."""
        self._scheduler.check_open()
        return self._adapters.add(Path(folder).expanduser().absolute())

    def remove_adapter(self, model: str) -> None:
        """Serve an adapter no more."""
        self._adapters.remove(self.canonical(model))

    def check_training(self, lora: LoRAConfig | None, training: TrainingConfig) -> None:
        """Refuse a training before there are rows for it; see `CheckingEngine.check_training`."""
        check_training(self._card, self.options.torch_device, lora, training)

    def finetune(self, rows: Sequence[TrainingRow], **options: Any) -> FinetuneResult:
        """Train an adapter and serve it under a new name. See `LocalEngine.finetune`.

        Requests wait for the end of the training; while `on_progress` runs they are answered, so that it may ask, too.
        Where other processes train, or a copy in 4 bits, the model is freed for them, and loaded again for the next
        request.
        """
        with self._scheduler.training():
            return super().finetune(rows, **options)

    def _train(self, job: TrainingJob, on_progress: ProgressFunction | None) -> FinetuneResult:
        training, source = job.training, self._card.source
        if not training.launched and training.quantize_base is None:
            with self._scheduler.exclusive():
                model = self._loaded_model()
                return train(self, job, model, source, self._reporting(model, on_progress))
        self._check_unchanged()
        with self._scheduler.exclusive():
            self._unload()
            report = self._reporting(None, on_progress)
            if training.launched:
                return train(self, job, None, source, report)
            with model_to_train(self._card, self.options.torch_device, four_bit=True) as model:
                return train(self, job, model, source, report)

    @contextmanager
    def trained_model(self, training: TrainingConfig) -> Iterator[Any]:
        """The model that answers. Raises ConfigError for `quantize_base`, which would be a second one beside it."""
        if training.quantize_base is not None:
            raise ConfigError(
                f"quantize_base={training.quantize_base!r} is not for learning from rewards with local_lm, where the "
                "model that answers is the one that learns: leave it out, or use vllm_lm(...)."
            )
        self._scheduler.check_open()
        yield self._loaded_model()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Train inside the block, while nothing is answered."""
        with self._scheduler.training(), self._turn.taken(self.short_name), self._scheduler.exclusive():
            yield

    def serve(self, training: PolicyTraining, round_number: int, folder: Path) -> str:
        """Answer with the adapter as it is now, which stays in memory."""
        config, weights = training.adapter_config, training.weights()
        name = adapter_model_name(self.base_name, round_number, adapter_digest(config, weights))
        self._adapters.put(name, json.loads(config_json(config)), weights)
        return name

    def _unload(self) -> None:
        """Free the weights; the next request loads them again."""
        self._scheduler.forget_decoder()
        self._adapters.attach(None)
        self._model = None
        if self.options.torch_device.type != "cpu":
            give_back_memory()

    def _reporting(self, model: Any, on_progress: ProgressFunction | None) -> ProgressFunction:
        """The callback with the model lent to the worker while it runs: put back before, or, where it was unloaded,
        loaded if it is asked. It ends a closed engine's training."""
        before = None if model is None else ModelState.of(model)

        def report(line: TrainingProgress) -> None:
            self._scheduler.check_open()
            if on_progress is None:
                return
            with nullcontext() if before is None else lent_out(model, before), self._scheduler.lent():
                on_progress(line)
            if before is None:
                self._unload()

        return report

    def counters(self) -> dict[str, int]:
        """requests, prompt_tokens, prefix_tokens_reused, generated_tokens, forced_tokens, forward_passes, batches; and,
        on CUDA, device_peak_bytes: the most memory that this process has had there."""
        counts = self._scheduler.counters()
        if self.options.torch_device.type == "cuda":
            counts["device_peak_bytes"] = torch.cuda.max_memory_allocated(self.options.torch_device)
        return counts

    def close(self) -> None:
        """Stop the worker and free the weights, those of the adapters too; their names and folders stay known. Pending
        requests fail with EngineClosedError."""
        self._scheduler.close()
        self._model = None
        if self._scheduler.is_ours:
            self._adapters.free()
            if self.options.torch_device.type != "cpu":
                give_back_memory()
        super().close()

    def _layer_shapes(self) -> Mapping[str, tuple[int, int]]:
        if not self._shapes:
            self._shapes = linear_shapes(meta_model(self._card.config))
        return self._shapes

    def _loaded_model(self) -> Any:
        with self._load_lock:
            if self._model is None:
                self._check_unchanged()
                options = self.options
                place = options.torch_device, options.torch_dtype
                announce_memory(self._card, *place, cache_bytes=options.cache_bytes)
                model = load_model(self._card, *place)
                pack_linear_layers(model)
                # Now, since a training wraps layers for its time.
                self._shapes = linear_shapes(model)
                self._adapters.attach(model)
                self._model = model
            return self._model

    def _make_decoder(self) -> Decoder:
        return make_decoder(self._loaded_model(), self._adapters, self.options.cache_bytes)


class AsyncTransformersEngine(AsyncSide):
    """A `TransformersEngine` whose `complete` is awaited."""

    engine_class = TransformersEngine


def _wait(future: Future[FinishedAnswer]) -> FinishedAnswer:
    """The answer; a thread that is interrupted while it waits takes its request back."""
    try:
        while True:
            wait([future], timeout=WAIT_S)
            if future.done():
                return future.result()
    finally:
        future.cancel()
