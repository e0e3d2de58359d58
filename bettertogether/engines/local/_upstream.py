"""oneDNN's operations in torch, which torch does not call public: the place to look when it is upgraded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops: Any = torch.ops.mkldnn


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [..., in] to [..., out], with weights that `pack_weight` laid out."""
    output: Tensor = _ops._linear_pointwise(x, packed, bias, "none", [], "")
    return output


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """The weight [out, in] of a linear layer in the layout that is best for about so many rows."""
    packed: Tensor = _ops._reorder_linear_weight(weight, rows)
    return packed


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this precision on this processor."""
    if dtype == torch.bfloat16:
        return bool(_ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(_ops._is_mkldnn_fp16_supported())
    return dtype == torch.float32
