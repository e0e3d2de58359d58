"""A lock for kinds of work that must not overlap, each of which many may do at once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class _Visit:
    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.admitted = False


class Gate:
    """Those who come with the same key may be inside together; others wait until they are gone.

    Whoever waits longest comes next, with all who wait with the same key: while others wait, nobody joins those inside.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._key: Hashable = None
        self.inside = 0
        """How many are inside."""
        self._waiting: list[_Visit] = []

    @contextmanager
    def together(self, key: Hashable = None) -> Iterator[None]:
        """Be inside with others of the same key."""
        visit = _Visit(key)
        try:
            with self._condition:
                self._waiting.append(visit)
                self._admit()
                self._condition.wait_for(lambda: visit.admitted)
            yield
        finally:
            with self._condition:
                if visit.admitted:
                    self.inside -= 1
                else:
                    self._waiting.remove(visit)
                self._admit()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside alone."""
        with self.together(object()):
            yield

    def _admit(self) -> None:
        """Let in whoever may be inside now."""
        if self.inside == 0 and self._waiting:
            self._key = self._waiting[0].key
        elif any(visit.key != self._key for visit in self._waiting):
            return
        admitted = [visit for visit in self._waiting if visit.key == self._key]
        for visit in admitted:
            visit.admitted = True
            self._waiting.remove(visit)
        self.inside += len(admitted)
        self._condition.notify_all()
