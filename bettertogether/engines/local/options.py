"""The options of `TransformersEngine`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch

from ..loading import DTYPES, pick_device, pick_dtype
from ..options import WHOLE, EngineOptions, Rule, option

DEVICE = Rule(lambda value: isinstance(value, str | torch.device), '"auto", "cpu", "cuda", "cuda:0" or "mps"')
DTYPE = Rule(lambda value: value in ("auto", *DTYPES, *DTYPES.values()), f'"auto" or one of {sorted(DTYPES)}')
MEMORY = Rule(lambda value: value is None or WHOLE.allows(value), f"None or {WHOLE.description}")


@dataclass(frozen=True, kw_only=True)
class TransformersOptions(EngineOptions):
    """How a model of transformers runs in this process. Raises ConfigError, also for a device that is not there."""

    dtype: str | torch.dtype = field(default="auto", metadata=option(DTYPE, changes_answers=True, own_engine=True))
    """ "float32", "bfloat16", "float16", torch's own of these, or "auto": float32 on the CPU, bfloat16 elsewhere."""
    device: str | torch.device = field(default="auto", metadata=option(DEVICE, own_engine=True))
    """ "cpu", "cuda", "cuda:1", "mps" (Apple's) or "auto": CUDA where there is one, else the processor."""
    max_batch_size: int = field(default=64, metadata=option(WHOLE))
    """Requests decoded at once."""
    cache_bytes: int | None = field(default=None, metadata=option(MEMORY))
    """Bound on the memory for keys and values, of requests and of the prefixes that they share. None: 80% of what is
    free on a GPU when the model is loaded, half of it on a processor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pick_device(self.device)

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return pick_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision."""
        return pick_dtype(self.dtype, self.torch_device)

    def resolved(self) -> Self:
        """The same options, with the device and the precision by name."""
        dtype = str(self.torch_dtype).removeprefix("torch.")
        return replace(self, device=_only_name(self.torch_device), dtype=dtype)


def _only_name(device: torch.device) -> str:
    """One name for all ways to ask for a device; "cuda" is the one that is current in this process."""
    if device.type != "cuda":
        return device.type
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return f"cuda:{current if device.index is None else device.index}"
