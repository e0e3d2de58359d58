"""A DSPy optimizer that alternates prompt optimization and LoRA fine-tuning, so that a model teaches itself.

Soylu, Potts, Khattab: "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together", EMNLP 2024.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import load, merge, save
    from .budget import Budget
    from .callbacks import Callback, ProgressDisplay
    from .downloads import default_model
    from .lm import local_lm, vllm_lm
    from .optimizer import BetterTogether
    from .prompts import BootstrapFewShotRS
    from .report import CompileReport
    from .training.config import LoRAConfig, TrainingConfig
    from .weights import LoRAFinetune

_PUBLIC = {
    "BetterTogether": ".optimizer",
    "BootstrapFewShotRS": ".prompts",
    "Budget": ".budget",
    "Callback": ".callbacks",
    "CompileReport": ".report",
    "LoRAConfig": ".training.config",
    "LoRAFinetune": ".weights",
    "ProgressDisplay": ".callbacks",
    "TrainingConfig": ".training.config",
    "default_model": ".downloads",
    "load": ".artifact",
    "local_lm": ".lm",
    "merge": ".artifact",
    "save": ".artifact",
    "vllm_lm": ".lm",
}

__all__ = [
    "BetterTogether",
    "BootstrapFewShotRS",
    "Budget",
    "Callback",
    "CompileReport",
    "LoRAConfig",
    "LoRAFinetune",
    "ProgressDisplay",
    "TrainingConfig",
    "default_model",
    "load",
    "local_lm",
    "merge",
    "save",
    "vllm_lm",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
