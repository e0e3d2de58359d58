"""What the engines for a transformers model have in common: its tokens, and one engine per process and model."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from dspy.clients.engines.base import validate_request
from dspy.lm15 import ContextLengthError, Request, Response
from numpy.typing import NDArray

from ..checks import require_strength
from ..errors import ConfigError, ModelError, TrainingError
from ..files import adapters_cache
from ..training.arrow_rows import row_folder
from ..training.config import LoRAConfig, PolicyConfig, TrainingConfig
from ..training.progress import ProgressFunction
from ._upstream import StreamEvent
from .answers import SampledAnswer, SamplingOptions
from .finetuning import TrainingJob, prepare
from .fingerprint import model_hash, short_hash, short_name
from .held_adapters import HeldAdapters
from .loading import located, read_card, readable
from .options import EngineOptions, as_json
from .protocol import (
    MODEL_PREFIX,
    ChatMessage,
    FinetuneResult,
    PolicySession,
    TrainingRow,
    adapter_round,
    require_adapter,
)
from .rendering import PromptRenderer, messages_of
from .streaming import Streaming
from .strength import scaled_folder
from .structured import GrammarCompiler, structured_output_available
from .training_turn import TrainingTurn

if TYPE_CHECKING:
    from ..training.policy import PolicyTraining
    from .local.decoder import TokenConstraint

DEFAULT_MAX_TOKENS = 1024
PARAMS = frozenset({"temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "logprobs", "store"})


class BaseEngine(Streaming):
    """Base of an engine: `copy`, `deepcopy` and `pickle` of it give the same engine.

    A subclass's arguments are the model, `adapters` (PEFT folders to serve from the start) and the fields of its
    `options_class`.
    """

    kind = "local"
    """What runs the model; the same weights in another kind of engine are another model."""
    options_class: type[EngineOptions] = EngineOptions
    supports_function_calling = False
    supports_reasoning = False
    _adapters: HeldAdapters

    def __init__(self, model: str | Path, options: EngineOptions) -> None:
        model = located(model)
        self._card = read_card(model)
        self.options = options.resolved()
        self.short_name = short_name(model)
        """The base's name without its fingerprint: the folder's, or the last part of the hub id."""
        self.base_hash = self._model_hash()
        """SHA-256 of the base's weights, config, tokenizer and chat template: the same wherever they are."""
        traits = {"kind": self.kind, **self.options.traits()}
        self.base_name = f"{self.short_name}-{short_hash(self.base_hash, traits)}"
        self.max_length = self._card.max_length
        self._turn = TrainingTurn()
        self.in_sessions: Counter[str] = Counter()
        """Adapters that policy sessions answer with, and how many do: those with the same weights have the same name.
        """
        template_kwargs = self.options.chat_template_kwargs
        self._renderer = PromptRenderer(self._card.tokenizer, self._card.eos_ids, template_kwargs)
        self._eos_ids = frozenset({*self._card.eos_ids, self._renderer.end_id})
        self._grammars = GrammarCompiler(self._card.tokenizer, self._card.vocabulary, sorted(self._eos_ids))
        if self._card.unknown_tokens:
            # Those that the chat template itself writes are in every prompt: better said now.
            self.prompt_tokens([{"role": "user", "content": ""}])
            self.completion_tokens("")

    def _model_hash(self) -> str:
        return model_hash(self._card.source, getattr(self._card.config, "_commit_hash", None))

    def _check_unchanged(self) -> None:
        """Raises ModelError where the model's files are not those that this engine is named after."""
        if self._model_hash() != self.base_hash:
            raise ModelError(
                f"The files of {self._card.source!r} have changed since {self.base_name} was made, and their weights "
                "are not loaded yet. Make a new LM of them; it gets a name of its own."
            )

    def canonical(self, model: str) -> str:
        """The full name for a model name in which the base's fingerprint is missing, as older versions wrote it."""
        base, at, adapter = model.partition("@")
        return f"{MODEL_PREFIX}{self.base_name}{at}{adapter}" if base == MODEL_PREFIX + self.short_name else model

    def add_adapter(self, folder: Path) -> str:
        """Serve the adapter in a PEFT folder; returns its model name. Raises ModelError."""
        raise NotImplementedError

    def remove_adapter(self, model: str) -> None:
        """Serve an adapter no more; see `LocalEngine.remove_adapter`."""
        raise NotImplementedError

    def adapter_folder(self, model: str) -> Path | None:
        """Folder of the adapter a model name stands for; None for the base. Raises UnknownAdapterError."""
        return self._adapters.folder(self.canonical(model))

    def adapter_folders(self) -> list[Path]:
        """Folders of all adapters, in the order they were added."""
        return self._adapters.folders()

    def scaled(self, model: str, strength: float, folder: Path | None = None) -> str:
        """Serve an adapter at another strength; see `LocalEngine.scaled`."""
        require_strength("strength", strength)
        source = require_adapter(model, self.adapter_folder(model))
        if strength == 1:
            return model
        parent = source.parent if folder is None else Path(folder).expanduser()
        return self.add_adapter(scaled_folder(source, strength, parent, self.base_name))

    @classmethod
    def shared(cls, model: str | Path, *, adapters: Sequence[str | Path] = (), **options: Any) -> Self:
        """The engine of this process for a model and place: made at the first call, found at later ones.

        A folder whose files have changed is another model. Raises ConfigError when the engine was made with other
        options than those given now, or with some that change answers where none are given.
        """
        asked = cls.options_class.of(options).resolved()
        model = located(model)
        key = (cls, *_identity(model), *asked.place().values())
        with _SHARED_LOCK:
            engine = _SHARED.get(key)
            if engine is None:
                engine = _SHARED[key] = cls(model, **options)
        assert isinstance(engine, cls)
        engine._check_options({name: getattr(asked, name) for name in options} | asked.decisive())
        for folder in adapters:
            engine.add_adapter(Path(folder))
        return engine

    def _check_options(self, asked: Mapping[str, Any]) -> None:
        for name, held in self.options.saved().items():
            if name in asked and as_json(asked[name]) != held:
                raise ConfigError(
                    f"{name}={as_json(asked[name])!r} was asked for, but {self.short_name!r} is loaded in this process "
                    f"with {name}={held!r}. Use the same options, or close() the engine first."
                )

    def messages(self, request: Request) -> tuple[ChatMessage, ...]:
        """The chat messages that a request is rendered from (system first). Raises UnsupportedFeatureError."""
        return messages_of(request)

    def prompt_text(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt as the model's chat template writes it, ending where the answer begins."""
        return self._renderer.text(messages)

    def prompt_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a prompt, ending where the answer begins. Raises ModelError for a token unknown to the model."""
        token_ids = self._renderer.prompt_tokens(messages)
        self._card.check_tokens(token_ids)
        return token_ids

    def completion_tokens(self, completion: str) -> list[int]:
        """Token ids of an answer, ended by the end-of-turn token. Raises ModelError as `prompt_tokens` does."""
        token_ids = self._renderer.completion_tokens(completion)
        self._card.check_tokens(token_ids)
        return token_ids

    def completion_places(self, completion: str) -> list[tuple[int, int]]:
        """Where in a completion each token of `completion_tokens` lies, as start and end in characters; empty where the
        tokenizer can't tell."""
        return self._renderer.completion_places(completion)

    def forced_tokens(self, completion: str, response_format: Mapping[str, Any] | None) -> list[bool]:
        """For each token of `completion_tokens`, whether the grammar of a request's `response_format` leaves no other
        choice. Empty where it leaves one everywhere, does not allow the completion, or llguidance is not installed."""
        places = self.completion_places(completion)
        if response_format is None or not places or not structured_output_available():
            return []
        begins = self._renderer.answer_start(completion)
        first = sum(end <= begins for _, end in places[:-1])
        answer = self._grammars.constraint(response_format).forced_of(self.completion_tokens(completion)[first:])
        return [False] * first + answer if any(answer) else []

    def _constraint(self, response_format: Mapping[str, Any] | None, room: int) -> TokenConstraint | None:
        """What an answer of `room` tokens must follow; None: nothing."""
        return None if response_format is None else self._grammars.constraint(response_format)

    def choices(self, answer: SampledAnswer) -> list[NDArray[np.uint32] | None]:
        """For each token of a sampled answer, the tokens that the model chose it from, one bit each [W]; None where it
        had the choice of all, or none (`forced`). Raises TrainingError for tokens that break the grammar."""
        constraint = self._constraint(answer.response_format, self.max_length)
        if constraint is None:
            return [None] * len(answer.token_ids)
        masks: list[NDArray[np.uint32] | None] = []
        for token_id, forced in zip(answer.token_ids, answer.forced, strict=True):
            bits_W = None if forced else np.zeros((self._card.vocabulary + 31) // 32, dtype=np.uint32)
            try:
                if constraint.ended:
                    # Nothing may follow but the end, which a server appends.
                    if bits_W is not None:
                        bits_W[token_id // 32] = 1 << token_id % 32
                    masks.append(bits_W)
                    continue
                if bits_W is not None:
                    constraint.fill_mask(bits_W.ctypes.data, bits_W.nbytes)
                constraint.advance(token_id)
            except RuntimeError as error:
                raise TrainingError(
                    f"A sampled answer can't be trained on, as it is none of its grammar's: {error}. A server has to "
                    "hold answers to the grammar that it is sent (vLLM: by llguidance, its structured outputs' backend "
                    "'guidance')."
                ) from error
            masks.append(bits_W)
        return masks

    def _rendered(self, request: Request) -> tuple[list[int], int, SamplingOptions]:
        """The prompt's tokens, how many the answer may have at most, and how they are picked.

        Raises lm15's ContextLengthError and UnsupportedFeatureError.
        """
        validate_request(request)
        sampling = SamplingOptions.from_config(request.config)
        if request.config.response_format is None:
            sampling = replace(sampling, stop=(*sampling.stop, *self._renderer.stop))
        prompt_ids = self.prompt_tokens(self.messages(request))
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {len(prompt_ids)} tokens; {self.short_name} takes {self.max_length} for prompt and "
                "answer together. Use fewer or shorter demos, or a model with a longer context."
            )
        return prompt_ids, min(request.config.max_tokens or DEFAULT_MAX_TOKENS, room), sampling

    def finetune(
        self,
        rows: Sequence[TrainingRow],
        *,
        validation_rows: Sequence[TrainingRow] = (),
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        start_from: str | None = None,
        folder: Path | None = None,
        on_progress: ProgressFunction | None = None,
    ) -> FinetuneResult:
        """Train an adapter and serve it under a new name; answers wait meanwhile. See `LocalEngine.finetune`.

        Raises EngineBusyError when a callback of a training asks for another one.
        """
        parent, origin = self._adapters_folder(folder), self._origin(start_from)
        with row_folder(parent) as tokens:
            job = prepare(self, rows, validation_rows, lora, training, origin, parent, tokens)
            with self._turn.taken(self.short_name):
                result = self._train(job, None if on_progress is None else self._turn.marking(on_progress))
        self.add_adapter(result.folder)
        return result

    def policy_session(
        self,
        *,
        policy: PolicyConfig = PolicyConfig(),
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        start_from: str | None = None,
        folder: Path | None = None,
    ) -> AbstractContextManager[PolicySession]:
        """An adapter that learns from rewards while this engine answers with it. See `PolicyEngine`."""
        from .policy import policy_session

        parent, origin = self._adapters_folder(folder), self._origin(start_from)
        return policy_session(self, policy, lora, training, origin, parent)

    def trained_model(self, training: TrainingConfig) -> AbstractContextManager[Any]:
        """The model that a policy session trains; the same one for the whole block."""
        raise NotImplementedError

    def alone(self) -> AbstractContextManager[None]:
        """Train inside the block, while nothing is answered."""
        raise NotImplementedError

    def serve(self, training: PolicyTraining, round_number: int, folder: Path) -> str:
        """Answer with the adapter of a policy session as it is now; returns its model name. It may be written into a
        folder in `folder`, which is there until another one is served."""
        raise NotImplementedError

    def _train(self, job: TrainingJob, on_progress: ProgressFunction | None) -> FinetuneResult:
        """Run a training on this engine's model."""
        raise NotImplementedError

    def _adapters_folder(self, folder: Path | None = None) -> Path:
        """Where trained adapters go: to the folder that is given, or where they go by default."""
        chosen = self.options.cache_folder if folder is None else folder
        return adapters_cache() if chosen is None else Path(chosen).expanduser()

    def _origin(self, start_from: str | None) -> tuple[int, Path | None]:
        """The round of the model that a training goes on from, and its folder where it is an adapter."""
        return (0, None) if start_from is None else (adapter_round(start_from), self.adapter_folder(start_from))

    def dump_state(self) -> dict[str, Any]:
        """Model, options and the folders of the adapters, as JSON."""
        adapters = [str(folder) for folder in self.adapter_folders()]
        return {"model": self._card.source, "adapters": adapters, **self.options.saved()}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Self:
        """The engine for a saved state: the one already loaded in this process where there is one."""
        options = dict(state)
        return cls.shared(options.pop("model"), **options)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return type(self)._unpickled, (self.dump_state(),)

    @classmethod
    def _unpickled(cls, state: dict[str, Any]) -> Self:
        """The engine of a pickle, without the adapters of other runs that were deleted since."""
        return cls.load_state({**state, "adapters": [each for each in state["adapters"] if Path(each).is_dir()]})

    def close(self) -> None:
        """Free what the engine holds; a later call of `shared` makes a new one."""
        with _SHARED_LOCK:
            for key in [key for key, engine in _SHARED.items() if engine is self]:
                del _SHARED[key]

    async def complete_async(self, request: Request) -> Response:
        """`complete` for an event loop."""
        raise NotImplementedError


class AsyncSide:
    """An engine whose `complete` is awaited, for `dspy.LM(async_engine=...)`; the event loop stays free.

    A subclass names the class of its engines.
    """

    engine_class: type[BaseEngine] = BaseEngine

    def __init__(self, engine: BaseEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        return await self.engine.complete_async(request)

    async def stream(self, request: Request) -> AsyncIterator[StreamEvent]:
        """Answer one request as events."""
        async for event in self.engine.stream_async(request):
            yield event

    async def aclose(self) -> None:
        """Nothing to do: the engine belongs to whoever made it."""

    def dump_state(self) -> dict[str, Any]:
        """State of the engine."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Self:
        """The asynchronous side of the engine for a saved state."""
        return cls(cls.engine_class.load_state(state))


_SHARED: dict[tuple[Any, ...], BaseEngine] = {}
_SHARED_LOCK = threading.Lock()


def _forget_shared() -> None:
    """In a forked child: no engine came along with its threads, and the lock may be held by one of those."""
    global _SHARED_LOCK
    _SHARED.clear()
    _SHARED_LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_shared)


def _identity(model: str | Path) -> tuple[str, ...]:
    with readable(model):
        return (str(Path(model).resolve()), model_hash(model)) if Path(model).is_dir() else (str(model),)
