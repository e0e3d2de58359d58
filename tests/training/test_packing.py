"""Rows become batches and groups with a common beginning, within a limit of tokens."""

from __future__ import annotations

from bettertogether.training.packing import (
    MIN_SHARED_TOKENS,
    MicroBatch,
    PrefixGroup,
    TokenizedRow,
    drawn_form,
    epoch_batches,
    micro_batches,
    pack,
    prefix_groups,
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


def test_rows_with_a_common_beginning_form_a_group() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2]) for i in range(3)]
    assert prefix_groups(rows) == [PrefixGroup(20, tuple(rows))]


def test_a_prefix_ends_before_the_last_prompt_token_of_every_row() -> None:
    rows = [TokenizedRow(PREFIX, [1, 2]), TokenizedRow(PREFIX, [3, 2])]
    (group,) = prefix_groups(rows)
    assert group.prefix_length == 19
    assert group.tokens == 19 + 2 * 3


def test_a_prompt_that_begins_another_prompt_shares_all_but_its_last_token() -> None:
    rows = [TokenizedRow(PREFIX, [2]), TokenizedRow([*PREFIX, 5, 6], [2])]
    assert [group.prefix_length for group in prefix_groups(rows)] == [19]


def test_prompts_of_two_predictors_form_two_groups_though_they_begin_alike() -> None:
    header = list(range(10))
    first = [TokenizedRow([*header, *PREFIX, i, 7], [2]) for i in range(2)]
    second = [TokenizedRow([*header, *PREFIX[::-1], i, 7], [2]) for i in range(2)]
    assert prefix_groups([second[0], first[0], second[1], first[1]]) == [
        PrefixGroup(30, tuple(first)),
        PrefixGroup(30, tuple(second)),
    ]


def test_a_common_beginning_too_short_to_pay_is_not_shared() -> None:
    short = list(range(MIN_SHARED_TOKENS - 1))
    rows = [TokenizedRow([*short, 50 + i, 60], [2]) for i in range(3)]
    assert [group.prefix_length for group in prefix_groups(rows)] == [0, 0, 0]


def test_groups_do_not_depend_on_the_order_of_rows() -> None:
    rows = [TokenizedRow([*PREFIX, i, 7], [2]) for i in range(5)] + [TokenizedRow([i], [9]) for i in range(3)]
    assert prefix_groups(rows) == prefix_groups(rows[::-1])


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


def test_a_packed_row_has_the_prefix_once_and_positions_that_start_again() -> None:
    rows = (TokenizedRow([1, 2, 3, 4], [5, 6]), TokenizedRow([1, 2, 7], [8]))
    packed = pack(MicroBatch((PrefixGroup(2, rows), PrefixGroup(0, (TokenizedRow([9], [10, 11]),)))))
    assert packed.input_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert packed.position_ids == [0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 2]
    assert packed.groups == ((2, (4, 2)), (0, (3,)))


def test_each_completion_token_is_predicted_at_the_token_before_it() -> None:
    rows = (TokenizedRow([1, 2, 3, 4], [5, 6]), TokenizedRow([1, 2, 7], [8]))
    packed = pack(MicroBatch((PrefixGroup(2, rows),)))
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


def test_a_row_with_fewer_forms_counts_round_and_one_without_shows_its_prompt() -> None:
    assert [row.shown(2).prompt_ids for row in WITH_FORMS] == [[5], [6], [1]]
