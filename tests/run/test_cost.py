"""What paid LMs cost: counted answer by answer, bounded by a budget, shown where there is any."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import PaidLM, Parity, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget
from bettertogether.errors import ConfigError
from bettertogether.records import StepRecord

PRICE = 0.25
"""US dollars an answer: sums of it are exact."""

TRAIN, VAL = numbers(10), numbers(20, start=100)


def compile_(price: float | None, strategy: str, **options: Any) -> Any:
    program = dspy.Predict(Parity)
    program.set_lm(PaidLM(price))
    steps = {
        "p": BootstrapFewShotRS(parity_match, num_candidates=1),
        "theirs": dspy.BootstrapFewShot(metric=parity_match, max_bootstrapped_demos=2, max_labeled_demos=0),
    }
    optimizer = BetterTogether(parity_match, **steps)
    return optimizer.compile(program, trainset=TRAIN, valset=VAL, strategy=strategy, progress=False, **options)


def test_a_round_costs_its_calls_of_a_paid_lm() -> None:
    report = compile_(PRICE, "p").report
    assert [record.ledger.cost for record in report.rounds] == [PRICE * r.ledger.lm_calls for r in report.rounds]
    assert report.rounds[0].ledger.cost == PRICE * len(VAL)


def test_a_step_of_any_optimizer_costs_its_calls_too() -> None:
    ledger = compile_(PRICE, "theirs").report.rounds[1].ledger
    assert ledger.cost == PRICE * ledger.lm_calls
    assert ledger.lm_calls > len(VAL)


def test_a_local_lm_costs_nothing() -> None:
    program = parity_program(parity_engine(lambda request, number: True))
    optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match))
    compiled = optimizer.compile(
        program, trainset=TRAIN, valset=VAL, strategy="p", progress=False, budget=Budget(cost=0.01)
    )
    assert compiled.report.ledger.cost == 0
    assert "cost" not in str(compiled.report)


def test_a_budget_of_dollars_stops_between_two_examples() -> None:
    report = compile_(PRICE, "p", budget=Budget(cost=PRICE * (len(VAL) + 3))).report
    assert [record.status for record in report.rounds] == ["complete", "skipped"]
    assert "5.7500 of 5.75 USD" in str(report.rounds[1].error)
    assert report.ledger.cost == 5.75


def test_a_step_of_any_optimizer_is_one_unit_of_a_budget() -> None:
    report = compile_(PRICE, "theirs", budget=Budget(cost=PRICE * (len(VAL) + 1))).report
    assert [record.status for record in report.rounds] == ["complete", "skipped"]


def test_a_cost_can_not_be_bounded_where_a_price_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"Budget\(cost=5\) is not allowed here: .* price DSPy does not know"):
        compile_(None, "p", budget=Budget(cost=5))


def test_the_table_shows_costs_where_there_are_any() -> None:
    lines = str(compile_(PRICE, "p").report).splitlines()
    assert lines[2].split()[-3:] == ["cost", "seconds", "status"]
    assert "$5.00" in lines[3]
    assert "  ?  " in str(compile_(None, "p").report).splitlines()[3]


def test_a_record_of_before_costs_were_counted_is_read() -> None:
    data = StepRecord(0, "", "", "complete").to_dict()
    del data["ledger"]["cost"]
    assert StepRecord.from_dict(data).ledger.cost == 0
