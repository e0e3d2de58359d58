"""Pick tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import NumericsError
from ..answers import TokenScore
from .decoder import BatchRow, Decision

NUCLEUS = 1024
"""Tokens looked at first for top_p; sorting the whole vocabulary is the slow exception."""


def decide(logits_B_V: Tensor, rows: Sequence[BatchRow]) -> list[Decision]:
    """One decision for each row, from the logits at its last token. Constraints advance; rows don't change.

    A row for which nothing can be decided gets the error as its decision, and the others their tokens.
    """
    # NaN counts as the largest, so a row is finite where it matters if its largest logit is.
    is_finite_B = logits_B_V.amax(-1).isfinite().tolist()
    places = [place for place, finite in enumerate(is_finite_B) if finite]
    if len(places) == len(rows):
        return _decide(logits_B_V, rows)
    decided = iter(_decide(logits_B_V[places], [rows[place] for place in places]) if places else ())
    broken = Decision(error=_not_finite(logits_B_V.dtype))
    return [next(decided) if finite else broken for finite in is_finite_B]


def _not_finite(dtype: torch.dtype) -> NumericsError:
    name = str(dtype).removeprefix("torch.")
    advice = "an adapter or the weights hold such numbers" if name == "float32" else "use dtype='float32'"
    if name == "float16":
        advice = "float16 overflows beyond 65504: use dtype='bfloat16' or 'float32'"
    return NumericsError(
        f"The model's logits are infinite or not a number (NaN) at dtype={name!r}, so there is no answer; {advice} "
        "(local_lm(..., engine_options={'dtype': ...}))."
    )


def _decide(logits_B_V: Tensor, rows: Sequence[BatchRow]) -> list[Decision]:
    token_ids = choose(logits_B_V, rows)
    scores = _scores(logits_B_V, rows, token_ids)
    return [_decision(row, token, score) for row, token, score in zip(rows, token_ids, scores, strict=True)]


def _decision(row: BatchRow, token_id: int, score: TokenScore | None) -> Decision:
    scores = () if score is None else (score,)
    if row.constraint is None:
        return Decision((token_id,), scores)
    try:
        row.constraint.advance(token_id)
        # A forced token is not scored, so a row that wants scores picks each one (the mask leaves one to pick).
        forced = row.constraint.forced() if row.sampling.logprobs is None else []
    except Exception as error:
        return Decision(error=error)
    return Decision((token_id, *forced), scores, row.constraint.ended)


def choose(logits_B_V: Tensor, rows: Sequence[BatchRow]) -> list[int]:
    """The next token of each row: the likeliest, or one drawn with the row's own generator, among those allowed."""
    token_ids: list[int] = logits_B_V.argmax(-1).tolist()
    redo = _refused(rows, token_ids, [position for position, row in enumerate(rows) if row.sampling.greedy])
    _take_likeliest(logits_B_V, rows, token_ids, redo)
    drawn = [position for position, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        masked_R_V = _masked(logits_B_V, rows, drawn)
        for index, position in enumerate(drawn):
            token_ids[position] = _draw(masked_R_V[index], rows[position])
    # A token that the mask allows may still be one after which the answer could not end in time.
    _take_likeliest(logits_B_V, rows, token_ids, _refused(rows, token_ids, [*redo, *drawn]))
    return token_ids


def _refused(rows: Sequence[BatchRow], token_ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Positions at which the grammar does not take the token."""
    constraints = [(position, rows[position].constraint) for position in positions]
    return [position for position, grammar in constraints if grammar and not grammar.allows(token_ids[position])]


def _take_likeliest(
    logits_B_V: Tensor, rows: Sequence[BatchRow], token_ids: list[int], positions: Sequence[int]
) -> None:
    """Put the likeliest token that the mask leaves at each of these positions."""
    if positions:
        masked_R_V = _masked(logits_B_V, rows, positions)
        for position, token_id in zip(positions, masked_R_V.argmax(-1).tolist(), strict=True):
            token_ids[position] = token_id


def _masked(logits_B_V: Tensor, rows: Sequence[BatchRow], positions: Sequence[int]) -> Tensor:
    """Rows of the logits in float32, with -inf where a row's grammar forbids the token."""
    logits_R_V = logits_B_V[torch.tensor(positions, device=logits_B_V.device)].float()
    constrained = [index for index, position in enumerate(positions) if rows[position].constraint]
    if not constrained:
        return logits_R_V
    vocabulary = logits_R_V.shape[1]
    words = (vocabulary + 31) // 32
    bits_R_W = np.full((len(positions), words), 0xFFFFFFFF, dtype=np.uint32)
    for index in constrained:
        constraint = rows[positions[index]].constraint
        assert constraint is not None
        constraint.fill_mask(bits_R_W[index].ctypes.data, words * 4)
    allowed_R_V = np.unpackbits(bits_R_W.view(np.uint8), axis=1, bitorder="little", count=vocabulary)
    forbidden_R_V = torch.from_numpy(allowed_R_V == 0).to(logits_R_V.device)
    return logits_R_V.masked_fill_(forbidden_R_V, float("-inf"))


def _draw(logits_V: Tensor, row: BatchRow) -> int:
    """Inverse of the cumulative distribution at one uniform number: one draw per token, whatever the vocabulary."""
    options = row.sampling
    logits_V = logits_V / options.temperature
    ids_K: Tensor | None = None
    if options.top_k is not None and options.top_k < logits_V.numel():
        logits_V, ids_K = logits_V.topk(options.top_k)
    probabilities_K = torch.softmax(logits_V.double(), -1)
    if options.top_p < 1.0:
        probabilities_K, kept_K = _nucleus(probabilities_K, options.top_p)
        ids_K = kept_K if ids_K is None else ids_K[kept_K]
    cumulative_K = probabilities_K.cumsum(-1)
    point = row.random.random() * float(cumulative_K[-1])
    index = int(torch.searchsorted(cumulative_K, point, right=True))
    index = min(index, cumulative_K.numel() - 1)
    while float(probabilities_K[index]) == 0.0:
        index -= 1
    return index if ids_K is None else int(ids_K[index])


def _nucleus(probabilities_K: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that reach `top_p` together (the one that crosses it included), likeliest first."""
    size = min(NUCLEUS, probabilities_K.numel())
    sorted_S, ids_S = probabilities_K.topk(size)
    cumulative_S = sorted_S.cumsum(-1)
    if float(cumulative_S[-1]) < top_p and size < probabilities_K.numel():
        sorted_S, ids_S = probabilities_K.sort(descending=True)
        cumulative_S = sorted_S.cumsum(-1)
    count = int((cumulative_S < top_p).sum()) + 1
    return sorted_S[:count], ids_S[:count]


def _scores(logits_B_V: Tensor, rows: Sequence[BatchRow], token_ids: Sequence[int]) -> list[TokenScore | None]:
    scores: list[TokenScore | None] = [None] * len(rows)
    for position, row in enumerate(rows):
        if row.sampling.logprobs is None:
            continue
        logprobs_V = torch.log_softmax(logits_B_V[position].float(), -1)
        top: tuple[tuple[int, float], ...] = ()
        if row.sampling.logprobs:
            values, ids = logprobs_V.topk(min(row.sampling.logprobs, logprobs_V.numel()))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        scores[position] = TokenScore(token_ids[position], float(logprobs_V[token_ids[position]]), top)
    return scores
