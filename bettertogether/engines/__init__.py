"""Engines: what runs a model. Importing this package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..training.progress import ProgressFunction, TrainingProgress
from .protocol import (
    MODEL_PREFIX,
    ChatMessage,
    FieldSpan,
    FinetuneResult,
    LocalEngine,
    TrainingRow,
    adapter_model_name,
    adapter_round,
)

if TYPE_CHECKING:
    from .local.transformers_engine import TransformersEngine
    from .vllm.vllm_engine import VLLMEngine

_LAZY = {"TransformersEngine": ".local.transformers_engine", "VLLMEngine": ".vllm.vllm_engine"}

__all__ = [
    "MODEL_PREFIX",
    "ChatMessage",
    "FieldSpan",
    "FinetuneResult",
    "LocalEngine",
    "ProgressFunction",
    "TrainingProgress",
    "TrainingRow",
    "TransformersEngine",
    "VLLMEngine",
    "adapter_model_name",
    "adapter_round",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
