"""The training loss of rows of tokens under a model: one packed pass where the model allows it, else padded rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..printable import get_logger
from .attention import ATTENTION_NAME, PackedLayout, attention_implementation
from .fused import completion_loss_sum
from .packing import MicroBatch, PrefixGroup, TokenizedRow, micro_batches, pack

LOGIT_ELEMENTS = 1 << 27
"""Logits of one forward pass at most (512 MiB in float32), so that a long answer over a big vocabulary still fits."""
PROBE_TOKENS = 24

logger = get_logger(__name__)


@dataclass(frozen=True)
class RowLoss:
    """Computes the summed cross-entropy (nats) of the completion tokens of rows."""

    model: PreTrainedModel
    packed: bool
    """Whether rows are packed into one sequence; else they are padded on the left."""
    dtype: torch.dtype
    """Of the forward pass; bfloat16 runs under autocast."""

    def plan(self, rows: Sequence[TokenizedRow], max_tokens: int) -> list[MicroBatch]:
        """Split rows into forward passes of at most `max_tokens` tokens, a longer row alone."""
        trained = max(1, LOGIT_ELEMENTS // self.model.config.get_text_config().vocab_size)
        if self.packed:
            return micro_batches(rows, max_tokens, trained)
        batches: list[list[TokenizedRow]] = []
        for row in sorted(rows, key=lambda row: (len(row), row.prompt_ids, row.completion_ids)):
            # Sorted by length, so this row is the longest of its batch and the others are padded to it.
            fits = batches and (len(batches[-1]) + 1) * len(row) <= max_tokens
            if not fits or sum(len(r.completion_ids) for r in [*batches[-1], row]) > trained:
                batches.append([])
            batches[-1].append(row)
        return [MicroBatch(tuple(PrefixGroup(0, (row,)) for row in batch)) for batch in batches]

    def tokens(self, batch: MicroBatch) -> int:
        """Tokens of the forward pass, padding included."""
        return batch.tokens if self.packed else len(batch.rows) * max(len(row) for row in batch.rows)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Summed loss of a micro-batch, a scalar in float32."""
        device = self.model.device
        # enabled=False is said too, so that an autocast of the caller's does not reach in here.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits_N_V = self._packed_logits(batch) if self.packed else self._padded_logits(batch)
        labels = [token for row in batch.rows for token in row.completion_ids]
        return completion_loss_sum(logits_N_V, torch.tensor(labels, device=device))

    def _packed_logits(self, batch: MicroBatch) -> Tensor:
        packed, device = pack(batch), self.model.device
        return _logits(
            self.model,
            torch.tensor(packed.logit_positions, device=device),
            input_ids=torch.tensor([packed.input_ids], device=device),
            position_ids=torch.tensor([packed.position_ids], device=device),
            packed_layout=PackedLayout(packed, device),
        ).flatten(0, 1)

    def _padded_logits(self, batch: MicroBatch) -> Tensor:
        rows, device = batch.rows, self.model.device
        longest = max(len(row) for row in rows)
        ids_B_T = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_B_T = torch.zeros_like(ids_B_T)
        for index, row in enumerate(rows):
            ids_B_T[index, longest - len(row) :] = torch.tensor(row.prompt_ids + row.completion_ids)
            mask_B_T[index, longest - len(row) :] = 1
        answer = max(len(row.completion_ids) for row in rows)
        kept = torch.arange(longest - answer - 1, longest - 1, device=device)
        arguments: dict[str, Any] = {"input_ids": ids_B_T.to(device), "attention_mask": mask_B_T.to(device)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            arguments["position_ids"] = (mask_B_T.cumsum(1) - 1).clamp(min=0).to(device)
        logits_B_A_V = _logits(self.model, kept, **arguments)
        return torch.cat([logits_B_A_V[i, answer - len(row.completion_ids) :] for i, row in enumerate(rows)])


def _logits(model: PreTrainedModel, kept_N: Tensor, **arguments: Any) -> Tensor:
    """Logits at the given positions only, [B, N, V]; the output layer runs on these alone where the model can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: Tensor = model(**arguments, logits_to_keep=kept_N, use_cache=False).logits
        return logits
    return model(**arguments, use_cache=False).logits[:, kept_N]


@contextlib.contextmanager
def row_loss(model: PreTrainedModel, dtype: torch.dtype, longest: int) -> Iterator[RowLoss]:
    """The loss of rows of up to `longest` tokens inside the block, packed where that is exact for this model."""
    reason = why_not_packed(model, longest)
    if reason:
        _say_once(type(model).__name__, reason)
    with attention_implementation(model, plain_attention(model) if reason else ATTENTION_NAME):
        yield RowLoss(model, packed=reason is None, dtype=dtype)


def plain_attention(model: PreTrainedModel) -> str:
    """The model's attention implementation where it is one of transformers' own, else the nearest of these."""
    name = model.config._attn_implementation
    if name in ("eager", "sdpa") or "flash" in name or "flex" in name:
        return str(name)
    return "sdpa" if model._supports_sdpa else "eager"


def why_not_packed(model: PreTrainedModel, longest: int) -> str | None:
    """Why rows of up to `longest` tokens can't be packed for this model; None when they can.

    Besides what the config tells, two short rows are run packed and apart and their logits compared, so that a family
    whose layers see tokens by other means than attention (state-space layers, convolutions, position biases) is found
    out whatever it is called.
    """
    config = model.config.get_text_config()
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout={config.attention_dropout} in its config"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < longest:
        return f"its attention sees chunks of {chunk} tokens and the rows have up to {longest}"
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            error = _probe(model, config.vocab_size)
    except NotImplementedError as reason:
        return str(reason)
    finally:
        for module, mode in training:
            module.training = mode
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return None if error < tolerance else f"packed and single rows differ by {error:.2g} (relative)"


def _probe(model: PreTrainedModel, vocabulary: int) -> float:
    """Relative difference between the logits of two rows packed and the same rows apart."""
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(3 * PROBE_TOKENS)]
    shared, first, second = ids[:PROBE_TOKENS], ids[PROBE_TOKENS : 2 * PROBE_TOKENS], ids[2 * PROBE_TOKENS :]
    rows = [TokenizedRow(shared + own[:2], own[2:]) for own in (first, second)]
    batch = MicroBatch((PrefixGroup(len(shared), tuple(rows)),))
    singles = [MicroBatch((PrefixGroup(0, (row,)),)) for row in rows]
    with attention_implementation(model, plain_attention(model)):
        alone = RowLoss(model, packed=False, dtype=torch.float32)
        apart_N_V = torch.cat([alone._padded_logits(single) for single in singles]).float()
    with attention_implementation(model, ATTENTION_NAME):
        packed_N_V = RowLoss(model, packed=True, dtype=torch.float32)._packed_logits(batch).float()
    return float((packed_N_V - apart_N_V).norm() / apart_N_V.norm())


_said: set[str] = set()


def _say_once(family: str, reason: str) -> None:
    if family not in _said:
        _said.add(family)
        logger.warning("%s trains on padded batches, which is exact but slower: %s.", family, reason)
