"""Engines: what runs a model. Importing this package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import (
    MODEL_PREFIX,
    ChatMessage,
    FinetuneResult,
    LocalEngine,
    TrainingProgress,
    TrainingRow,
    adapter_model_name,
    adapter_round,
)

if TYPE_CHECKING:
    from .transformers_engine import TransformersEngine
    from .vllm_engine import VLLMEngine

_LAZY = {"TransformersEngine": ".transformers_engine", "VLLMEngine": ".vllm_engine"}

__all__ = [
    "MODEL_PREFIX",
    "ChatMessage",
    "FinetuneResult",
    "LocalEngine",
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
