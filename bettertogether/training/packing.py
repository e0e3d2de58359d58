"""Which rows go through the model together, and what they share.

An optimizer batch is a plain random sample, in an order fixed by the seed: rows are shuffled once per epoch and cut
into batches, as any trainer does. Rows are not sorted by prefix or length across batches, because a batch of one
predictor's rows alone would be another gradient estimate. Only inside a batch are rows arranged: in the order of their
prompts they fill micro-batches up to the token limit, and what a prompt has in common with the one before it is not
computed again. That changes the cost and not the result.

Where rows have other prompts of the same call (forms), each optimizer batch draws whether it shows the rows' own
prompts or a form, and which: one number for the whole batch, so that the demos of the form are a shared prefix.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ..errors import DataError, NoTrainingDataError

MIN_SHARED_TOKENS = 8
"""So many tokens in common, beyond what more rows have in common, are worth a part of their own."""


@dataclass(frozen=True)
class TokenizedRow:
    """One prompt and the answer to learn, as token ids; the loss is on `completion_ids` alone. With `rejected_ids` a
    pair: the answer to prefer, and another to the same prompt."""

    prompt_ids: list[int]
    completion_ids: list[int]
    forms: list[list[int]] = field(default_factory=list)
    """Other prompts of the same call, which a batch may show instead."""
    forced: list[bool] = field(default_factory=list)
    """For each completion token, whether the answer's grammar leaves no choice there; empty: none is forced."""
    fields: list[str] = field(default_factory=list)
    """For each completion token, the output field that it belongs to, or ""; empty: to none."""
    rejected_ids: list[int] = field(default_factory=list)
    """A pair's other answer; empty: the row is none."""
    rejected_forced: list[bool] = field(default_factory=list)
    """`forced` of the other answer's tokens."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def longest(self) -> int:
        """Tokens of the row under its longest prompt."""
        longest = max(len(self.completion_ids), len(self.rejected_ids))
        return max(map(len, (self.prompt_ids, *self.forms))) + longest

    @property
    def answers(self) -> tuple[TokenizedRow, ...]:
        """What goes through the model together: the row itself, or both answers of a pair."""
        if not self.rejected_ids:
            return (self,)
        chosen = AnswerRow(self.prompt_ids, self.completion_ids, forced=self.forced, fields=self.fields, pair=self)
        return chosen, AnswerRow(self.prompt_ids, self.rejected_ids, forced=self.rejected_forced, pair=self)

    @property
    def free(self) -> list[bool]:
        """For each completion token, whether the grammar leaves a choice there."""
        return [not forced for forced in self.forced] or [True] * len(self.completion_ids)

    def shown(self, form: int) -> TokenizedRow:
        """The row under form number `form`, counted round; a row without forms as it is."""
        return replace(self, prompt_ids=self.forms[form % len(self.forms)]) if self.forms else self


@dataclass(frozen=True, kw_only=True)
class AnswerRow(TokenizedRow):
    """One of the answers of a pair."""

    pair: TokenizedRow

    @property
    def is_rejected(self) -> bool:
        """Which of them."""
        return self.completion_ids is self.pair.rejected_ids


def check_rows(rows: Sequence[TokenizedRow], validation_rows: Sequence[TokenizedRow]) -> None:
    """Raises NoTrainingDataError without rows, and DataError for a row that can't be trained on, and for pairs among
    others."""
    if not rows:
        raise NoTrainingDataError(
            "There are 0 training rows. Lower the threshold of the metric, sample more answers per example, or give "
            "more training examples."
        )
    are_pairs = bool(rows[0].rejected_ids)
    for name, part in (("rows", rows), ("validation_rows", validation_rows)):
        for index, row in enumerate(part):
            prompts, tokens = [row.prompt_ids, *row.forms], len(row.completion_ids)
            if not all(prompts) or not tokens:
                raise DataError(
                    f"{name}[{index}] has {min(map(len, prompts))} prompt and {tokens} completion tokens: each row "
                    "needs at least one of both. Leave it out."
                )
            for marks, kind in (("forced", "completion"), ("fields", "completion"), ("rejected_forced", "rejected")):
                tokens, given = len(getattr(row, f"{kind}_ids")), len(getattr(row, marks))
                if given not in (0, tokens):
                    raise DataError(
                        f"{name}[{index}] has {tokens} {kind} tokens and {given} {marks}: give one for each, or none."
                    )
            if bool(row.rejected_ids) != are_pairs or (row.rejected_ids and row.forms):
                raise DataError(
                    f"{name}[{index}] has {'a' if row.rejected_ids else 'no'} rejected answer and {len(row.forms)} "
                    "forms: give rows, or pairs, which have a single prompt, and not both at once."
                )


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model in one forward pass."""

    rows: tuple[TokenizedRow, ...]
    shared: tuple[int, ...]
    """For each row, how many of its first tokens are those of the row before it, and not computed again."""

    @classmethod
    def apart(cls, rows: Sequence[TokenizedRow]) -> MicroBatch:
        """Rows that share nothing."""
        return cls(tuple(rows), (0,) * len(rows))

    @property
    def is_single(self) -> bool:
        """Whether it holds one row, or one pair, which can't be split."""
        return len({id(row.pair) if isinstance(row, AnswerRow) else id(row) for row in self.rows}) == 1

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass, as packed."""
        return sum(map(len, self.rows)) - sum(self.shared)


@dataclass(frozen=True)
class Block:
    """Tokens of a packed row that belong to the same rows. They see each other causally."""

    start: int
    stop: int
    """Where they lie: [start, stop)."""
    end: int
    """The tokens of [stop, end), the rest of these rows, see all of them."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> slice:
        """The block's own place."""
        return slice(self.start, self.stop)

    @property
    def rest(self) -> slice:
        """The place of those that see it."""
        return slice(self.stop, self.end)


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch laid out as one sequence of T tokens: of each row, those that it does not share with the one
    before it."""

    input_ids: list[int]
    position_ids: list[int]
    """Position of each token in its own row."""
    logit_positions: list[int]
    """Packed positions whose next token is trained on, N of them."""
    blocks: tuple[Block, ...]
    """All tokens, in order."""


def epoch_batches(number_of_rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of the optimizer batches of one epoch (from 1), shuffled by seed and epoch. The last may be short."""
    order = list(range(number_of_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[start : start + batch_size] for start in range(0, number_of_rows, batch_size)]


def drawn_form(rows: Sequence[TokenizedRow], share: float, seed: int, epoch: int, batch: int) -> int | None:
    """The form that an optimizer batch shows, None for the rows' own prompts: a form in a share of the batches, each
    form alike. Drawn by seed, epoch and number of the batch alone."""
    draw, forms = random.Random(f"{seed}/{epoch}/{batch}"), max(len(row.forms) for row in rows)
    return draw.randrange(forms) if forms and draw.random() < share else None


def micro_batches(rows: Sequence[TokenizedRow], max_tokens: int, max_completion_tokens: int) -> list[MicroBatch]:
    """Split rows into forward passes of at most `max_tokens` packed tokens and `max_completion_tokens` logits, in the
    order of their prompts; equal input gives equal output.

    A single row above a limit goes through alone, and no rows are no pass.
    """
    ordered = sorted(rows, key=lambda row: (row.prompt_ids, row.completion_ids))
    shared = shared_lengths(ordered)
    batches: list[MicroBatch] = []
    start = tokens = trained = 0
    for place, row in enumerate(ordered):
        cost, completion = len(row) - shared[place], len(row.completion_ids)
        if place > start and (tokens + cost > max_tokens or trained + completion > max_completion_tokens):
            batches.append(_part(ordered, shared, start, place))
            start, tokens, trained = place, 0, 0
        tokens += cost if place > start else len(row)
        trained += completion
    return [*batches, _part(ordered, shared, start, len(ordered))] if ordered else []


def _part(rows: Sequence[TokenizedRow], shared: Sequence[int], start: int, stop: int) -> MicroBatch:
    return MicroBatch(tuple(rows[start:stop]), (0, *shared[start + 1 : stop]))


def shared_lengths(rows: Sequence[TokenizedRow]) -> list[int]:
    """For each of the rows, which are in the order of their prompts, how many of its first tokens it takes from the row
    before it.

    That is before the last prompt token of either, so that every row computes for itself the position that predicts its
    first completion token; and fewer where the last of them are too few for a part of their own.
    """
    common = [0, *(_common_length(first, second) for first, second in pairwise(rows))]
    shared = [0] * len(rows)
    # Runs of rows, and how much all of each run have in common already.
    runs = [(0, len(rows), 0)]
    while runs:
        start, stop, depth = runs.pop()
        if stop - start < 2:
            continue
        of_all = min(common[start + 1 : stop])
        depth = of_all if of_all >= depth + MIN_SHARED_TOKENS else depth
        # There is one at least, where they have the least in common.
        cuts = [place for place in range(start + 1, stop) if common[place] < depth + MIN_SHARED_TOKENS]
        for place in cuts:
            shared[place] = depth
        runs += [(first, last, depth) for first, last in pairwise([start, *cuts, stop])]
    return shared


def _common_length(first: TokenizedRow, second: TokenizedRow) -> int:
    limit = min(len(first.prompt_ids), len(second.prompt_ids)) - 1
    for position in range(limit):
        if first.prompt_ids[position] != second.prompt_ids[position]:
            return position
    return max(limit, 0)


def pack(batch: MicroBatch) -> PackedRow:
    """Lay a micro-batch out as one sequence."""
    packed = PackedRow([], [], [], _blocks(batch))
    for row, shared in zip(batch.rows, batch.shared, strict=True):
        first = len(packed.input_ids) + len(row.prompt_ids) - shared - 1
        packed.input_ids.extend(row.prompt_ids[shared:] + row.completion_ids)
        packed.position_ids.extend(range(shared, len(row)))
        packed.logit_positions.extend(range(first, first + len(row.completion_ids)))
    return packed


def _blocks(batch: MicroBatch) -> tuple[Block, ...]:
    blocks: list[Block] = []
    # The row at hand in parts: the positions in it, [first, stop), and how far from those the part lies.
    parts: list[tuple[int, int, int]] = []
    end = 0

    def leave(shared: int) -> None:
        """All but so many tokens of the row at hand, which the next one has too."""
        while parts and parts[-1][1] > shared:
            first, stop, offset = parts.pop()
            blocks.append(Block(offset + max(first, shared), offset + stop, end))
            if first < shared:
                parts.append((first, shared, offset))

    for row, shared in zip(batch.rows, batch.shared, strict=True):
        leave(shared)
        parts.append((shared, len(row), end - shared))
        end += len(row) - shared
    leave(0)
    return tuple(sorted(blocks, key=lambda block: block.start))
