"""Merge a LoRA adapter into its base model and write a plain Hugging Face model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError


def merge_adapter(base: str | Path, adapter: Path, out: Path) -> None:
    """Write base plus adapter to `out`, in the base's own precision, with its tokenizer. Raises ModelError.

    `out` must be new or empty; it appears when it is complete.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{str(base)!r} with the adapter in {adapter} can't be loaded ({error}): give the base model's folder or "
            "hub id as base_model=."
        ) from error
    with torch.no_grad():
        merged = tuned.merge_and_unload(safe_merge=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        merged.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
