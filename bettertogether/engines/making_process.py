"""Which process an engine is of: its threads, connections and locks are of no use in a fork of that."""

from __future__ import annotations

import os

from ..errors import EngineClosedError


class MakingProcess:
    """The process that something was made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether this code runs there, and not in a fork of it."""
        return os.getpid() == self._pid

    def check(self, maker: str) -> None:
        """Raises EngineClosedError in a fork, with the call that makes another engine. Takes no lock: a fork may have
        left one taken."""
        if not self.is_this:
            raise EngineClosedError(
                "This engine was made in another process, and its threads and connections did not come along with the "
                f"fork. Call {maker} in this process, which makes an engine of its own, or start processes with the "
                "'spawn' method."
            )
