"""Which rows go through the model together, and what they share.

An optimizer batch is a plain random sample, in an order fixed by the seed: rows are shuffled once per epoch and cut
into batches, as any trainer does. Rows are not sorted by prefix or length across batches, because a batch of one
predictor's rows alone would be another gradient estimate. Only inside a batch are rows arranged: those whose prompts
begin alike form a group, whose prefix is computed once, and groups fill micro-batches up to the token limit. That
changes the cost and not the result.

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
"""A common beginning shorter than this is not worth a group: every chat prompt starts with the same few tokens."""


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
class PrefixGroup:
    """Rows that share their first `prefix_length` tokens (0: nothing shared)."""

    prefix_length: int
    rows: tuple[TokenizedRow, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the group as packed: the prefix once, then what is left of each row."""
        return self.prefix_length + sum(len(row) - self.prefix_length for row in self.rows)


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model in one forward pass."""

    groups: tuple[PrefixGroup, ...]

    @property
    def rows(self) -> tuple[TokenizedRow, ...]:
        """All rows, in packed order."""
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def is_single(self) -> bool:
        """Whether it holds one row, or one pair, which can't be split."""
        return len({id(row.pair) if isinstance(row, AnswerRow) else id(row) for row in self.rows}) == 1

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass, as packed."""
        return sum(group.tokens for group in self.groups)


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch laid out as one sequence of T tokens: per group the prefix, then each row's own tokens."""

    input_ids: list[int]
    position_ids: list[int]
    """Position of each token in its own row; starts again after the prefix for every row."""
    logit_positions: list[int]
    """Packed positions whose next token is trained on, N of them."""
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    """Per group, in order: prefix length, and the number of own tokens of each row."""


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
    """Split rows into forward passes of at most `max_tokens` packed tokens and `max_completion_tokens` logits.

    A single row above a limit goes through alone.
    """
    batches: list[MicroBatch] = []
    groups: list[PrefixGroup] = []
    tokens = trained = 0
    for group in prefix_groups(rows):
        members: list[TokenizedRow] = []
        for row in group.rows:
            own, completion = len(row) - group.prefix_length, len(row.completion_ids)
            cost = own + (0 if members else group.prefix_length)
            if tokens and (tokens + cost > max_tokens or trained + completion > max_completion_tokens):
                if members:
                    groups.append(PrefixGroup(group.prefix_length, tuple(members)))
                batches.append(MicroBatch(tuple(groups)))
                groups, members, tokens, trained = [], [], 0, 0
                cost = len(row)
            members.append(row)
            tokens += cost
            trained += completion
        groups.append(PrefixGroup(group.prefix_length, tuple(members)))
    if groups:
        batches.append(MicroBatch(tuple(groups)))
    return batches


def prefix_groups(rows: Sequence[TokenizedRow]) -> list[PrefixGroup]:
    """Partition rows into groups with a common prefix so that the packed tokens are fewest.

    A prefix ends before the last prompt token of each of its rows, so that every row computes for itself the position
    that predicts its first completion token. Rows come back sorted by prompt; equal input gives equal output.
    """
    ordered = sorted(rows, key=lambda row: (row.prompt_ids, row.completion_ids))
    shared = [_shared_length(first, second) for first, second in pairwise(ordered)]
    # best[j] is the most tokens that groups over the first j rows can save; a group over i..j-1 saves its prefix
    # once per row after the first. A longer group only wins when it saves more, so ties go to smaller groups.
    best, cut = [0] * (len(ordered) + 1), [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        best[end], cut[end] = best[end - 1], end - 1
        prefix = len(ordered[end - 1].prompt_ids) - 1
        for start in range(end - 2, -1, -1):
            prefix = min(prefix, shared[start])
            if prefix < MIN_SHARED_TOKENS:
                break
            saved = best[start] + prefix * (end - start - 1)
            if saved > best[end]:
                best[end], cut[end] = saved, start
    groups: list[PrefixGroup] = []
    end = len(ordered)
    while end:
        start = cut[end]
        prefix = min(shared[start : end - 1], default=0)
        groups.append(PrefixGroup(prefix, tuple(ordered[start:end])))
        end = start
    return groups[::-1]


def _shared_length(first: TokenizedRow, second: TokenizedRow) -> int:
    limit = min(len(first.prompt_ids), len(second.prompt_ids)) - 1
    for position in range(limit):
        if first.prompt_ids[position] != second.prompt_ids[position]:
            return position
    return max(limit, 0)


def pack(batch: MicroBatch) -> PackedRow:
    """Lay a micro-batch out as one sequence."""
    packed = PackedRow([], [], [], tuple((g.prefix_length, _own_lengths(g)) for g in batch.groups))
    for group in batch.groups:
        prefix = group.prefix_length
        packed.input_ids.extend(group.rows[0].prompt_ids[:prefix])
        packed.position_ids.extend(range(prefix))
        for row in group.rows:
            start = len(packed.input_ids)
            packed.input_ids.extend(row.prompt_ids[prefix:] + row.completion_ids)
            packed.position_ids.extend(range(prefix, len(row)))
            first = start + len(row.prompt_ids) - prefix - 1
            packed.logit_positions.extend(range(first, first + len(row.completion_ids)))
    return packed


def _own_lengths(group: PrefixGroup) -> tuple[int, ...]:
    return tuple(len(row) - group.prefix_length for row in group.rows)
