"""Limits on metric calls, tokens and minutes, over all ledgers of a run."""

from __future__ import annotations

import threading

import pytest

from bettertogether.errors import BudgetExceeded, ConfigError
from bettertogether.records import Ledger
from bettertogether.run.budget import Budget


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    "options", [{"minutes": 0}, {"metric_calls": -1}, {"tokens": 1.5}, {"metric_calls": True}, {"cost": 0}]
)
def test_a_limit_that_is_no_positive_number_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Budget(**options)  # type: ignore[arg-type]


def test_without_limits_nothing_is_ever_exceeded() -> None:
    meter = Budget().start()
    meter.charge(Ledger(metric_calls=10**9, prompt_tokens=10**12))
    meter.check()
    assert meter.used.metric_calls == 10**9


def test_metric_calls_are_exceeded_when_the_limit_is_reached() -> None:
    meter = Budget(metric_calls=24).start()
    meter.charge(Ledger(metric_calls=23))
    meter.check()
    meter.charge(Ledger(metric_calls=1))
    with pytest.raises(BudgetExceeded, match="24 of 24 metric calls"):
        meter.check()


def test_tokens_are_prompt_generated_and_trained_together() -> None:
    meter = Budget(tokens=60).start()
    meter.charge(Ledger(prompt_tokens=10, generated_tokens=20, trained_tokens=29))
    meter.check()
    meter.charge(Ledger(generated_tokens=1))
    with pytest.raises(BudgetExceeded, match="60 of 60 tokens"):
        meter.check()


def test_minutes_are_wall_time_whatever_the_ledgers_say() -> None:
    clock = Clock()
    meter = Budget(minutes=2).start(clock=clock)
    meter.charge(Ledger(seconds=10_000))
    clock.now_s += 119
    meter.check()
    clock.now_s += 1
    with pytest.raises(BudgetExceeded, match=r"2\.0 of 2 minutes"):
        meter.check()


def test_a_resumed_run_starts_with_what_it_spent_before() -> None:
    clock = Clock()
    meter = Budget(minutes=2, metric_calls=100).start(Ledger(metric_calls=40, seconds=90), clock=clock)
    clock.now_s += 10
    assert meter.used == Ledger(metric_calls=40, seconds=100)
    assert (meter.left_s, Budget(metric_calls=100).start().left_s) == (20, None)
    clock.now_s += 20
    with pytest.raises(BudgetExceeded, match=r"is used up: 2\.0 of 2 minutes, 40 of 100 metric calls\.$"):
        meter.check()


def test_charges_from_many_threads_are_all_counted() -> None:
    meter = Budget().start()

    def charge() -> None:
        for _ in range(2000):
            meter.charge(Ledger(lm_calls=1))

    threads = [threading.Thread(target=charge) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.used.lm_calls == 16_000
