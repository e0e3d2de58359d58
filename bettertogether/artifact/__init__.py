"""Artifacts: a compiled program saved, loaded, pushed to a hub and merged. JSON and safetensors, no pickle."""

from .artifact import load, load_report, merge, save, save_gguf
from .hub import push_to_hub

__all__ = ["load", "load_report", "merge", "push_to_hub", "save", "save_gguf"]
