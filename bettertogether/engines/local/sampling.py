"""Pick tokens from logits. What is picked is decided where the logits are and read once for all rows: each read waits
until a GPU has done all it was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import NumericsError
from ...training.token_masks import any_token, forbid, on_device
from ..answers import TokenScore
from .decoder import BatchRow, Decision

NUCLEUS = 1024
"""Tokens looked at first for top_p; sorting the whole vocabulary is the slow exception."""
BROKEN = -1
"""In place of the token of a row whose logits are not finite."""
UNDECIDED = -2
"""In place of a token that is drawn from more than the likeliest `NUCLEUS`."""


def decide(logits_B_V: Tensor, rows: Sequence[BatchRow]) -> list[Decision]:
    """One decision for each row, from the logits at its last token. Constraints advance; rows don't change.

    A row for which nothing can be decided gets the error as its decision, and the others their tokens.
    """
    token_ids = choose(logits_B_V, rows)
    scores = _scores(logits_B_V, rows, token_ids)
    broken = Decision(error=_not_finite(logits_B_V.dtype)) if BROKEN in token_ids else Decision()
    decided = zip(rows, token_ids, scores, strict=True)
    return [broken if token == BROKEN else _decision(row, token, score) for row, token, score in decided]


def _not_finite(dtype: torch.dtype) -> NumericsError:
    name = str(dtype).removeprefix("torch.")
    advice = "an adapter or the weights hold such numbers" if name == "float32" else "use dtype='float32'"
    if name == "float16":
        advice = "float16 overflows beyond 65504: use dtype='bfloat16' or 'float32'"
    return NumericsError(
        f"The model's logits are infinite or not a number (NaN) at dtype={name!r}, so there is no answer; {advice} "
        "(local_lm(..., engine_options={'dtype': ...}))."
    )


def _decision(row: BatchRow, token_id: int, score: TokenScore | None) -> Decision:
    scores = () if score is None else (score,)
    if row.constraint is None:
        return Decision((token_id,), scores)
    picked = not getattr(row.constraint, "closing", False)
    try:
        row.constraint.advance(token_id)
        # A forced token is not scored, so a row that wants scores picks each one (the mask leaves one to pick).
        forced = row.constraint.forced() if row.sampling.logprobs is None else []
    except Exception as error:
        return Decision(error=error)
    return Decision((token_id, *forced), scores, row.constraint.ended, picked=picked)


def choose(logits_B_V: Tensor, rows: Sequence[BatchRow]) -> list[int]:
    """The next token of each row: the likeliest, or one drawn with the row's own generator, among those allowed; BROKEN
    for a row whose logits are not finite."""
    drawn = [position for position, row in enumerate(rows) if not row.sampling.greedy]
    tokens_B = logits_B_V.argmax(-1)
    points = [rows[position].random.random() for position in drawn]
    if drawn:
        found_R = _draw(_masked(logits_B_V, rows, drawn), rows, drawn, points, NUCLEUS)
        tokens_B[_on(logits_B_V, drawn)] = found_R.to(tokens_B.device)
    # NaN counts as the largest, so a row is finite where it matters if its largest logit is.
    token_ids: list[int] = tokens_B.where(logits_B_V.amax(-1).isfinite(), BROKEN).tolist()
    late = [place for place, position in enumerate(drawn) if token_ids[position] == UNDECIDED]
    if late:
        positions, vocabulary = [drawn[place] for place in late], logits_B_V.shape[1]
        masked_R_V = _masked(logits_B_V, rows, positions)
        found = _draw(masked_R_V, rows, positions, [points[place] for place in late], vocabulary).tolist()
        for position, token_id in zip(positions, found, strict=True):
            token_ids[position] = token_id
    redo = _refused(rows, token_ids, [position for position, row in enumerate(rows) if row.sampling.greedy])
    _take_likeliest(logits_B_V, rows, token_ids, redo)
    # A token that the mask allows may still be one after which the answer could not end in time.
    _take_likeliest(logits_B_V, rows, token_ids, _refused(rows, token_ids, [*redo, *drawn]))
    return token_ids


def _on(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """Places as an index where a tensor is."""
    return torch.tensor(places, device=tensor.device)


def _refused(rows: Sequence[BatchRow], token_ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Positions at which the grammar does not take the token."""
    constraints = [(position, rows[position].constraint) for position in positions if token_ids[position] != BROKEN]
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
    logits_R_V = logits_B_V[_on(logits_B_V, positions)].float()
    constraints = [rows[position].constraint for position in positions]
    if not any(constraints):
        return logits_R_V
    bits_R_W = any_token(len(positions), logits_R_V.shape[1])
    for bits_W, constraint in zip(bits_R_W, constraints, strict=True):
        if constraint is not None:
            constraint.fill_mask(bits_W.ctypes.data, bits_W.nbytes)
    return forbid(logits_R_V, on_device(bits_R_W, logits_R_V.device))


def _draw(
    logits_R_V: Tensor, rows: Sequence[BatchRow], positions: Sequence[int], points: Sequence[float], nucleus: int
) -> Tensor:
    """A token for each row of the logits [R], drawn at its point in [0, 1), for rows that ask alike at once; UNDECIDED
    where `nucleus` tokens don't reach the row's top_p."""
    if logits_R_V.device.type not in ("cpu", "cuda"):
        # Other devices have no float64.
        logits_R_V = logits_R_V.cpu()
    tokens_R = torch.empty(len(positions), dtype=torch.long, device=logits_R_V.device)
    alike: dict[tuple[int | None, bool], list[int]] = {}
    for place, position in enumerate(positions):
        options = rows[position].sampling
        alike.setdefault((options.top_k, options.top_p < 1.0), []).append(place)
    for (top_k, limited), places in alike.items():
        asked = [rows[positions[place]].sampling for place in places]
        index = _on(logits_R_V, places)
        numbers = torch.tensor(
            [[options.temperature, options.top_p, points[place]] for options, place in zip(asked, places, strict=True)],
            dtype=torch.float64,
        ).to(logits_R_V.device)
        temperature_M_1, top_p_M_1, point_M_1 = numbers.split(1, 1)
        logits_M_V = logits_R_V[index] / temperature_M_1.float()
        tokens_R[index] = _drawn(logits_M_V, top_k, top_p_M_1 if limited else None, point_M_1, nucleus)
    return tokens_R


def _drawn(logits_M_V: Tensor, top_k: int | None, top_p_M_1: Tensor | None, point_M_1: Tensor, nucleus: int) -> Tensor:
    """The inverse of the cumulative distribution at one uniform number each: one draw a token, whatever the
    vocabulary."""
    ids_M_K: Tensor | None = None
    if top_k is not None and top_k < logits_M_V.shape[1]:
        logits_M_V, ids_M_K = logits_M_V.topk(top_k)
    probabilities_M_K = torch.softmax(logits_M_V.double(), -1)
    if top_p_M_1 is not None:
        size = min(nucleus, probabilities_M_K.shape[1])
        whole = size == probabilities_M_K.shape[1]
        probabilities_M_K, kept_M_K = probabilities_M_K.topk(size)
        ids_M_K = kept_M_K if ids_M_K is None else ids_M_K.gather(1, kept_M_K)
    cumulative_M_K = probabilities_M_K.cumsum(-1)
    total_M_1 = cumulative_M_K[:, -1:]
    if top_p_M_1 is not None:
        # The likeliest tokens that reach top_p together, the one that crosses it included.
        last_M_1 = (cumulative_M_K < top_p_M_1).sum(-1, keepdim=True).clamp_(max=size - 1)
        total_M_1 = cumulative_M_K.gather(1, last_M_1)
    index_M_1 = torch.searchsorted(cumulative_M_K, point_M_1 * total_M_1, right=True)
    # No further than where the total is reached: what follows may have no probability at all.
    index_M_1 = index_M_1.minimum(torch.searchsorted(cumulative_M_K, total_M_1.contiguous()))
    tokens_M_1 = index_M_1 if ids_M_K is None else ids_M_K.gather(1, index_M_1)
    if top_p_M_1 is not None and not whole:
        tokens_M_1 = tokens_M_1.where(cumulative_M_K[:, -1:] >= top_p_M_1, UNDECIDED)
    return tokens_M_1[:, 0]


def _scores(logits_B_V: Tensor, rows: Sequence[BatchRow], token_ids: Sequence[int]) -> list[TokenScore | None]:
    scores: list[TokenScore | None] = [None] * len(rows)
    wanted = {p: row.sampling.logprobs for p, row in enumerate(rows) if row.sampling.logprobs is not None}
    places = [position for position in wanted if token_ids[position] != BROKEN]
    if not places:
        return scores
    logprobs_R_V = torch.log_softmax(logits_B_V[_on(logits_B_V, places)].float(), -1)
    chosen_R_1 = logprobs_R_V.gather(1, _on(logits_B_V, [token_ids[place] for place in places])[:, None])
    count = min(max(wanted.values()), logits_B_V.shape[1])
    values_R_N, ids_R_N = logprobs_R_V.topk(count)
    # float32 holds ids exactly up to 2**24, so that one read brings all.
    read = torch.cat([chosen_R_1, values_R_N, ids_R_N.float()], 1).tolist()
    for place, (chosen, *top) in zip(places, read, strict=True):
        ids, values = map(int, top[count:]), top[:count]
        pairs = tuple(zip(ids, values, strict=True))[: wanted[place]]
        scores[place] = TokenScore(token_ids[place], chosen, pairs)
    return scores
