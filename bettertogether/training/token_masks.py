"""Which tokens a grammar allows, as bits: an eighth of what a byte a token would be on their way to a GPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def any_token(rows: int, vocabulary: int) -> NDArray[np.uint32]:
    """Bits [R, W] that allow all of a vocabulary, to be filled with what is allowed."""
    return np.full((rows, (vocabulary + 31) // 32), 0xFFFFFFFF, dtype=np.uint32)


def forbid(logits_R_V: Tensor, bits_R_W: Tensor) -> Tensor:
    """Put -inf where the bits (of `on_device`) forbid a token, in place."""
    bit_8 = torch.arange(8, dtype=torch.uint8, device=logits_R_V.device)
    allowed_R_V = (bits_R_W[..., None] >> bit_8 & 1).flatten(1)[:, : logits_R_V.shape[1]]
    return logits_R_V.masked_fill_(allowed_R_V == 0, float("-inf"))


def on_device(bits_R_W: NDArray[np.uint32], device: torch.device) -> Tensor:
    """The bits where the logits are, as bytes [R, 4 W]."""
    return torch.from_numpy(bits_R_W.view(np.uint8)).to(device)
