"""One event loop, in a thread of its own, for every async program that is run here.

An `asyncio.Semaphore`, lock, queue or HTTP client that a program holds works on one loop only. With a loop for each of
the threads that run examples it would be released from another thread than the one that waits for it, which then never
wakes up.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

_lock = threading.Lock()
_loops: list[asyncio.AbstractEventLoop] = []


def run_on_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that runs on the shared loop, with the context variables of this thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, _shared_loop()).result()


def _shared_loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="bettertogether-async", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


# The thread of the loop does not live on in a forked process.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loops.clear)
