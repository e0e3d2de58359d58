"""A DSPy optimizer that alternates prompt optimization and LoRA fine-tuning, so that a model teaches itself.

Soylu, Potts, Khattab: "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together", EMNLP 2024.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact.artifact import load, merge, save, save_gguf
    from .artifact.hub import push_to_hub
    from .callbacks.display import ProgressDisplay
    from .callbacks.events import Callback
    from .downloads import default_model, fetch_wheel_file
    from .lm import local_lm, vllm_lm
    from .optimizer import BetterTogether
    from .report.report import CompileReport
    from .rollouts.evaluation import compare, evaluate
    from .rollouts.from_datasets import examples_from
    from .rollouts.labels import stratified_split
    from .run.budget import Budget
    from .steps.policy_step import PolicyFinetune
    from .steps.preference_step import PreferenceFinetune
    from .steps.prompt_step import BootstrapFewShotRS
    from .steps.prompt_templates import PromptTemplate, prompt_templates
    from .steps.weight_step import LoRAFinetune
    from .training.config import LoRAConfig, PolicyConfig, TrainingConfig

_PUBLIC = {
    "BetterTogether": ".optimizer",
    "BootstrapFewShotRS": ".steps.prompt_step",
    "Budget": ".run.budget",
    "Callback": ".callbacks",
    "CompileReport": ".report",
    "LoRAConfig": ".training.config",
    "LoRAFinetune": ".steps.weight_step",
    "PolicyConfig": ".training.config",
    "PolicyFinetune": ".steps.policy_step",
    "PreferenceFinetune": ".steps.preference_step",
    "ProgressDisplay": ".callbacks",
    "PromptTemplate": ".steps.prompt_templates",
    "TrainingConfig": ".training.config",
    "compare": ".rollouts.evaluation",
    "default_model": ".downloads",
    "evaluate": ".rollouts.evaluation",
    "examples_from": ".rollouts.from_datasets",
    "fetch_wheel_file": ".downloads",
    "load": ".artifact",
    "local_lm": ".lm",
    "merge": ".artifact",
    "prompt_templates": ".steps.prompt_templates",
    "push_to_hub": ".artifact",
    "save": ".artifact",
    "save_gguf": ".artifact",
    "stratified_split": ".rollouts.labels",
    "vllm_lm": ".lm",
}

_MODULES = ("callbacks", "errors", "records", "testing")

__all__ = [
    "BetterTogether",
    "BootstrapFewShotRS",
    "Budget",
    "Callback",
    "CompileReport",
    "LoRAConfig",
    "LoRAFinetune",
    "PolicyConfig",
    "PolicyFinetune",
    "PreferenceFinetune",
    "ProgressDisplay",
    "PromptTemplate",
    "TrainingConfig",
    "compare",
    "default_model",
    "evaluate",
    "examples_from",
    "fetch_wheel_file",
    "load",
    "local_lm",
    "merge",
    "prompt_templates",
    "push_to_hub",
    "save",
    "save_gguf",
    "stratified_split",
    "vllm_lm",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
