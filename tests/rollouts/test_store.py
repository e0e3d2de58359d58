"""A run in the store is not done again: what makes it the same run."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import ONE, Parity, numbers, parity_program, two_step_program

from bettertogether.records import Ledger
from bettertogether.rollouts.examples import example_key
from bettertogether.rollouts.rollout import Attempt, RolloutStore, stable_seed
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


def test_a_run_in_the_store_is_not_done_again(engine: FakeEngine) -> None:
    store = RolloutStore()
    first = Runner(two_step_program(engine), store=store).run(ONE)
    again = Runner(two_step_program(engine), store=store).run(ONE)
    assert len(engine.requests) == 2
    assert again.calls == first.calls
    assert again.ledger == Ledger()


@pytest.mark.parametrize(
    "attempt",
    [Attempt("sample", 1, 1.0), Attempt("sample", 2, 0.5), Attempt("rescue", 1, None, {"parity": "odd"})],
    ids=["sample", "another sample", "rescue"],
)
def test_another_attempt_is_another_run(engine: FakeEngine, attempt: Attempt) -> None:
    runner = Runner(two_step_program(engine), store=RolloutStore())
    runner.run(ONE)
    runner.run(ONE, attempt)
    assert len(engine.requests) == 4


def test_another_seed_is_another_run_of_a_sampled_attempt(engine: FakeEngine) -> None:
    store = RolloutStore()
    for seed in (0, 1, 1):
        Runner(two_step_program(engine), seed=seed, store=store).run(ONE, Attempt("sample", 1, 1.0))
    assert len(engine.requests) == 4


def test_the_seed_does_not_matter_for_a_greedy_run(engine: FakeEngine) -> None:
    store = RolloutStore()
    for seed in (0, 1):
        Runner(two_step_program(engine), seed=seed, store=store).run(ONE)
    assert len(engine.requests) == 2


def test_a_parse_failure_is_kept_in_the_store_and_a_raise_or_a_timeout_is_not() -> None:
    class Raises(dspy.Predict):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            raise errors.pop(0)

    errors: list[Exception] = [TimeoutError(), KeyError(), ValueError()]
    program, store = Raises(Parity), RolloutStore()
    kinds = [Runner(program, store=store).run(ONE).failure for _ in range(3)]
    assert (kinds, errors) == (["timeout", "program error", "program error"], [])
    unparseable = FakeEngine(lambda _: "no")
    for _ in range(2):
        Runner(parity_program(unparseable), store=store).run(ONE)
    assert len(unparseable.requests) == 2


def test_runs_of_a_program_with_a_patched_forward_are_never_taken_from_the_store(engine: FakeEngine) -> None:
    store = RolloutStore()
    Runner(two_step_program(engine), store=store).run(ONE)
    patched = two_step_program(engine)
    patched.forward = lambda **inputs: dspy.Prediction(parity="patched")  # type: ignore[method-assign]
    assert Runner(patched, store=store).run(ONE).prediction.parity == "patched"


def test_examples_of_equal_content_have_equal_keys() -> None:
    assert example_key(numbers(1)[0]) == example_key(numbers(1)[0])
    assert example_key(numbers(1)[0]) != example_key(numbers(1, start=2)[0])


def test_a_stable_seed_is_a_31_bit_number_that_depends_on_the_parts_alone() -> None:
    assert stable_seed("a", 1) == stable_seed("a", 1) != stable_seed("a", 2)
    assert all(0 <= stable_seed(i) < 2**31 for i in range(100))
