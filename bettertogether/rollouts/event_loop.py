"""One event loop, in a thread of its own, for every async program that is run here.

An `asyncio.Semaphore`, lock, queue or HTTP client that a program holds works on one loop only. With a loop for each of
the threads that run examples it would be released from another thread than the one that waits for it, which then never
wakes up.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import dspy
from dspy.utils.syncify import run_async

Result = TypeVar("Result")

_lock = threading.Lock()
_loops: list[asyncio.AbstractEventLoop] = []


def run_on_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that runs on the shared loop, with the context variables of this thread."""
    loop = _shared_loop()
    if asyncio._get_running_loop() is loop:
        # A syncified part of an async program: to wait for the loop would stop it. DSPy lets it go on within.
        result: Result = run_async(coroutine)
        return result
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def use_shared_loop(module: dspy.Module, run: Callable[[Coroutine[Any, Any, Any]], Any] = run_on_loop) -> None:
    """Let what `dspy.syncify` made of an async module, in place or around it, run on the shared loop."""
    if getattr(module.__dict__.get("forward"), "__module__", None) == dspy.syncify.__module__:
        module.forward = functools.partial(_forward, run, module)
    elif type(module).__module__ == dspy.syncify.__module__:
        module.forward = functools.partial(_forward, run, module.program)


def _forward(
    run: Callable[[Coroutine[Any, Any, Any]], Any], module: dspy.Module, *arguments: Any, **options: Any
) -> Any:
    return run(module.aforward(*arguments, **options))


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
