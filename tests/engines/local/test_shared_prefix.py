"""Prompts that begin alike are put together, so that what they share is computed once."""

from __future__ import annotations

import numpy as np
import pytest

from bettertogether.engines.local.packed_attention import PrefixTensors
from bettertogether.engines.local.shared_prefix import (
    LEAST_GAIN,
    Cluster,
    Prefix,
    PrefixCache,
    Tokens,
    common_length,
    shared_clusters,
)


def tokens(*parts: tuple[int, int]) -> Tokens:
    """Runs of tokens, as (token, how often)."""
    return np.array([token for token, times in parts for _ in range(times)], dtype=np.int64)


def prefix(*parts: tuple[int, int], adapter: str = "") -> Prefix:
    """One of 10 bytes."""
    head = tokens(*parts)
    return Prefix(adapter, head, 10, PrefixTensors(head.size))


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [1], 0), ([5, 6], [5, 6], 2)],
)
def test_the_common_length_is_that_of_the_shared_head(a: list[int], b: list[int], length: int) -> None:
    assert common_length(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)) == length


def test_prompts_of_one_predictor_are_one_cluster() -> None:
    prompts = [tokens((1, 100), (token, 5)) for token in (2, 3, 4)]
    assert shared_clusters(prompts) == [Cluster(100, (0, 1, 2))]


def test_prompts_with_nothing_in_common_stay_alone() -> None:
    assert shared_clusters([tokens((1, 50)), tokens((2, 50))]) == [Cluster(0, (0, 1))]


def test_a_branch_that_saves_enough_is_a_cluster_of_its_own_longest_first() -> None:
    short = [tokens((1, 100), (token, 5)) for token in (2, 3)]
    long = [tokens((1, 100), (9, LEAST_GAIN), (token, 5)) for token in (4, 5)]
    assert shared_clusters([short[0], long[0], short[1], long[1]]) == [
        Cluster(100 + LEAST_GAIN, (1, 3)),
        Cluster(100, (0, 2)),
    ]


def test_a_branch_that_saves_little_stays_with_its_siblings() -> None:
    short = tokens((1, 100), (2, 5))
    long = [tokens((1, 100), (9, LEAST_GAIN - 1), (token, 5)) for token in (4, 5)]
    assert shared_clusters([short, *long]) == [Cluster(100, (0, 1, 2))]


def test_equal_prompts_share_all_but_their_last_token() -> None:
    assert shared_clusters([tokens((1, 80))] * 3) == [Cluster(79, (0, 1, 2))]


def test_a_prompt_that_begins_another_limits_the_prefix_to_one_token_less() -> None:
    assert shared_clusters([tokens((1, 80)), tokens((1, 90))]) == [Cluster(79, (0, 1))]


def test_every_prompt_is_in_one_cluster() -> None:
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(0, 2, numbers.integers(1, 300)) for _ in range(60)]
    members = [member for cluster in shared_clusters(prompts) for member in cluster.members]
    assert sorted(members) == list(range(60))


def test_the_best_prefix_is_the_one_with_most_in_common_of_the_same_adapter() -> None:
    cache = PrefixCache(100)
    short, long = prefix((1, 5)), prefix((1, 5), (2, 5))
    for each in (short, long, prefix((1, 5), (2, 9), adapter="other")):
        cache.add(each)
    assert cache.best("", tokens((1, 5), (2, 3), (4, 1))) == (long, 8)
    assert cache.best("", tokens((3, 5))) == (None, 0)


def test_the_least_recently_used_prefix_makes_room() -> None:
    cache = PrefixCache(20)
    first, second = prefix((1, 5)), prefix((2, 5))
    cache.add(first)
    cache.add(second)
    cache.use(first)
    cache.unuse(first)
    assert cache.make_room(10)
    assert cache.best("", second.tokens) == (None, 0)
    assert cache.best("", first.tokens) == (first, 5)


def test_a_prefix_in_use_stays() -> None:
    cache = PrefixCache(20)
    used = prefix((1, 5))
    cache.add(used)
    cache.use(used)
    assert not cache.make_room(11)
    cache.unuse(used)
    assert cache.make_room(11)
    assert cache.size_bytes == 0


def test_what_can_never_fit_drives_nothing_out() -> None:
    cache = PrefixCache(20)
    cache.add(prefix((1, 5)))
    assert not cache.make_room(21)
    assert cache.size_bytes == 10
