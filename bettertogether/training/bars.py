"""No progress bars of other libraries between the lines of our own progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tqdm import tqdm
from transformers.utils import logging

from .building import building

_GGUF_BAR = "transformers.modeling_gguf_pytorch_utils.tqdm"
"""Drawn past transformers' own hook for bars."""


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Load or save models without bars, one at a time; see `building`. Bars of downloads stay: those take minutes."""
    with (
        building(),
        mock.patch(_GGUF_BAR, logging.EmptyTqdm),
        mock.patch.object(tqdm, "__init__", _without_plain(tqdm.__init__)),
    ):
        before = logging.set_tqdm_hook(_nothing)
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)


def _without_plain(make: Callable[..., None]) -> Callable[..., None]:
    """No bars of tqdm's own class, which compressed-tensors draws; those of downloads are of another."""

    def make_bar(bar: Any, *arguments: Any, **options: Any) -> None:
        make(bar, *arguments, **{**options, "disable": True} if type(bar) is tqdm else options)

    return make_bar


def _nothing(make: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return logging.EmptyTqdm(*arguments, **options)
