"""A lock for kinds of work that must not overlap, each of which many may do at once."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Gate:
    """Those who come with the same key may be inside together; others wait until they are gone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._key: Hashable = None
        self._inside = 0

    @contextmanager
    def together(self, key: Hashable = None) -> Iterator[None]:
        """Be inside with others of the same key."""
        with self._condition:
            self._condition.wait_for(lambda: self._inside == 0 or self._key == key)
            self._key = key
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside alone."""
        with self.together(object()):
            yield
