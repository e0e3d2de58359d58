"""Watch a compile run: events, callbacks, and how deep code reaches them.

A run opens `listening(callbacks)`; anything below it calls `emit("progress", {...})` with no further argument, and
nothing happens when nobody listens. Listeners are found through a context variable, and, from a thread that did not
inherit the context (`threading.Thread`, an engine's worker, dspy's own executors), through the one run that is under
way in the process. With several runs under way at once, an event from such a thread can't be told apart and is
dropped; `parallel_map` copies the context, so this concerns foreign threads only. What works by itself, such as
`evaluate` and the `compile` of a step, listens without callbacks: what it emits is of no run in another thread.

Callbacks observe, they can't change a run. One run's callbacks are never called by two threads at once. What a
callback raises is raised by `emit`, and once more at the end of `listening`, in case it was raised in a worker thread
that turned it into a failed example.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from ..errors import ConfigError
from ..printable import get_logger
from ..records import Ledger, RewardLine, StepRecord

if TYPE_CHECKING:
    from ..report.report import CompileReport
    from ..training.progress import TrainingProgress

logger = get_logger(__name__)

EventName = Literal["run_start", "step_start", "candidate", "progress", "training", "warning", "step_end", "run_end"]


class RunStartEvent(TypedDict):
    """A compile run begins or goes on."""

    strategy: str
    """What was asked for, such as "p -> w -> p"."""
    rounds: Sequence[str]
    """The strategy prefix of every round, in order; "" is the untouched student, and all that is known of
    strategy="auto", which chooses its rounds one by one."""
    finished: NotRequired[Sequence[StepRecord]]
    """Records of these rounds that the directory has; empty for a new run."""
    run_dir: NotRequired[str]
    params: NotRequired[Mapping[str, Any]]
    """What was asked, as in run.json: seeds, options, hashes, versions."""
    left_s: NotRequired[float | None]
    """Seconds until `Budget.minutes` are over; None without them."""


class StepStartEvent(TypedDict):
    """A step begins. Index 0 is the scoring of the untouched student."""

    index: int
    step: str
    """Key of the optimizer; "" for the student."""
    strategy: str
    """The strategy prefix that ends with this step."""


class CandidateEvent(TypedDict):
    """A prompt candidate was scored."""

    number: int
    """From 1."""
    total: int | None
    """Candidates there will be; None when not known."""
    score: float
    """Mean on what it was scored on so far of the data that the step selects by, in the metric's unit."""
    best_score: float
    """The best of the candidates that were scored on as many examples, this one included."""


class ProgressEvent(TypedDict):
    """A pass over examples begins (nothing is done) or moved on."""

    phase: str
    """What is being done, such as "collect training data" or "score p -> w"."""
    done: int
    total: int
    at_once: NotRequired[int]
    """How many of them are run at the same time."""
    tokens: NotRequired[int]
    """Prompt and generated tokens since the last event."""
    cost: NotRequired[float | None]
    """US dollars since the last event; None where the price of an LM is not known."""
    ledger: NotRequired[Ledger]
    """All that was spent since the last event, tokens and cost included."""


class TrainingEvent(TypedDict):
    """An optimizer step of a training run was taken, or a held-out loss was measured."""

    progress: TrainingProgress
    adapter: NotRequired[str]
    """Which of the adapters that a step trains one after another: "adapter 1/2" is the first of two. Not there where it
    learns from rewards, all adapters at once."""
    rewards: NotRequired[RewardLine]
    """What the step's runs earned, where it learned from rewards."""
    left_s: NotRequired[float | None]
    """Seconds until `TrainingConfig.max_minutes` are over, without those of an earlier sitting; None without them."""
    may_end_early: NotRequired[bool]
    """Whether it ends before its last epoch where the rows held out are answered no better."""


class WarningEvent(TypedDict):
    """Something makes a score or a step meaningless, such as a metric that fails on every example."""

    text: str


class StepEndEvent(TypedDict):
    """A step ended, or is taken over from an earlier call with the same run directory.

    Its record is on disk, unless the scoring of the student was ended by the budget, or that of a 2x2 by the budget or
    Ctrl-C: the next call makes up for that and tells of the step again.
    """

    record: StepRecord


class RunEndEvent(TypedDict):
    """The run ended: with a report, or with an error."""

    report: CompileReport | None
    error: NotRequired[str | None]
    """What stopped the run; None when it is complete."""


Event = (
    RunStartEvent
    | StepStartEvent
    | CandidateEvent
    | ProgressEvent
    | TrainingEvent
    | WarningEvent
    | StepEndEvent
    | RunEndEvent
)


class Callback:
    """Base of everything that watches a run: override what you need. See the event types for what each one gets."""

    def on_run_start(self, event: RunStartEvent) -> None:
        """A compile run begins or goes on."""

    def on_step_start(self, event: StepStartEvent) -> None:
        """A step begins."""

    def on_candidate(self, event: CandidateEvent) -> None:
        """A prompt candidate was scored."""

    def on_progress(self, event: ProgressEvent) -> None:
        """A pass over examples moved on. Called often: return quickly."""

    def on_training(self, event: TrainingEvent) -> None:
        """A training run moved on."""

    def on_warning(self, event: WarningEvent) -> None:
        """Something makes a score or a step meaningless."""

    def on_step_end(self, event: StepEndEvent) -> None:
        """A step ended."""

    def on_run_end(self, event: RunEndEvent) -> None:
        """The run ended, well or not."""

    def close(self) -> None:
        """Give back what is held (a terminal, a file). Always called last, also after an error or Ctrl-C."""


class _Listeners:
    """The callbacks of one `listening` block, and the block around it."""

    def __init__(self, callbacks: Sequence[Callback], parent: _Listeners | None) -> None:
        outer = parent.blocks if parent else ()
        known = [callback for block in outer for callback in block.own]
        self.own: tuple[Callback, ...] = tuple(callback for callback in callbacks if callback not in known)
        self.blocks: tuple[_Listeners, ...] = (*outer, self)
        self.lock: threading.RLock = parent.lock if parent else threading.RLock()
        self.error: Exception | None = None

    def deliver(self, name: str, event: Any) -> None:
        with self.lock:
            for block in self.blocks:
                for callback in block.own:
                    try:
                        getattr(callback, f"on_{name}")(event)
                    except Exception as error:
                        block.error = block.error or error
                        raise


_current: contextvars.ContextVar[_Listeners | None] = contextvars.ContextVar("bettertogether_listeners", default=None)
_active: list[_Listeners] = []
_active_lock = threading.Lock()


def emit(name: EventName, event: Event) -> None:
    """Send an event to the callbacks of the run under way; does nothing when there is none.

    `name` is the method without its "on_". Raises what a callback raises.
    """
    listeners = _current.get() or _only_run()
    if listeners is not None:
        listeners.deliver(name, event)


def watched() -> bool:
    """Whether anybody is sent the events that are emitted here."""
    return (_current.get() or _only_run()) is not None


@contextlib.contextmanager
def run_end_on_error() -> Iterator[None]:
    """Send the end of the run, without a report, when the block raises; what it raises comes first in any case."""
    try:
        yield
    except BaseException as error:
        try:
            emit("run_end", {"report": None, "error": repr(error)})
        finally:
            raise error


def warn(text: str) -> None:
    """Say at once, in the log and to the callbacks, what makes a score or a step meaningless."""
    logger.warning("%s", text)
    emit("warning", {"text": text})


def told(*warnings: str | None) -> tuple[str, ...]:
    """Warn of each that is not None, and return those."""
    given = tuple(warning for warning in warnings if warning is not None)
    for warning in given:
        warn(warning)
    return given


def _only_run() -> _Listeners | None:
    with _active_lock:
        roots = {id(listeners.blocks[0]) for listeners in _active}
        return _active[-1] if len(roots) == 1 else None


def require_callbacks(callbacks: object) -> None:
    """Raise ConfigError unless this is a list of callbacks."""
    if isinstance(callbacks, str | Mapping) or not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks={callbacks!r} is not allowed: give a list of bettertogether.Callback objects.")
    for position, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            made = " (an object, not the class)" if isinstance(callback, type) else ""
            raise ConfigError(
                f"callbacks[{position}]={callback!r} is not allowed: give a bettertogether.Callback{made}."
            )


@contextlib.contextmanager
def listening(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Send the events of the block to `callbacks`, and to those of an enclosing `listening`.

    Raises, at the end of the block, what a callback raised where nobody saw it. Closes the callbacks in any case.
    Raises ConfigError before anything else for what is no list of callbacks.
    """
    require_callbacks(callbacks)
    listeners = _Listeners(callbacks, _current.get())
    token = _current.set(listeners)
    with _active_lock:
        _active.append(listeners)
    try:
        with contextlib.ExitStack() as closing:
            for callback in reversed(listeners.own):
                closing.callback(callback.close)
            yield
            if listeners.error is not None:
                raise listeners.error
    finally:
        with _active_lock:
            _active.remove(listeners)
        _current.reset(token)
