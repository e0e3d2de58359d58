"""Artifacts: a compiled program saved, loaded and merged. JSON and safetensors, no pickle."""

from .artifact import load, load_report, merge, save

__all__ = ["load", "load_report", "merge", "save"]
