"""Linear layers on a processor, with a second copy of their weights in oneDNN's own layout.

The plain product lays the weights out anew each time, which costs more than the product itself for the few rows of a
decoding step: on 2 cores with AVX-512, 8, 64 and 2048 rows of SmolLM2-135M's layers run at 35, 104 and 192 GFLOP/s
plain and at 85, 172 and 221 packed (tests/benchmarks/linear_layers.py). And each row's result is the same whatever
the rows beside it.
"""

from __future__ import annotations

import platform

import psutil
import torch
from torch import Tensor, nn

from ...printable import get_logger
from ...training.layers import LinearUnderAutograd, is_plain_linear
from ._upstream import multiplies, pack_weight, packed_linear

logger = get_logger(__name__)

MOST_MEMORY = 0.25
"""Share of the free memory that the copies may take."""
ROWS_HINT = 64
"""Rows that the layout is chosen for; others differ little."""


class PackedLinear(LinearUnderAutograd):
    """A linear layer that uses the packed copy of its weights in inference mode, and is a plain one otherwise.

    The weights must not change afterwards.
    """

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] to [..., out]."""
        if torch.is_inference_mode_enabled() and input.dtype == self.weight.dtype:
            return packed_linear(input, self.packed, self.bias)
        return super().forward(input)


def pack_linear_layers(model: nn.Module) -> int:
    """Pack all plain linear layers of a model on the CPU; returns how many. None where the processor has no use for
    it, or where the copies would take too much of the memory (said in the log)."""
    layers = [layer for layer in model.modules() if is_plain_linear(layer) and _can_be_packed(layer.weight)]
    size_bytes = sum(layer.weight.nbytes for layer in layers)
    if size_bytes > MOST_MEMORY * psutil.virtual_memory().available:
        logger.info("The linear layers are not packed: a copy would take %.1f GiB.", size_bytes / 2**30)
        return 0
    for layer in layers:
        packed = pack_weight(layer.weight.detach(), ROWS_HINT)
        layer.__class__ = PackedLinear
        layer.packed = packed
    return len(layers)


def _can_be_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return multiplies(weight.dtype)
