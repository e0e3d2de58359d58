"""Which output field is a label, and splits that keep the labels' shares."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import dspy
import numpy as np
import pytest

from bettertogether.errors import ConfigError
from bettertogether.rollouts.labels import label_fields, labels_of, split_apart, stratified_order, stratified_split


def examples(answers: list[object], **more: list[object]) -> list[dspy.Example]:
    return [
        dspy.Example(q=i, answer=answer, **{k: v[i] for k, v in more.items()}).with_inputs("q")
        for i, answer in enumerate(answers)
    ]


def test_label_fields_are_those_that_are_not_inputs_in_order() -> None:
    assert label_fields(examples(["a", "b"], why=["x", "y"])) == ["answer", "why"]


def test_labels_are_found_where_values_repeat() -> None:
    assert labels_of(examples(["a", "b", "a", "b"])) == ["a", "b", "a", "b"]
    assert labels_of(examples(["a", "b", "a"])) == [None] * 3


def test_numbers_and_bools_are_labels_as_text() -> None:
    assert labels_of(examples([1, 2, 1, 2])) == ["1", "2", "1", "2"]
    assert labels_of(examples([True, False, True, False])) == ["True", "False", "True", "False"]


def test_what_numpy_and_pandas_hold_are_labels_too() -> None:
    assert labels_of(examples(list(np.array([1, 2, 1, 2])))) == ["1", "2", "1", "2"]
    assert labels_of(examples(list(np.array([True, False] * 2)))) == ["True", "False", "True", "False"]
    assert labels_of(examples(list(np.array([0.0, 1.0, 0.0, 1.0])))) == [None] * 4


def test_nan_is_no_label() -> None:
    assert labels_of(examples(["a", "b", "a", "b", math.nan])) == ["a", "b", "a", "b", None]


def test_free_text_answers_have_no_label() -> None:
    assert labels_of(examples([f"answer {i}" for i in range(20)])) == [None] * 20


def test_one_value_for_all_is_no_label() -> None:
    assert labels_of(examples(["same"] * 6)) == [None] * 6


def test_floats_and_lists_are_no_labels() -> None:
    assert labels_of(examples([0.5, 0.5, 1.5, 1.5])) == [None] * 4
    assert labels_of(examples([["a"], ["a"], ["b"], ["b"]])) == [None] * 4


def test_the_first_field_that_repeats_is_the_label() -> None:
    found = labels_of(examples(["p", "q", "r", "s"], kind=["x", "y", "x", "y"]))
    assert found == ["x", "y", "x", "y"]


def test_a_named_label_field_is_taken_even_if_its_values_do_not_repeat() -> None:
    assert labels_of(examples(["p", "q", "r"]), "answer") == ["p", "q", "r"]


def test_an_example_without_the_label_has_none() -> None:
    assert labels_of([*examples(["a", "b", "a", "b"]), dspy.Example(q=9).with_inputs("q")])[-1] is None


def test_more_than_fifty_values_are_no_labels() -> None:
    assert labels_of(examples([str(i % 51) for i in range(204)])) == [None] * 204


def test_any_head_of_a_stratified_order_has_the_labels_shares() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = stratified_order(list(range(100)), labels, seed=3)
    assert sorted(order) == list(range(100))
    for size in (10, 20, 50):
        counts = Counter(labels[i] for i in order[:size])
        assert all(abs(counts[label] - share * size) <= 1 for label, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)))


def test_a_stratified_order_depends_on_the_seed_alone() -> None:
    labels = ["a", "b"] * 10
    one, again, other = (stratified_order(list(range(20)), labels, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize("label", ["a", None])
def test_without_labels_the_order_is_a_plain_shuffle(label: str | None) -> None:
    order = stratified_order(list(range(30)), [label] * 30, seed=0)
    assert sorted(order) == list(range(30))
    assert order != list(range(30))


@pytest.mark.parametrize(("first_size", "expected"), [(0, 0), (1, 3), (3, 3), (4, 3), (6, 6), (30, 15)])
def test_parts_that_are_split_apart_ask_nothing_that_the_other_asks(first_size: int, expected: int) -> None:
    first, second = split_apart([*examples(["a"] * 6)] * 3, first_size, seed=0)
    assert (len(first), len(second)) == (expected, 18 - expected)
    assert not {example.q for example in first} & {example.q for example in second}


@pytest.mark.parametrize("seed", range(4))
def test_many_that_ask_the_same_are_not_more_than_was_asked_for(seed: int) -> None:
    many, few = [*examples(["a"])] * 9, [dspy.Example(q=9, answer="a").with_inputs("q")]
    assert split_apart([*many, *few], 2, seed) == (few, many)
    assert split_apart([*many, *few, *few], 1, seed) == ([*few, *few], many)


def test_what_asks_the_same_throughout_is_not_split_apart() -> None:
    assert split_apart([*examples(["a"])] * 3, 1, seed=0) == ([], [*examples(["a"])] * 3)


def test_a_split_is_disjoint_and_complete() -> None:
    data = examples(["a", "b"] * 10)
    first, second = stratified_split(data, 6, seed=0)
    assert sorted(example.q for example in [*first, *second]) == list(range(20))
    assert Counter(example.answer for example in first) == {"a": 3, "b": 3}


@pytest.mark.parametrize("size", [0.25, -3])
def test_the_size_of_a_split_is_a_number_of_examples(size: Any) -> None:
    with pytest.raises(ConfigError, match=f"first_size={size} is not allowed: give a number of examples"):
        stratified_split(examples(["a"] * 10), size, seed=0)
