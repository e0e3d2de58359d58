"""A strategy's text: keys between arrows, and the prefixes that are its rounds."""

from __future__ import annotations

import pytest

from bettertogether.errors import StrategyError
from bettertogether.run.strategy import join, parse, prefixes

KEYS = ("p", "w")


@pytest.mark.parametrize("text", ["p -> w -> p", "p->w->p", " p  ->w -> p ", "p → w → p", "p\n->\tw -> p"])
def test_white_space_around_arrows_does_not_matter(text: str) -> None:
    assert parse(text, KEYS) == (("p", "w", "p"),)


@pytest.mark.parametrize("text", ["", "   ", []])
def test_an_empty_strategy_is_an_error(text: str) -> None:
    with pytest.raises(StrategyError, match="strategy cannot be empty"):
        parse(text, KEYS)


@pytest.mark.parametrize("text", ["p -> x", "p ->", "-> p", "p -> -> w", "pw", "p w"])
def test_an_unknown_or_empty_step_is_an_error_that_names_the_valid_keys(text: str) -> None:
    with pytest.raises(StrategyError, match=r"contains invalid optimizer keys: .*Valid keys are: \['p', 'w'\]"):
        parse(text, KEYS)


def test_optimizers_that_are_given_replace_the_defaults_and_it_is_said() -> None:
    with pytest.raises(StrategyError) as caught:
        parse("p -> w -> p", ["w"])
    assert str(caught.value) == (
        "Strategy contains invalid optimizer keys: ['p']. Valid keys are: ['w'], joined by \"->\", as in 'w'. "
        "Optimizers that are given replace the defaults: add p=BootstrapFewShotRS(metric), or name these keys."
    )


def test_a_strategy_that_is_no_text_is_an_error() -> None:
    with pytest.raises(StrategyError, match="strategy must be text"):
        parse([("p", "w")], KEYS)  # type: ignore[list-item]


def test_any_key_is_a_step_name() -> None:
    assert parse("my gepa -> mipro_2", ("my gepa", "mipro_2")) == (("my gepa", "mipro_2"),)


def test_a_list_gives_each_distinct_strategy_once_in_order() -> None:
    assert parse(["w -> p", "p", "w->p"], KEYS) == (("w", "p"), ("p",))


def test_shared_prefixes_come_once_and_after_their_own_prefixes() -> None:
    strategies = (("p", "w", "p"), ("p", "w"), ("w", "p"))
    assert prefixes(strategies) == [("p",), ("p", "w"), ("p", "w", "p"), ("w",), ("w", "p")]


def test_join_is_the_inverse_of_parse() -> None:
    assert join(("p", "w")) == "p -> w"
    assert join(()) == ""
