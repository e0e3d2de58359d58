"""Which examples are held out, and what is asked of examples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import dspy
import pytest
from fakes import numbers

from bettertogether.errors import DataError
from bettertogether.rollouts.examples import check_examples
from bettertogether.run.held_out import split_valset


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("text", r"trainset must be a list of dspy\.Example, got str"),
        ({"a": 1}, "got dict"),
        (None, "got NoneType"),
        ([{"number": 1}], r"trainset\[0\] is a dict"),
        ([dspy.Example(number=1)], r"trainset\[0\] does not say which fields are inputs"),
        ([dspy.Example(a=1, b=2).with_inputs("x", "y")], r"\[0\] has no field 'x' or 'y', .* it has \['a', 'b'\]"),
    ],
)
def test_examples_must_say_which_fields_are_inputs(examples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_examples(examples, "trainset")


@pytest.mark.parametrize(
    ("count", "ratio", "size"), [(100, 0.1, 10), (15, 0.1, 2), (5, 0.1, 1), (2, 0.1, 1), (10, 0.9, 9)]
)
def test_without_a_valset_a_share_rounded_up_is_drawn(count: int, ratio: float, size: int) -> None:
    train, held_out, _ = split_valset(numbers(count), None, ratio, 0)
    assert (len(train), len(held_out)) == (count - size, size)
    assert sorted(e.number for e in [*train, *held_out]) == list(range(count))


def test_examples_of_the_same_inputs_are_held_out_together() -> None:
    other_label = [dspy.Example(number=n, parity="other").with_inputs("number") for n in range(20)]
    train, held_out, warnings = split_valset([*numbers(20), *numbers(20), *other_label], None, 0.5, 0)
    learned, measured = Counter(e.number for e in train), Counter(e.number for e in held_out)
    assert set(learned.values()) == set(measured.values()) == {3}
    assert (len(learned), len(measured), warnings) == (10, 10, [])


def test_examples_of_the_same_inputs_alone_leave_no_valset() -> None:
    train, held_out, (warning,) = split_valset([*numbers(1), *numbers(1)], None, 0.5, 0)
    assert (len(train), held_out) == (2, [])
    assert warning.startswith("There is no valset")


def test_the_valset_is_drawn_at_random_by_seed() -> None:
    def drawn(seed: int) -> list[int]:
        return [e.number for e in split_valset(numbers(100), None, 0.1, seed)[1]]

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0)) != list(range(10))


def test_the_valset_has_the_trainsets_labels() -> None:
    sorted_by_label = sorted(numbers(100), key=lambda e: e.parity)
    _, held_out, _ = split_valset(sorted_by_label, None, 0.2, 3)
    assert Counter(e.parity for e in held_out) == {"even": 10, "odd": 10}


def test_a_valset_given_is_taken_as_it_is() -> None:
    train, held_out, warnings = split_valset(numbers(5), numbers(30, start=50), 0.1, 0)
    assert (len(train), [e.number for e in held_out], warnings) == (5, list(range(50, 80)), [])


def test_a_small_valset_is_a_warning_that_says_how_coarse_scores_are() -> None:
    _, _, warnings = split_valset(numbers(50), None, 0.1, 0)
    assert warnings == [
        "The valset has 5 examples, so one of them is 20% of the score: give a larger valset, or a higher valset_ratio."
    ]
    _, _, warnings = split_valset(numbers(50), numbers(5, start=50), 0.1, 0)
    assert warnings == ["The valset has 5 examples, so one of them is 20% of the score: give a larger valset."]


def test_a_valset_of_one_example_is_told_of_in_the_singular() -> None:
    _, _, warnings = split_valset(numbers(50), numbers(1), 0.1, 0)
    assert warnings == [
        "1 of the valset's 1 example is in the trainset too: scores on them say little about new ones.",
        "The valset has 1 example, so it is 100% of the score: give a larger valset.",
    ]


def test_examples_in_both_sets_are_a_warning() -> None:
    other_label = [dspy.Example(number=n, parity="other").with_inputs("number") for n in range(10)]
    _, _, warnings = split_valset(other_label, numbers(30), 0.1, 0)
    assert any("10 of the valset's 30 examples are in the trainset too" in warning for warning in warnings)


def test_ratio_zero_is_no_valset_and_a_warning() -> None:
    train, held_out, warnings = split_valset(numbers(5), None, 0, 0)
    assert (len(train), held_out) == (5, [])
    assert "no valset" in warnings[0]


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_a_ratio_outside_its_range_is_an_error(ratio: float) -> None:
    with pytest.raises(DataError, match=r"valset_ratio must be in range \[0, 1\), got"):
        split_valset(numbers(5), None, ratio, 0)


def test_an_empty_trainset_is_an_error() -> None:
    with pytest.raises(DataError, match="trainset cannot be empty"):
        split_valset([], numbers(5), 0.1, 0)
