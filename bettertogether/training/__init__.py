"""LoRA training: the only package, with `engines`, that imports torch."""

from .config import LoRAConfig, TrainingConfig

__all__ = ["LoRAConfig", "TrainingConfig"]
