"""The contract between the optimizer and the thing that runs the model. No torch here.

An engine owns one base model and any number of LoRA adapters over it. It answers requests (DSPy's engine API,
`dspy/clients/engines/base.py` in dspy 3.4), renders prompts to tokens, and trains adapters. Everything above this
package talks to models through it, so a test can put `bettertogether.testing.FakeEngine` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

from dspy.lm15 import Request, Response

from ..errors import ConfigError
from ..training.config import LoRAConfig, PolicyConfig, TrainingConfig
from ..training.progress import PolicyUpdate, ProgressFunction, TrainingProgress
from ._upstream import StreamEvent
from .answers import SampledAnswer


class ChatMessage(TypedDict):
    """One turn of a prompt."""

    role: str
    content: str


class FieldSpan(NamedTuple):
    """The characters of a completion that hold the value of an output field."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class TrainingRow:
    """One call to learn: the messages that the engine would receive, and the answer to give.

    The loss is on the completion alone, which the engine ends with the model's end-of-turn token. With `rejected` it is
    a pair, of which the model learns to prefer the completion.
    """

    messages: tuple[ChatMessage, ...]
    """The zero-shot prompt, or the only one."""
    completion: str
    forms: tuple[tuple[ChatMessage, ...], ...] = ()
    """Other prompts of the same call (with demos), which a batch may show in place of `messages`. Form number i of all
    rows of one predictor shows one demo set, so that the rows of a batch share it as their prefix."""
    response_format: Mapping[str, Any] | None = None
    """What the request asks of the answer, as the engine gets it: tells which tokens the grammar leaves free."""
    fields: tuple[FieldSpan, ...] = ()
    """Where the output fields' values lie in the completion; the held-out loss is given for each."""
    rejected: str | None = None
    """A worse answer to the same prompt, which a pair has, and no other form of the prompt."""


@dataclass(frozen=True)
class FinetuneResult:
    """A trained adapter, already served by the engine that trained it."""

    model: str
    """The name to ask for, such as "local/SmolLM2-135M-Instruct-5d2c90aa@r1-3f9c2a1b"."""
    folder: Path
    """Plain PEFT adapter folder: adapter_config.json and adapter_model.safetensors."""
    history: tuple[TrainingProgress, ...]
    best_epoch: int
    """Epoch whose weights were kept, from 1."""
    tokens: int
    seconds: float
    base_validation_loss: float | None = None
    """Held-out loss before training; None without validation rows. It is the mean over the completion tokens that the
    grammar of `response_format` leaves free; over all of them where nothing is forced. Of pairs, the mean over them."""
    validation_loss: float | None = None
    """Held-out loss of the weights kept."""
    skipped_rows: tuple[tuple[int, str], ...] = field(default=())
    """Rows left out, as (index, reason)."""
    all_tokens_loss: tuple[float | None, float | None] = (None, None)
    """Held-out loss over all completion tokens, before training and of the weights kept; of pairs, over those of the
    chosen answers."""
    validation_error: tuple[float | None, float | None] = (None, None)
    """Held-out error (see `TrainingProgress.validation_error`), before training and of the weights kept; None for
    pairs."""
    field_losses: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """By output field: the held-out loss of the free tokens of its values, before training and of the weights kept."""
    out_of_time: bool = False
    """Whether `TrainingConfig.max_minutes` ended it before its last step."""


@runtime_checkable
class LocalEngine(Protocol):
    """What `LoRAFinetune`, `local_lm` and the rest of the package ask of an engine.

    `supported_params`, `supports_...`, `complete` and `stream` are DSPy's; the rest is ours. All methods may be
    called from many threads. `copy.copy`, `copy.deepcopy` and `pickle` of an engine give the same engine back.
    """

    base_name: str
    """The base model's name, such as "SmolLM2-135M-Instruct-5d2c90aa", which ends in a hash of whatever decides its
    answers: weights, config, tokenizer, precision, template options. Its model name is "local/" + base_name."""
    short_name: str
    """The base's name without that hash."""
    supported_params: frozenset[str]
    supports_response_schema: bool
    supports_function_calling: bool
    supports_reasoning: bool
    max_length: int
    """Context length in tokens: prompt and answer together."""
    concurrency: int
    """Requests worth having in flight at once."""

    @property
    def base_hash(self) -> str | None:
        """SHA-256 (hex) of the base model's files; None where there are none."""
        ...

    @property
    def asynchronous(self) -> Any:
        """The same engine for `dspy.LM(async_engine=...)`, or None where it has no such side."""
        ...

    def complete(self, request: Request) -> Response:
        """Answer one request; `request.model` picks the adapter."""
        ...

    def stream(self, request: Request) -> Iterator[StreamEvent]:
        """Answer one request as events."""
        ...

    def messages(self, request: Request) -> tuple[ChatMessage, ...]:
        """The chat messages that a request is rendered from (system first)."""
        ...

    def prompt_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a prompt, ending where the answer begins. The one place where prompts become tokens."""
        ...

    def completion_tokens(self, completion: str) -> list[int]:
        """Token ids of an answer, ended by the end-of-turn token."""
        ...

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
        """Train an adapter and serve it under a new name, on rows or on pairs. `start_from` is the model name of an
        adapter to continue from; None starts at the base weights. The adapter's folder is `folder`/<adapter name> (a
        cache folder when None). Raises NoTrainingDataError without rows, DataError for pairs among rows."""
        ...

    def canonical(self, model: str) -> str:
        """The full name for a model name in which the base's hash is missing, as older versions wrote it."""
        ...

    def add_adapter(self, folder: Path) -> str:
        """Serve the adapter in a PEFT folder; returns its model name, which is the same for the same content. One
        that is served already stays in its folder; once that is gone, the next one given for it stands in."""
        ...

    def remove_adapter(self, model: str) -> None:
        """Serve an adapter no more; its folder stays. Nothing happens for one that is not held."""
        ...

    def adapter_folder(self, model: str) -> Path | None:
        """Folder of the adapter a model name stands for; None for the base. Raises UnknownAdapterError."""
        ...

    def scaled(self, model: str, strength: float, folder: Path | None = None) -> str:
        """Serve an adapter at another strength, 1.0 being as it is; returns the model name, that of an adapter of its
        own, whose folder is `folder`/<adapter name> (beside the original when None). Scaled twice, strengths
        multiply. Raises ConfigError for the base and for a strength outside (0, 2], UnknownAdapterError."""
        ...

    def counters(self) -> dict[str, int]:
        """Work done since the engine was made: requests, prompt_tokens, generated_tokens, ..."""
        ...

    def dump_state(self) -> dict[str, Any]:
        """JSON-serializable state, from which `load_state` gives an equal engine (DSPy's saving protocol)."""
        ...

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The engine for a saved state: the one already loaded in this process where there is one."""
        ...

    def close(self) -> None:
        """Stop the worker and free the weights."""
        ...


@dataclass(frozen=True)
class RewardedAnswer:
    """An answer as it was sampled, and how good it was."""

    sampled: SampledAnswer
    advantage: float
    """Its reward minus the mean of its group."""


class PolicySession(Protocol):
    """An adapter that learns from rewards while its engine answers with it."""

    model: str
    """The name to ask for the adapter as it is now; another one after each change."""

    def update(self, answers: Sequence[RewardedAnswer]) -> PolicyUpdate:
        """Learn from the answers of a step, and answer with the new weights. Raises TrainingError, and
        NoTrainingDataError where no answer has a token that was the model's choice."""
        ...

    def keep(self) -> None:
        """Take the weights as they are for the best so far."""
        ...

    def save(self, folder: Path, run: str) -> None:
        """Write the state of a run, by its name, into a folder: all that it takes to go on."""
        ...

    def load(self, folder: Path, run: str) -> None:
        """Go on from what `save` wrote. Raises TrainingError for another run's state."""
        ...

    def finish(self) -> tuple[str, Path]:
        """Write the best adapter, the last one where none was kept, and serve it; its model name and its folder."""
        ...


@runtime_checkable
class CheckingEngine(LocalEngine, Protocol):
    """An engine that can refuse a training before there are rows for it."""

    def check_training(self, lora: LoRAConfig | None, training: TrainingConfig) -> None:
        """Raise ConfigError, or MissingExtraError, for what is known without weights or rows to be no training of this
        engine's. `lora` is None where an adapter is trained further."""
        ...


@runtime_checkable
class PolicyEngine(LocalEngine, Protocol):
    """An engine whose model can learn from rewards. Requests with `store=True` get a `SampledAnswer`."""

    def policy_session(
        self,
        *,
        policy: PolicyConfig = PolicyConfig(),
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        start_from: str | None = None,
        folder: Path | None = None,
    ) -> AbstractContextManager[PolicySession]:
        """An adapter that learns from rewards inside the block, new or going on from the adapter `start_from`. Nothing
        is written but what `save` and `finish` write, these under `folder` (a cache folder when None). Several sessions
        may be open at once. Raises ConfigError for a training in other processes."""
        ...


MODEL_PREFIX = "local/"


def require_adapter(model: str, folder: Path | None) -> Path:
    """The folder of an adapter. Raises ConfigError for the base model, which has none."""
    if folder is None:
        raise ConfigError(f"{model!r} is a base model, which has no strength: give the name of an adapter over it.")
    return folder


def adapter_model_name(base_name: str, round_number: int, content_hash: str) -> str:
    """ "local/BASE@rN-HASH": a name that changes whenever the weights do, so no cache can answer for old ones."""
    return f"{MODEL_PREFIX}{base_name}@r{round_number}-{content_hash[:8]}"


def adapter_round(model: str) -> int:
    """How many rounds of training a model name has behind it; 0 for a base model."""
    _, at, adapter = model.partition("@")
    number = adapter.partition("-")[0].removeprefix("r")
    return int(number) if at and number.isdigit() else 0
