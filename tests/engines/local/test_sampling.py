"""Which token is taken from a row of logits: greedy, drawn, allowed by a grammar, seeded."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from dspy.lm15 import Config, UnsupportedFeatureError

from bettertogether.engines.answers import SamplingOptions
from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.sampling import choose, decide

LOGITS_1_V = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


class Allowed:
    """A grammar that allows the same tokens at each step, and forces a few after the first."""

    def __init__(self, *token_ids: int, forced: tuple[int, ...] = (), ends: bool = False) -> None:
        self.token_ids = token_ids
        self.ended = False
        self.taken: list[int] = []
        self._forced = list(forced)
        self._ends = ends

    def allows(self, token_id: int) -> bool:
        return token_id in self.token_ids

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)
        self.ended = self._ends

    def forced(self) -> list[int]:
        return self._forced

    def fill_mask(self, address: int, size_bytes: int) -> None:
        bits = np.zeros(size_bytes, dtype=np.uint8)
        for token_id in self.token_ids:
            bits[token_id // 8] |= 1 << token_id % 8
        np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))[:] = bits


def row(constraint: Allowed | None = None, **options: Any) -> BatchRow:
    return BatchRow([1], 9, sampling=SamplingOptions(**options), constraint=constraint)


def drawn(times: int = 4000, constraint: Allowed | None = None, **options: Any) -> dict[int, float]:
    """Shares of the tokens in many draws of each of 40 rows."""
    rows = [row(constraint, seed=seed, **{"temperature": 1.0, **options}) for seed in range(40)]
    logits_B_V = LOGITS_1_V.repeat(len(rows), 1)
    counts = Counter(token for _ in range(times // len(rows)) for token in choose(logits_B_V, rows))
    return {token: count / times for token, count in sorted(counts.items())}


GREEDY = [{}, *({"temperature": heat} for heat in (1e-300, 1e-46, 1e-40, 1e-38))]


@pytest.mark.parametrize("options", [*GREEDY, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.0}])
def test_greedy_takes_the_likeliest(options: dict[str, Any]) -> None:
    assert choose(LOGITS_1_V, [row(**options)]) == [0]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
        ({"top_k": 2}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.8}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.81}, {0: 0.526, 1: 0.316, 2: 0.158}),
        ({"top_k": 3, "top_p": 0.5}, {0: 1.0}),
        ({"temperature": 0.5}, {0: 0.685, 1: 0.247, 2: 0.062, 3: 0.007}),
    ],
)
def test_tokens_are_drawn_by_their_share(options: dict[str, Any], shares: dict[int, float]) -> None:
    assert drawn(**options) == pytest.approx(shares, abs=0.02)


def test_a_grammar_leaves_the_shares_among_the_allowed() -> None:
    assert drawn(constraint=Allowed(1, 2)) == pytest.approx({1: 2 / 3, 2: 1 / 3}, abs=0.02)


def test_greedy_takes_the_likeliest_allowed() -> None:
    assert choose(LOGITS_1_V, [row(Allowed(3, 2))]) == [2]


def test_the_mask_reaches_past_the_last_full_word() -> None:
    logits_1_V = torch.arange(70.0)[None]
    assert choose(logits_1_V, [row(Allowed(65))]) == [65]
    assert choose(logits_1_V, [row(Allowed(31, 32, 63))]) == [63]


def test_each_row_has_its_own_way() -> None:
    rows = [row(), row(Allowed(3)), row(temperature=1.0, seed=5)]
    alone = [choose(LOGITS_1_V, [row(temperature=1.0, seed=5)])[0]]
    assert choose(LOGITS_1_V.repeat(3, 1), rows) == [0, 3, *alone]


def test_rows_without_a_seed_differ() -> None:
    logits_1_V = torch.zeros(1, 1000)
    assert len({choose(logits_1_V, [row(temperature=1.0)])[0] for _ in range(20)}) > 10


def test_forced_tokens_follow_the_picked_one() -> None:
    grammar = Allowed(1, forced=(7, 8), ends=True)
    decision = decide(LOGITS_1_V, [row(grammar)])[0]
    assert (decision.token_ids, decision.ended, grammar.taken) == ((1, 7, 8), True, [1])


def test_a_row_that_wants_scores_is_forced_nothing() -> None:
    assert decide(LOGITS_1_V, [row(Allowed(1, forced=(7, 8)), logprobs=0)])[0].token_ids == (1,)


def test_scores_are_of_the_unmodified_distribution() -> None:
    score = decide(LOGITS_1_V, [row(Allowed(2), temperature=0.1, top_k=1, logprobs=2)])[0].scores[0]
    assert (score.token_id, [token for token, _ in score.top]) == (2, [0, 1])
    assert score.logprob == pytest.approx(math.log(0.15))
    assert [value for _, value in score.top] == pytest.approx([math.log(0.5), math.log(0.3)])


def test_top_p_looks_past_the_likeliest_thousand_where_it_must() -> None:
    logits_1_V = torch.zeros(1, 5000)
    token_ids = {choose(logits_1_V, [row(temperature=1.0, top_p=0.9, seed=seed)])[0] for seed in range(60)}
    assert len(token_ids) > 50


def test_options_come_from_the_request() -> None:
    config = Config(temperature=0.7, top_p=0.9, top_k=5, seed=3, stop=("x",), logprobs=2)
    assert SamplingOptions.from_config(config) == SamplingOptions(0.7, 0.9, 5, 3, ("x",), 2)
    assert SamplingOptions.from_config(Config()).greedy


@pytest.mark.parametrize("option", [{"frequency_penalty": 0.5}, {"presence_penalty": 1.0}, {"extensions": {"a": 1}}])
def test_an_option_that_is_not_known_is_refused_by_name(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(UnsupportedFeatureError, match=name) as caught:
        SamplingOptions.from_config(Config(**option))
    assert caught.value.feature == f"config.{name}"
