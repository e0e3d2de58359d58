"""The loss as any trainer computes it: rows padded on the right, logits everywhere, labels on the completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bettertogether.training.packing import TokenizedRow


def padded_loss_sum(model: nn.Module, rows: Sequence[TokenizedRow]) -> Tensor:
    """Summed cross-entropy of the completion tokens."""
    longest = max(len(row) for row in rows)
    ids_B_T = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_B_T = torch.zeros_like(ids_B_T)
    labels_B_T = torch.full_like(ids_B_T, -100)
    for index, row in enumerate(rows):
        ids_B_T[index, : len(row)] = torch.tensor(row.prompt_ids + row.completion_ids)
        mask_B_T[index, : len(row)] = 1
        labels_B_T[index, len(row.prompt_ids) : len(row)] = torch.tensor(row.completion_ids)
    logits_B_T_V = model(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_B_T_V[:, :-1].flatten(0, 1).float(), labels_B_T[:, 1:].flatten(), reduction="sum"
    )


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error (2-norm) of some tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
