"""Rows become batches in which common beginnings are there once, within a limit of tokens."""

from __future__ import annotations

from dataclasses import replace

from bettertogether.training.packing import (
    MIN_SHARED_TOKENS,
    Block,
    MicroBatch,
    TokenizedRow,
    drawn_form,
    epoch_batches,
    micro_batches,
    pack,
)

PREFIX = list(range(100, 120))
UNLIMITED = 10**9


def test_an_epoch_uses_every_row_once_and_the_last_batch_may_be_short() -> None:
    batches = epoch_batches(10, 4, seed=3, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(index for batch in batches for index in batch) == list(range(10))


def test_the_order_of_rows_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_batches(50, 8, seed=3, epoch=1) == epoch_batches(50, 8, seed=3, epoch=1)
    assert epoch_batches(50, 8, seed=3, epoch=1) != epoch_batches(50, 8, seed=3, epoch=2)
    assert epoch_batches(50, 8, seed=3, epoch=1) != epoch_batches(50, 8, seed=4, epoch=1)


def in_one(rows: list[TokenizedRow]) -> MicroBatch:
    """All rows in one forward pass."""
    (batch,) = micro_batches(rows, UNLIMITED, UNLIMITED)
    return batch


def test_rows_share_a_common_beginning() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2]) for i in range(3)]
    assert in_one(rows) == MicroBatch(tuple(rows), (0, 20, 20))


def test_what_is_shared_ends_before_the_last_prompt_token_of_every_row() -> None:
    rows = [TokenizedRow(PREFIX, [1, 2]), TokenizedRow(PREFIX, [3, 2])]
    assert in_one(rows).shared == (0, 19)
    assert in_one(rows).tokens == 19 + 2 * 3


def test_a_prompt_that_begins_another_prompt_shares_all_but_its_last_token() -> None:
    rows = [TokenizedRow(PREFIX, [2]), TokenizedRow([*PREFIX, 5, 6], [2])]
    assert in_one(rows).shared == (0, 19)


def test_answers_to_one_prompt_share_it_and_prompts_share_what_they_have_in_common() -> None:
    header = list(range(10))
    first = [TokenizedRow([*header, *PREFIX, 7], [i]) for i in range(3)]
    second = [TokenizedRow([*header, *PREFIX[::-1], 7], [i]) for i in range(2)]
    batch = in_one([second[0], first[0], second[1], first[2], first[1]])
    assert batch == MicroBatch((*first, *second), (0, 30, 30, 10, 30))
    assert batch.tokens == 10 + (20 + 3 * 2) + (20 + 2 * 2)


def test_a_common_beginning_too_short_to_pay_is_not_shared() -> None:
    short = list(range(MIN_SHARED_TOKENS - 1))
    rows = [TokenizedRow([*short, 50 + i, 60], [2]) for i in range(3)]
    assert in_one(rows).shared == (0, 0, 0)
    # Nor is so little more than what more rows share.
    rows = [TokenizedRow([*PREFIX, *short, 50 + i, 60], [2]) for i in range(2)]
    assert in_one([*rows, TokenizedRow([*PREFIX, 90, 60], [2])]).shared == (0, 20, 20)


def test_a_batch_does_not_depend_on_the_order_of_rows() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2]) for i in range(5)] + [TokenizedRow([i], [9]) for i in range(3)]
    assert in_one(rows) == in_one(rows[::-1])


def test_micro_batches_keep_the_token_limit_and_repeat_the_prefix() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2, 2]) for i in range(6)]
    batches = micro_batches(rows, max_tokens=31, max_completion_tokens=UNLIMITED)
    assert [batch.tokens for batch in batches] == [28, 28, 28]
    assert [row for batch in batches for row in batch.rows] == rows


def test_micro_batches_keep_the_limit_on_trained_tokens() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2, 2]) for i in range(6)]
    batches = micro_batches(rows, max_tokens=UNLIMITED, max_completion_tokens=8)
    assert [sum(len(row.completion_ids) for row in batch.rows) for batch in batches] == [8, 4]


def test_a_row_above_the_limit_goes_through_alone() -> None:
    rows = [TokenizedRow([1, 2], [2]), TokenizedRow(list(range(3, 50)), [2]), TokenizedRow([60, 61], [2])]
    batches = micro_batches(rows, max_tokens=10, max_completion_tokens=UNLIMITED)
    assert [[len(row) for row in batch.rows] for batch in batches] == [[3], [48], [3]]


def test_no_rows_are_no_pass() -> None:
    assert micro_batches([], UNLIMITED, UNLIMITED) == []


def test_a_packed_row_has_what_is_shared_once_and_positions_that_go_on_after_it() -> None:
    rows = (TokenizedRow([1, 2, 3, 4], [5, 6]), TokenizedRow([1, 2, 7], [8]), TokenizedRow([9], [10, 11]))
    packed = pack(MicroBatch(rows, (0, 2, 0)))
    assert packed.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert packed.position_ids == [0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 2]
    assert packed.blocks == (Block(0, 2, 8), Block(2, 6, 6), Block(6, 8, 8), Block(8, 11, 11))


def test_blocks_of_rows_that_share_more_than_others_lie_within_what_those_share() -> None:
    rows = (TokenizedRow([1, 2, 3, 4, 5], [6]), TokenizedRow([1, 2, 3, 4, 7], [8]), TokenizedRow([1, 2, 9], [8]))
    packed = pack(MicroBatch(rows, (0, 4, 2)))
    assert packed.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 8]
    assert packed.position_ids == [0, 1, 2, 3, 4, 5, 4, 5, 2, 3]
    assert packed.blocks == (Block(0, 2, 10), Block(2, 4, 8), Block(4, 6, 6), Block(6, 8, 8), Block(8, 10, 10))


def test_each_completion_token_is_predicted_at_the_token_before_it() -> None:
    rows = (TokenizedRow([1, 2, 3, 4], [5, 6]), TokenizedRow([1, 2, 7], [8]))
    packed = pack(MicroBatch(rows, (0, 2)))
    labels = [token for row in rows for token in row.completion_ids]
    assert [(packed.input_ids[p], label) for p, label in zip(packed.logit_positions, labels, strict=True)] == [
        (4, 5),
        (5, 6),
        (7, 8),
    ]


WITH_FORMS = [
    TokenizedRow([1], [2], forms=[[3], [4], [5]]),
    TokenizedRow([1], [2], forms=[[6], [7]]),
    TokenizedRow([1], [2]),
]


def test_a_share_of_the_batches_shows_forms_each_as_often_drawn_by_seed_epoch_and_number() -> None:
    draws = [drawn_form(WITH_FORMS, 0.6, 5, epoch, batch) for epoch in range(20) for batch in range(100)]
    assert draws == [drawn_form(WITH_FORMS[:1], 0.6, 5, epoch, batch) for epoch in range(20) for batch in range(100)]
    assert [round(draws.count(form) / 2000, 1) for form in (None, 0, 1, 2)] == [0.4, 0.2, 0.2, 0.2]
    assert draws != [drawn_form(WITH_FORMS, 0.6, 6, epoch, batch) for epoch in range(20) for batch in range(100)]
    assert {drawn_form(WITH_FORMS, 0.0, 5, 1, batch) for batch in range(20)} == {None}
    assert {drawn_form(WITH_FORMS, 1.0, 5, 1, batch) for batch in range(20)} == {0, 1, 2}
    assert {drawn_form(WITH_FORMS[2:], 1.0, 5, 1, batch) for batch in range(20)} == {None}


def test_the_longest_of_a_row_is_its_longest_answer_to_its_longest_prompt() -> None:
    row = TokenizedRow([1], [2], forms=[[3, 4, 5], [6, 7]])
    assert (len(row), row.longest) == (2, 4)
    assert replace(row, forms=[], rejected_ids=[3, 4, 5]).longest == 4


def test_a_row_with_fewer_forms_counts_round_and_one_without_shows_its_prompt() -> None:
    assert [row.shown(2).prompt_ids for row in WITH_FORMS] == [[5], [6], [1]]
