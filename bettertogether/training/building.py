"""One thread at a time builds a model: transformers sets torch's default dtype for all threads while it does, and then
back to what it found, which may be that of another thread's model. peft makes its layers in the default dtype."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

_one_at_a_time = threading.RLock()
_found: torch.dtype | None = None
"""torch's default dtype before a thread began to build."""


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Build a model, or layers of one, inside the block, while no other thread does. It may hold another such block."""
    global _found
    with _one_at_a_time:
        before, _found = _found, torch.get_default_dtype()
        try:
            yield
        finally:
            _found = before


def _begin_anew() -> None:
    """In a forked child: a thread that was building did not come along, and sets nothing back."""
    global _one_at_a_time, _found
    _one_at_a_time = threading.RLock()
    if _found is not None:
        torch.set_default_dtype(_found)
        _found = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
