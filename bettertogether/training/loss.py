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
from ._upstream import attention_name, supports_sdpa
from .attention import TRAINING_ATTENTION, PackedLayout, attention_implementation, window_of_mask_alone
from .fused import completion_losses
from .layers import more_than_attention
from .lending import looked_at
from .packing import MicroBatch, TokenizedRow, micro_batches, pack

LOGIT_ELEMENTS = 1 << 27
"""Logits of one forward pass at most (512 MiB in float32), so that a long answer over a big vocabulary still fits."""
PROBE_TOKENS = 24
SAME = 1e-3
"""Logits that differ by less, relatively, are the same in float32."""
ROUNDED = 5e-2
"""And so much less exact precisions may part packed rows from rows alone: attention adds up in another order."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class RowLoss:
    """Computes the cross-entropy (nats) of the completion tokens of rows."""

    model: PreTrainedModel
    packed: bool
    """Whether rows are packed into one sequence; else they are padded on the right, where no token sees the padding,
    whatever the layers are."""
    dtype: torch.dtype
    """Of the forward pass; bfloat16 runs under autocast."""

    def plan(self, rows: Sequence[TokenizedRow], max_tokens: int) -> list[MicroBatch]:
        """Split rows into forward passes of at most `max_tokens` tokens, a longer row alone. The answers of a pair go
        together."""
        batches = self._plan([answer for row in rows for answer in row.answers], max_tokens)
        if len(batches) == 1 or not any(row.rejected_ids for row in rows):
            return batches
        if len(rows) == 1:
            return [MicroBatch.apart([row for batch in batches for row in batch.rows])]
        ordered, half = sorted(rows, key=lambda row: row.prompt_ids), len(rows) // 2
        return self.plan(ordered[:half], max_tokens) + self.plan(ordered[half:], max_tokens)

    def _plan(self, rows: Sequence[TokenizedRow], max_tokens: int) -> list[MicroBatch]:
        logits = max(1, LOGIT_ELEMENTS // self.model.config.get_text_config().vocab_size)
        if self.packed:
            return micro_batches(rows, max_tokens, logits)
        batches: list[list[TokenizedRow]] = []
        for row in sorted(rows, key=lambda row: (len(row), row.prompt_ids, row.completion_ids)):
            # Sorted by length, so this row is the longest of its batch and the others are padded to it.
            batch = [*batches[-1], row] if batches else []
            fits = len(batch) * len(row) <= max_tokens and len(batch) * len(_answer_places([*batch, row])) <= logits
            if batch and fits:
                batches[-1].append(row)
            else:
                batches.append([row])
        return [MicroBatch.apart(batch) for batch in batches]

    def tokens(self, batch: MicroBatch) -> int:
        """Tokens of the forward pass, padding included."""
        return batch.tokens if self.packed else len(batch.rows) * max(len(row) for row in batch.rows)

    def token_losses(self, batch: MicroBatch) -> Tensor:
        """Losses [N] of the completion tokens of a micro-batch's rows, one row after the other, in float32."""
        labels = [token for row in batch.rows for token in row.completion_ids]
        return completion_losses(self.logits(batch), torch.tensor(labels, device=self.model.device))

    def logits(self, batch: MicroBatch, places: Sequence[int] | None = None) -> Tensor:
        """Logits [N, V] that the completion tokens of a micro-batch's rows are predicted from, one row after the other;
        of the tokens at these places among them, where some are given."""
        # enabled=False is said too, so that an autocast of the caller's does not reach in here.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.packed:
                return self._packed_logits(batch, places)
            logits_N_V = self._padded_logits(batch)
            return logits_N_V if places is None else logits_N_V[torch.tensor(places, device=logits_N_V.device)]

    def _packed_logits(self, batch: MicroBatch, places: Sequence[int] | None = None) -> Tensor:
        packed, device = pack(batch), self.model.device
        kept = packed.logit_positions if places is None else [packed.logit_positions[place] for place in places]
        return _logits(
            self.model,
            torch.tensor(kept, device=device),
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
            ids_B_T[index, : len(row)] = torch.tensor(row.prompt_ids + row.completion_ids)
            mask_B_T[index, : len(row)] = 1
        places = _answer_places(rows)
        arguments: dict[str, Any] = {"input_ids": ids_B_T.to(device), "attention_mask": mask_B_T.to(device)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            arguments["position_ids"] = torch.arange(longest, device=device).expand(len(rows), -1)
        logits_B_A_V = _logits(self.model, torch.tensor(places, device=device), **arguments)
        starts = [len(row.prompt_ids) - 1 - places.start for row in rows]
        return torch.cat(
            [logits_B_A_V[i, start : start + len(rows[i].completion_ids)] for i, start in enumerate(starts)]
        )


def _answer_places(rows: Sequence[TokenizedRow]) -> range:
    """Places of rows padded on the right from which some completion token is predicted."""
    return range(min(len(row.prompt_ids) for row in rows) - 1, max(len(row) for row in rows) - 1)


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
    with attention_implementation(model, plain_attention(model) if reason else TRAINING_ATTENTION):
        yield RowLoss(model, packed=reason is None, dtype=dtype)


def plain_attention(model: PreTrainedModel) -> str:
    """The model's attention implementation where it is one of transformers' own, else the nearest of these."""
    name = attention_name(model)
    if name in ("eager", "sdpa") or "flash" in name or "flex" in name:
        return name
    return "sdpa" if supports_sdpa(model) else "eager"


def why_not_packed(model: PreTrainedModel, longest: int) -> str | None:
    """Why rows of up to `longest` tokens can't be packed for this model; None when they can.

    Besides what the config tells, two short rows are run packed, in both orders, and apart, and their logits
    compared, so that a family whose layers see tokens by other means than attention (state-space layers,
    convolutions, position biases) is found out whatever it is called.
    """
    config = model.config.get_text_config()
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout={config.attention_dropout} in its config"
    if reason := more_than_attention(model) or window_of_mask_alone(model, longest):
        return reason
    try:
        with looked_at(model):
            return _Probe(model, config.vocab_size).run()
    except NotImplementedError as reason:
        return str(reason)


class _Probe:
    """Two rows with a common prefix and as many tokens of their own each."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(3 * PROBE_TOKENS)]
        self.shared, *own = (ids[start : start + PROBE_TOKENS] for start in range(0, len(ids), PROBE_TOKENS))
        self.rows = [TokenizedRow(self.shared + tokens[:2], tokens[2:]) for tokens in own]
        self.model = model

    def run(self) -> str | None:
        """Why the rows can't be packed. Raises NotImplementedError where attention can't be computed."""
        self.model.train()
        with attention_implementation(self.model, TRAINING_ATTENTION):
            self._packed(self.rows)  # asks for the dropout that training has
            self.model.eval()
            packed_R_N_V = self._packed(self.rows)
            swapped_R_N_V = self._packed(self.rows[::-1]).flip(0)
        with attention_implementation(self.model, plain_attention(self.model)):
            alone = RowLoss(self.model, packed=False, dtype=torch.float32)
            singles = [MicroBatch.apart([row]) for row in self.rows]
            apart_R_N_V = torch.stack([alone._padded_logits(single) for single in singles]).float()
        # The same products over the same number of rows: no rounding tells the two orders apart, in any precision.
        order = _difference(swapped_R_N_V, packed_R_N_V)
        if order > SAME:
            return f"rows differ by {order:.2g} (relative) with their place among packed rows"
        error = _difference(packed_R_N_V, apart_R_N_V)
        if error > (SAME if self.model.dtype == torch.float32 else ROUNDED):
            return f"packed and single rows differ by {error:.2g} (relative)"
        return None

    def _packed(self, rows: Sequence[TokenizedRow]) -> Tensor:
        batch = MicroBatch(tuple(rows), (0, len(self.shared)))
        logits_N_V = RowLoss(self.model, packed=True, dtype=torch.float32)._packed_logits(batch).float()
        return logits_N_V.view(len(rows), -1, logits_N_V.shape[1])


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


_said: set[str] = set()


def _say_once(family: str, reason: str) -> None:
    if family not in _said:
        _said.add(family)
        logger.warning("%s trains on padded batches, which is exact but slower: %s.", family, reason)
