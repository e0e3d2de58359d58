"""One training of an engine at a time, and the knowledge of whether a call comes out of its progress callback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import EngineBusyError
from ..printable import get_logger
from ..training.progress import ProgressFunction, TrainingProgress

logger = get_logger(__name__)

_within: ContextVar[tuple[TrainingTurn, ...]] = ContextVar("_within", default=())


class TrainingTurn:
    """Trainings of one engine come one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Train inside the block. Raises EngineBusyError for a training that the one before it would wait for."""
        if self.in_callback:
            raise EngineBusyError(
                f"A callback of a training of {name} asks for another training of it, which can't begin before the "
                "first has ended. Ask for it when finetune has returned."
            )
        if not self._lock.acquire(blocking=False):
            logger.info("A training of %s waits for the end of the one before it.", name)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @property
    def in_callback(self) -> bool:
        """Whether this code runs in a progress callback of the training."""
        return self in _within.get()

    def marking(self, on_progress: ProgressFunction) -> ProgressFunction:
        """The callback, inside which `in_callback` is true, also in tasks and pools that take the context along."""

        def marked(line: TrainingProgress) -> None:
            token = _within.set((*_within.get(), self))
            try:
                on_progress(line)
            finally:
                _within.reset(token)

        return marked
