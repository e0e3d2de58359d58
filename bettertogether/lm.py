"""`local_lm(...)` and `vllm_lm(...)`: a `dspy.LM` whose engine runs the model and whose provider trains it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.clients.provider import Provider, TrainingJob
from dspy.lm15 import Request

from .checks import plain, require
from .engines._upstream import adapter_message_call
from .engines.answer_format import whole_format
from .engines.lm_options import check_lm_options
from .engines.protocol import MODEL_PREFIX, LocalEngine, TrainingRow
from .errors import ConfigError, DataError, NotTrainableError
from .training.config import LoRAConfig, TrainingConfig

if TYPE_CHECKING:
    from .engines.base_engine import BaseEngine


class LocalTrainingJob(TrainingJob):
    """DSPy's handle on a training that runs in this process."""

    def status(self) -> str:
        """ "running" or "done"."""
        return "done" if self.done() else "running"


class LocalProvider(Provider):
    """Trains LoRA adapters on the engine of the LM, for DSPy's own optimizers (`lm.finetune(...)`)."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = LocalTrainingJob
        self.engine = engine

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: Sequence[Mapping[str, Any]],
        train_data_format: Any = None,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Train on chats whose last message is the answer; returns the new model name.

        `train_kwargs` may hold the fields of `LoRAConfig` and `TrainingConfig`. Raises ConfigError and DataError.
        """
        lora, training = configs_from(train_kwargs or {})
        start_from = model if self.engine.adapter_folder(model) else None
        rows = rows_from_chats(train_data)
        return self.engine.finetune(rows, lora=lora, training=training, start_from=start_from).model


def configs_from(options: Mapping[str, Any]) -> tuple[LoRAConfig, TrainingConfig]:
    """The two configs from one flat mapping of their fields. Raises ConfigError for a name that is neither's."""
    lora_names = {f.name for f in dataclasses.fields(LoRAConfig)}
    training_names = {f.name for f in dataclasses.fields(TrainingConfig)}
    unknown = sorted(options.keys() - lora_names - training_names)
    if unknown:
        raise ConfigError(f"train_kwargs {unknown} are not known. Allowed: {sorted(lora_names | training_names)}.")
    lora = LoRAConfig(**{name: value for name, value in options.items() if name in lora_names})
    return lora, TrainingConfig(**{name: value for name, value in options.items() if name in training_names})


def rows_from_chats(chats: Sequence[Mapping[str, Any]]) -> list[TrainingRow]:
    """Rows from DSPy's chat format: {"messages": [..., {"role": "assistant", "content": answer}]}."""
    rows = []
    for position, chat in enumerate(chats):
        messages = list(chat.get("messages", ()))
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise DataError(f'Row {position} is not {{"messages": [..., {{"role": "assistant", ...}}]}}: {chat!r:.200}')
        prompt = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
        rows.append(TrainingRow(prompt, messages[-1]["content"]))  # type: ignore[arg-type]
    return rows


class LocalLM(dspy.LM):
    """A `dspy.LM` that finds its provider in its engine again after it was saved and loaded, and holds answers to the
    whole schema of the output fields.

    A model name without the base's fingerprint, as older versions wrote it, becomes the full one.
    """

    def __init__(self, model: str, *args: Any, engine: Any = "auto", **options: Any) -> None:
        name = engine.canonical(model) if isinstance(engine, LocalEngine) else model
        super().__init__(name, *args, engine=engine, **options)

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer, as any `dspy.LM`."""
        options = _with_whole_format(messages, kwargs)
        if not self._seeds_each(options):
            return super().__call__(prompt, messages=messages, **options)
        twin = self._seeding()
        with adapter_message_call(twin, messages):
            return super(LocalLM, twin).__call__(prompt, messages=messages, **options)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """`__call__` for an event loop."""
        options = _with_whole_format(messages, kwargs)
        if not self._seeds_each(options):
            return await super().acall(prompt, messages=messages, **options)
        twin = self._seeding()
        with adapter_message_call(twin, messages):
            return await super(LocalLM, twin).acall(prompt, messages=messages, **options)

    def _seeds_each(self, options: Mapping[str, Any]) -> bool:
        """Whether several answers are asked for under one seed: DSPy asks the engine for them one by one, all alike."""
        asked = {**self.kwargs, **options}
        several = (asked.get("n") or 1) > 1 and asked.get("seed") is not None
        return several and isinstance(self.engine, LocalEngine)

    def _seeding(self) -> LocalLM:
        """A twin for one call that gives each answer a seed of its own."""
        twin: LocalLM = self.copy(engine=_Seeding(self.engine), async_engine=_AsyncSeeding(self.engine.asynchronous))
        twin.history = self.history
        return twin

    def dump_state(self) -> dict[str, Any]:
        """State of the LM; of the adapters that its engine serves, it names the LM's own alone."""
        state: dict[str, Any] = super().dump_state()
        engine = local_engine(self)
        for record in (state.get("engine"), state.get("async_engine")):
            if engine is not None and isinstance(record, dict) and record["state"].get("adapters"):
                folder = engine.adapter_folder(self.model)
                record["state"]["adapters"] = [] if folder is None else [str(folder)]
        return state

    def infer_provider(self) -> Provider:
        """The provider that trains on this LM's engine."""
        return LocalProvider(self.engine) if isinstance(self.engine, LocalEngine) else super().infer_provider()


class _Seeding:
    """An engine for one call of an LM: each answer has a seed of its own, the first the call's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    def complete(self, request: Request) -> Any:
        return self._engine.complete(self._seeded(request))

    def stream(self, request: Request) -> Any:
        return self._engine.stream(self._seeded(request))

    def _seeded(self, request: Request) -> Request:
        # Far from one another: the next rollout (dspy.BestOfN) has the next seed.
        seed = (request.config.seed or 0) + 1_000_003 * next(self._numbers)
        return dataclasses.replace(request, config=dataclasses.replace(request.config, seed=seed))


class _AsyncSeeding(_Seeding):
    async def complete(self, request: Request) -> Any:
        return await self._engine.complete(self._seeded(request))


def _with_whole_format(messages: Any, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("response_format") is None:
        return options
    return {**options, "response_format": whole_format(options["response_format"], messages)}


def engine_lm(engine: LocalEngine, model: str | None = None, **lm_options: Any) -> LocalLM:
    """The LM for an engine; `model` names an adapter that the engine holds, None the base."""
    return LocalLM(
        model or MODEL_PREFIX + engine.base_name,
        engine=engine,
        async_engine=engine.asynchronous,
        **{name: plain(value) for name, value in lm_options.items()},
    )


def local_lm(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    adapter: str | Path | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    cache: bool = True,
    engine_options: Mapping[str, Any] | None = None,
    **lm_options: Any,
) -> LocalLM:
    """A `dspy.LM` that runs a Hugging Face model in this process and can be trained.

    Args:
        model: Folder of a transformers model, a hub id such as "meta-llama/Llama-3.1-8B-Instruct", or a GGUF file or a
            folder that holds one, which is converted once.
        revision: Branch, tag or commit of a hub id, as in transformers; None: main.
        token: For the hub, as in transformers; None: that of `hf auth login` or HF_TOKEN. It is not saved.
        adapter: PEFT folder to answer with; None for the base model.
        temperature: 0 takes the likeliest token each time.
        max_tokens: Tokens of an answer at most; None: 1024, or what the context has left.
        cache: Use DSPy's cache of answers. It can't be stale: other weights, precision or template options get another
            model name.
        engine_options: Fields of `TransformersOptions`: dtype, device, max_batch_size, cache_bytes, cache_folder,
            chat_template_kwargs.
        lm_options: Options of `dspy.LM` that a local model has: top_p, top_k, seed, stop, n, logprobs, callbacks,
            num_retries, ...

    The weights are loaded once per process, whatever the number of LMs, and stay until `lm.engine.close()`. Raises
    ConfigError for an option that is not known or that has a value it can't have, and ModelError for a folder or id
    that holds no model.
    """
    from .engines import TransformersEngine

    lm_options |= {"temperature": temperature, "max_tokens": max_tokens, "cache": cache}
    return _shared_lm(TransformersEngine, (model, revision, token), adapter, engine_options, lm_options)


def vllm_lm(
    model: str | Path,
    *,
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    adapter: str | Path | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    cache: bool = True,
    engine_options: Mapping[str, Any] | None = None,
    **lm_options: Any,
) -> LocalLM:
    """The same as `local_lm`, with the model served by vLLM: for models, batches and machines beyond one process.

    Args:
        model: As for `local_lm`.
        revision: As for `local_lm`.
        token: As for `local_lm`.
        url: vLLM server that serves it already, "http://host:8000" or "https://host", or a list of several that share
            the requests: prompts of one predictor go to one server, where their prefix is cached, up to 1.25 times its
            share; a server that is gone is left out, and tried again. None starts one on this machine at the first
            request.
        api_key: Key of those servers; the environment's VLLM_API_KEY when None. It is not saved with a program.
        adapter: PEFT folder to answer with; None for the base model.
        temperature: 0 takes the likeliest token each time.
        max_tokens: Tokens of an answer at most; None: 1024, or what the context has left.
        cache: Use DSPy's cache of answers. It can't be stale: other weights, precision or template options get another
            model name.
        engine_options: Fields of `VLLMOptions`: server_options, command, concurrency, max_adapters,
            stop_while_training, request_timeout_s, ...
        lm_options: Options of `dspy.LM`, as of `local_lm`. `num_retries` (3) is how often a request is tried again,
            after 1, 2, 4, ... s, that no server answers.

    Raises ConfigError for a value that an option can't have, and ModelError for a folder or id that holds no model, for
    a `url` where no vLLM answers, and for servers of different models.
    """
    from .engines import VLLMEngine

    lm_options |= {"temperature": temperature, "max_tokens": max_tokens, "cache": cache}
    return _shared_lm(
        VLLMEngine, (model, revision, token), adapter, engine_options, lm_options, url=url, api_key=api_key
    )


def _shared_lm(
    engine_class: type[BaseEngine],
    source: tuple[str | Path, str | None, str | bool | None],
    adapter: str | Path | None,
    engine_options: Mapping[str, Any] | None,
    lm_options: Mapping[str, Any],
    **place: Any,
) -> LocalLM:
    """The LM for this process's engine of a model; `source` is its name, revision and token."""
    model, revision, token = source
    are_options = isinstance(engine_options, Mapping | None)
    require(are_options, "engine_options", engine_options, "a mapping of names to values")
    options = {**(engine_options or {}), **place}
    engine_class.options_class.check_names(options, also=frozenset({"adapters"}))
    check_lm_options(lm_options, engine_class.options_class.names())
    names_one = isinstance(model, str | Path) and bool(str(model))
    require(names_one, "model", model, "the folder of a model, or a hub id")
    if not isinstance(revision, str | None) or not isinstance(token, str | bool | None):
        raise ConfigError("revision= or token= is not allowed as given: give text, or None.")
    require(isinstance(adapter, str | Path | None), "adapter", adapter, "the folder of a PEFT adapter, or None")
    from .engines.loading import located

    engine: Any = engine_class.shared(located(model, revision=revision, token=token), **options)
    name = engine.add_adapter(Path(adapter).expanduser()) if adapter is not None else None
    return engine_lm(engine, name, **lm_options)


def local_engine(lm: Any) -> LocalEngine | None:
    """The engine that can train an LM, or None."""
    engine = getattr(lm, "engine", None)
    return engine if isinstance(engine, LocalEngine) else None


def require_engine(lm: Any, predictor: str) -> LocalEngine:
    """The engine that can train an LM. Raises NotTrainableError."""
    engine = local_engine(lm)
    if engine is None:
        raise NotTrainableError(
            f"Predictor {predictor!r} uses {getattr(lm, 'model', lm)!r}, which can't be trained here: weights "
            "within reach are needed. Use bettertogether.local_lm(folder_or_hub_id) or vllm_lm(...), or name the "
            "predictor in frozen=[...] to leave it as it is, or use dspy.BootstrapFinetune for a provider's own "
            "training service."
        )
    return engine
