"""Advantages by hand: which answers are compared, and how much better than the others each was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dspy
import pytest

from bettertogether.rollouts.branches import BranchPoint
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.traces import Trace
from bettertogether.steps.policy_groups import compared, reward_of, spread_of
from bettertogether.training.config import PolicyConfig

POLICY = PolicyConfig()


def answer(number: int) -> dict[str, Any]:
    """An answer that is told from others by its one token."""
    return {
        "prompt_token_ids": [1],
        "token_ids": [number],
        "forced": [False],
        "response_format": None,
        "temperature": 1.0,
    }


def call(predictor: str, *numbers: int, **options: Any) -> Call:
    return Call(predictor, {}, {}, sampled=tuple(map(answer, numbers)), **options)


def run(index: int, score: float, *calls: Call, unread: tuple[Call, ...] = (), reason: str | None = None) -> Trace:
    return Trace(index, dspy.Example(), None, calls, Verdict(score, score >= 1, reason), "sample", unread=unread)


def advantages(
    *runs: Trace | BranchPoint, policy: PolicyConfig = POLICY, of: str = "ab"
) -> dict[str, dict[int, float]]:
    """By predictor, the advantage of each answer by its token."""
    groups = compared(runs, of, policy)
    return {
        name: {each.sampled.token_ids[0]: each.advantage for each in answers}
        for name, answers in groups.answers.items()
    }


def test_an_advantage_is_the_reward_minus_the_mean_of_its_group() -> None:
    runs = [run(0, score, call("a", number)) for number, score in enumerate((1.0, 0.0, 0.0, 1.0, 0.5))]
    assert advantages(*runs) == {"a": {0: 0.5, 1: -0.5, 2: -0.5, 3: 0.5, 4: 0.0}}


def test_it_is_divided_by_the_deviation_where_that_is_asked_for() -> None:
    runs = [run(0, score, call("a", number)) for number, score in enumerate((1.0, 0.0, 0.0, 0.0))]
    found = advantages(*runs, policy=PolicyConfig(divide_by_deviation=True))["a"]
    assert found == pytest.approx({0: 3**0.5, 1: -(3**-0.5), 2: -(3**-0.5), 3: -(3**-0.5)})


def test_answers_are_compared_by_example_predictor_and_number_of_the_call() -> None:
    runs = [
        run(0, 1.0, call("a", 1), call("a", 2), call("b", 3)),
        run(0, 0.0, call("a", 4), call("b", 5)),
        run(1, 1.0, call("a", 6), call("a", 7)),
        run(1, 0.0, call("a", 8), call("a", 9)),
    ]
    assert advantages(*runs) == {"a": {1: 0.5, 4: -0.5, 6: 0.5, 8: -0.5, 7: 0.5, 9: -0.5}, "b": {3: 0.5, 5: -0.5}}


def test_the_answers_to_one_call_of_one_run_are_a_group_and_what_came_before_and_after_it_has_no_part() -> None:
    first, second = call("a", 1), call("a", 2)
    origin = run(0, 1.0, first, second)

    def branch(score: float, *calls: Call, **options: Any) -> Trace:
        return run(0, score, *calls, **options)

    at_first = (
        branch(0.0, call("a", 3, anew=True), call("a", 4)),
        branch(0.5, call("a", 5, anew=True), call("a", 6)),
        replace(branch(0.0, call("a", 7)), strayed=True),
    )
    at_second = (
        branch(1.0, call("a"), call("a", 8, anew=True)),
        branch(0.0, call("a"), unread=(call("a", 9, anew=True),), reason="parse failure"),
    )
    points = BranchPoint(origin, first, at_first), BranchPoint(origin, second, at_second)
    found = advantages(*points)["a"]
    assert found == pytest.approx({1: 0.5, 3: -0.5, 5: 0.0, 2: 2 / 3, 8: 2 / 3, 9: -4 / 3})
    assert (compared(points, "a", POLICY).kept, compared(points, "a", POLICY).dropped) == (2, 0)


def test_groups_of_one_reward_are_dropped_and_counted() -> None:
    alike = [run(0, 0.1 + 0.2, call("a", 1)), run(0, 0.3, call("a", 2))]
    apart = [run(1, 1.0, call("a", 3), call("b", 4)), run(1, 0.0, call("a", 5))]
    groups = compared([*alike, *apart], "ab", POLICY)
    assert (groups.kept, groups.dropped, groups.examples) == (1, 2, frozenset({1}))
    assert [each.sampled.token_ids for each in groups.answers["a"]] == [[3], [5]]


def test_predictors_that_are_not_trained_are_left_out() -> None:
    runs = [run(0, score, call("a", number), call("b", 10 + number)) for number, score in enumerate((1.0, 0.0))]
    assert advantages(*runs, of="b") == {"b": {10: 0.5, 11: -0.5}}


def test_a_run_that_ends_with_an_answer_that_can_not_be_read_earns_what_was_set_for_it() -> None:
    broken = run(0, 0.0, call("a", 2), unread=(call("b", 4, 5),), reason="parse failure")
    assert (reward_of(broken, POLICY), reward_of(broken, PolicyConfig(unread_reward=0.25))) == (-1.0, 0.25)
    found = advantages(run(0, 1.0, call("a", 1), call("b", 3)), broken)
    assert found == {
        "a": {1: 1.0, 2: -1.0},
        "b": {3: pytest.approx(4 / 3), 4: pytest.approx(-2 / 3), 5: pytest.approx(-2 / 3)},
    }


def test_an_answer_that_was_asked_for_again_is_worse_than_the_one_that_was_read() -> None:
    found = advantages(run(0, 1.0, call("a", 1, 2)), run(0, 1.0, call("a", 3)))
    assert found["a"] == pytest.approx({1: -4 / 3, 2: 2 / 3, 3: 2 / 3})


def test_an_answer_that_could_not_be_read_is_worse_whatever_its_run_came_to() -> None:
    assert advantages(run(0, 1.0, unread=(call("a", 1),)), run(0, 1.0, call("a", 2))) == {"a": {1: -1.0, 2: 1.0}}


def test_a_call_of_another_lm_is_not_learned() -> None:
    runs = [run(0, score, call("a", number, unfit="made with another LM")) for number, score in enumerate((1.0, 0.0))]
    assert compared(runs, "a", POLICY).answers == {}


def test_the_spread_is_the_mean_deviation_of_the_examples() -> None:
    runs = [run(0, 1.0), run(0, 0.0), run(1, 1.0), run(1, 1.0)]
    assert spread_of(runs, POLICY) == 0.25
