"""A fake engine whose best answer is known. No torch here.

engine = FakeEngine(lambda request: {"answer": "yes"})
program.set_lm(engine_lm(engine))
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    Usage,
)

from ..checks import require_strength
from ..engines._upstream import StreamEvent
from ..engines.held_adapters import HeldAdapters
from ..engines.protocol import (
    MODEL_PREFIX,
    ChatMessage,
    FinetuneResult,
    TrainingRow,
    adapter_model_name,
    adapter_round,
    require_adapter,
)
from ..engines.rendering import messages_of
from ..errors import DataError, NoTrainingDataError
from ..training.auto import resolved
from ..training.config import LoRAConfig, TrainingConfig
from ..training.progress import ProgressFunction, TrainingProgress

FAKE_WIDTH = 2000
"""Hidden size by which "auto" picks the learning rate that is reported."""


@dataclass(frozen=True)
class FakeRequest:
    """What the answer function of a `FakeEngine` is given."""

    model: str
    messages: tuple[ChatMessage, ...]
    temperature: float
    seed: int | None
    schema: Mapping[str, Any] | None
    """JSON schema of the answer, when the adapter asked for one."""
    learned: str | None
    """The answer that this adapter was trained to give to exactly this prompt; None otherwise."""
    trained_on: int
    """Rows this adapter was trained on; 0 for the base."""
    strength: float
    """Of this adapter, times what it was trained to be; 1 for the base."""

    @property
    def system(self) -> str:
        """The system message."""
        return "".join(m["content"] for m in self.messages if m["role"] == "system")

    @property
    def user(self) -> str:
        """The last user message."""
        return [m["content"] for m in self.messages if m["role"] == "user"][-1]

    @property
    def demos(self) -> int:
        """Number of demos in the prompt."""
        return sum(m["role"] == "assistant" for m in self.messages)

    @property
    def round(self) -> int:
        """Rounds of training behind the model: 0 for the base."""
        return adapter_round(self.model)


Answer = str | Mapping[str, Any]


class FakeEngine:
    """A `LocalEngine` that asks a function for its answers and "trains" by remembering its rows."""

    supported_params = frozenset({"temperature", "max_tokens", "seed", "stop", "response_format"})
    supports_response_schema = True
    supports_function_calling = False
    supports_reasoning = False
    base_hash: str | None = None

    def __init__(
        self,
        answer: Callable[[FakeRequest], Answer],
        *,
        base_name: str = "fake",
        max_length: int = 100_000,
        concurrency: int = 8,
        delay_s: Callable[[FakeRequest], float] | None = None,
    ) -> None:
        self.answer = answer
        self.base_name = self.short_name = base_name
        self.max_length = max_length
        self.concurrency = concurrency
        self.delay_s = delay_s
        self.requests: list[FakeRequest] = []
        """Every request that reached the engine, in order of arrival."""
        self.trainings: list[tuple[TrainingRow, ...]] = []
        """The rows of every training, in order."""
        self._held = HeldAdapters(base_name)
        self._adapters: dict[str, _FakeAdapter] = {}
        self._counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._lock = threading.Lock()
        self._number = next(_NUMBERS)
        _ENGINES[self._number] = self

    def __copy__(self) -> FakeEngine:
        return self

    def __deepcopy__(self, memo: Any) -> FakeEngine:
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Not the class method, whose function cloudpickle takes apart, with the registry that it names.
        return _living, (type(self), self.dump_state())

    @property
    def asynchronous(self) -> _Asynchronous:
        """The same engine for `dspy.LM(async_engine=...)`."""
        return _Asynchronous(self)

    def canonical(self, model: str) -> str:
        """The name itself: no name of this engine has a hash."""
        return model

    def complete(self, request: Request) -> Response:
        """Answer with what the function says; mappings become JSON."""
        messages = self.messages(request)
        adapter = self._adapter(request.model)
        fake = FakeRequest(
            model=request.model,
            messages=messages,
            temperature=request.config.temperature or 0.0,
            seed=request.config.seed,
            schema=(request.config.response_format or {}).get("schema"),
            learned=adapter.answer_to(messages),
            trained_on=len(adapter.memory),
            strength=adapter.strength,
        )
        with self._lock:
            self.requests.append(fake)
        if self.delay_s:
            time.sleep(self.delay_s(fake))
        answer = self.answer(fake)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        prompt, generated = len(self.prompt_tokens(messages)), len(self.completion_tokens(text))
        with self._lock:
            for name, count in zip(self._counts, (1, prompt, generated), strict=True):
                self._counts[name] += count
        usage = Usage(input_tokens=prompt, output_tokens=generated)
        return Response(None, request.model, Message.assistant(text), "stop", usage)

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """The whole answer as one delta."""
        response = self.complete(request)
        yield StreamStartEvent(model=request.model)
        yield StreamDeltaEvent(TextDelta(response.text or ""))
        yield StreamEndEvent("stop", response.usage)

    def messages(self, request: Request) -> tuple[ChatMessage, ...]:
        """As the engines that run a model have them. Raises lm15's UnsupportedFeatureError for what is not text."""
        return messages_of(request)

    def prompt_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """One token a word."""
        return [_word(word) for message in messages for word in (message["role"], *message["content"].split())]

    def completion_tokens(self, completion: str) -> list[int]:
        """One token a word, and one for the end."""
        return [*(_word(word) for word in completion.split()), 0]

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
        """Remember every row under each of its prompts, and of a pair the answer to prefer; the held-out loss falls by
        a half where there are validation rows, and so does that of each of their fields."""
        if not rows:
            raise NoTrainingDataError("no rows")
        pairs = {row.rejected is not None for row in (*rows, *validation_rows)}
        if len(pairs) > 1:
            raise DataError("pairs among rows: give pairs alone, or rows alone.")
        training = resolved(training, FAKE_WIDTH, len(rows), held_out=bool(validation_rows), pairs=True in pairs)
        epochs, rate = training.epochs, training.learning_rate
        assert not isinstance(epochs, str)
        assert not isinstance(rate, str)
        trained = (self._adapter(start_from) if start_from else _BASE).after(rows)
        with self._lock:
            self.trainings.append(tuple(rows))
        where = trained.save(Path(folder or mkdtemp(prefix="fake-adapters-")), self.base_name)
        tokens = sum(len(self.prompt_tokens(r.messages)) + len(self.completion_tokens(r.completion)) for r in rows)
        before, after = losses = (2.0, 1.0) if validation_rows else (None, None)
        fields = {span.name: losses for row in validation_rows for span in row.fields}
        line = TrainingProgress(
            step=1,
            total_steps=1,
            epoch=1.0,
            loss=1.0,
            validation_loss=after,
            tokens=tokens * epochs,
            learning_rate=rate,
            new_tokens=tokens * epochs,
        )
        if on_progress:
            on_progress(line)
        model = self.add_adapter(where)
        return FinetuneResult(
            model=model,
            folder=where,
            history=(line,),
            best_epoch=epochs,
            tokens=line.tokens,
            seconds=0.0,
            base_validation_loss=before,
            validation_loss=after,
            all_tokens_loss=losses,
            field_losses=fields,
        )

    def add_adapter(self, folder: Path) -> str:
        """Serve the adapter that `finetune` wrote into this folder."""
        adapter = _FakeAdapter.read(folder)
        model = adapter.name(self.base_name)
        self._adapters[model] = adapter
        self._held.hold(model, folder)
        return model

    def remove_adapter(self, model: str) -> None:
        """Forget an adapter."""
        self._held.remove(model)

    def adapter_folder(self, model: str) -> Path | None:
        """Where an adapter lies; None for the base."""
        return self._held.folder(model)

    def scaled(self, model: str, strength: float, folder: Path | None = None) -> str:
        """The same memory at another strength, which the answer function is told."""
        require_strength("strength", strength)
        source = require_adapter(model, self.adapter_folder(model))
        adapter = self._adapter(model)
        scaled = replace(adapter, strength=adapter.strength * strength)
        return model if strength == 1 else self.add_adapter(scaled.save(folder or source.parent, self.base_name))

    def counters(self) -> dict[str, int]:
        """Requests and tokens so far."""
        with self._lock:
            return dict(self._counts)

    def dump_state(self) -> dict[str, Any]:
        """A fake engine is found again by its number, in this process and while it lives."""
        return {"number": self._number, "adapters": [str(folder) for folder in self._held.folders()]}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> FakeEngine:
        """The living engine of that number."""
        engine = _ENGINES[state["number"]]
        for folder in state["adapters"]:
            engine.add_adapter(Path(folder))
        return engine

    def close(self) -> None:
        """Nothing to free."""

    def _adapter(self, model: str) -> _FakeAdapter:
        self._held.check(model)
        return self._adapters.get(model, _BASE)


@dataclass(frozen=True)
class _FakeAdapter:
    round: int
    memory: dict[str, str]
    """The answers to the rows' prompts, by the hashes of these."""
    strength: float = 1.0
    forms: dict[str, str] = field(default_factory=dict)
    """The answers to the rows' other prompts."""

    def answer_to(self, messages: Sequence[ChatMessage]) -> str | None:
        if not self.memory:
            return None
        key = _key(messages)
        return self.memory.get(key, self.forms.get(key))

    def name(self, base_name: str) -> str:
        held = [self.memory, self.strength, self.forms]
        content = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        return adapter_model_name(base_name, self.round, content)

    def after(self, rows: Sequence[TrainingRow]) -> _FakeAdapter:
        """The adapter that is trained from this one: it knows these rows too, under each of their prompts."""
        memory = {_key(row.messages): row.completion for row in rows}
        forms = {_key(form): row.completion for row in rows for form in row.forms}
        return replace(self, round=self.round + 1, memory=self.memory | memory, forms=self.forms | forms)

    def save(self, parent: Path, base_name: str) -> Path:
        folder = parent / self.name(base_name).removeprefix(MODEL_PREFIX)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fake_adapter.json").write_text(json.dumps(vars(self)))
        return folder

    @classmethod
    def read(cls, folder: Path) -> _FakeAdapter:
        return cls(**json.loads((folder / "fake_adapter.json").read_text()))


_BASE = _FakeAdapter(0, {})
_NUMBERS = itertools.count()
_ENGINES: weakref.WeakValueDictionary[int, FakeEngine] = weakref.WeakValueDictionary()


def _living(kind: type[FakeEngine], state: dict[str, Any]) -> FakeEngine:
    return kind.load_state(state)


class _Asynchronous:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def complete(self, request: Request) -> Response:
        return self._engine.complete(request)

    def dump_state(self) -> dict[str, Any]:
        return self._engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> _Asynchronous:
        return cls(FakeEngine.load_state(state))


def _key(messages: Sequence[ChatMessage]) -> str:
    return hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=100_000)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:3], "big") + 1
