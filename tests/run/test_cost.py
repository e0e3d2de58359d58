"""What paid LMs cost: counted answer by answer, bounded by a budget, shown where there is any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import PaidLM, Parity, numbers, parity_engine, parity_match, parity_program
from paid_runs import PRICE

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget
from bettertogether.callbacks import Callback
from bettertogether.errors import ConfigError
from bettertogether.records import StepRecord

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


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[dspy.BaseLM]:
    """The LM of each answer that was paid."""
    answered: list[dspy.BaseLM] = []
    forward = PaidLM.forward

    def noted(lm: PaidLM, *arguments: Any, **options: Any) -> Any:
        answered.append(lm)
        return forward(lm, *arguments, **options)

    monkeypatch.setattr(PaidLM, "forward", noted)
    return answered


def spent(run_dir: Path) -> float:
    cost: float = json.loads((run_dir / "run.json").read_text())["spent"]["cost"]
    return cost


def test_a_round_costs_its_calls_of_a_paid_lm() -> None:
    report = compile_(PRICE, "p").report
    assert [record.ledger.cost for record in report.rounds] == [PRICE * r.ledger.lm_calls for r in report.rounds]
    assert report.rounds[0].ledger.cost == PRICE * len(VAL)


def test_a_step_of_any_optimizer_costs_its_calls_too() -> None:
    ledger = compile_(PRICE, "theirs").report.rounds[1].ledger
    assert ledger.cost == PRICE * ledger.lm_calls
    assert (ledger.prompt_tokens, ledger.generated_tokens) == (10 * ledger.lm_calls, 2 * ledger.lm_calls)
    assert ledger.lm_calls > len(VAL)


def test_a_local_lm_costs_nothing() -> None:
    program = parity_program(parity_engine(lambda request, number: True))
    optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match))
    compiled = optimizer.compile(
        program, trainset=TRAIN, valset=VAL, strategy="p", progress=False, budget=Budget(cost=0.01)
    )
    assert compiled.report.ledger.cost == 0
    assert "cost" not in str(compiled.report)


def test_a_budget_of_dollars_stops_between_two_examples(answers: list[dspy.BaseLM]) -> None:
    report = compile_(PRICE, "p", budget=Budget(cost=PRICE * (len(VAL) + 3))).report
    assert [record.status for record in report.rounds] == ["complete", "skipped"]
    assert "5.7500 of 5.75 USD" in str(report.rounds[1].error)
    # What was under way when it ended is paid for, too.
    assert report.ledger.cost == PRICE * len(answers) >= 5.75


def test_a_step_of_any_optimizer_is_one_unit_of_a_budget() -> None:
    report = compile_(PRICE, "theirs", budget=Budget(cost=PRICE * (len(VAL) + 1))).report
    assert [record.status for record in report.rounds] == ["complete", "skipped"]


def test_a_step_of_any_optimizer_that_fails_has_cost_its_calls(
    tmp_path: Path, answers: list[dspy.BaseLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(dspy.BootstrapFewShot, "_train", fails)
    failed = compile_(PRICE, "theirs", run_dir=tmp_path).report.rounds[1]
    # For its two demos.
    assert (failed.status, failed.ledger.metric_calls, failed.ledger.cost) == ("failed", 2, PRICE * 2)
    assert spent(tmp_path) == PRICE * len(answers) == PRICE * (len(VAL) + 2)


def test_a_step_of_any_optimizer_that_was_not_scored_has_cost_its_calls(
    tmp_path: Path, answers: list[dspy.BaseLM]
) -> None:
    skipped = compile_(PRICE, "theirs", budget=Budget(cost=PRICE * (len(VAL) + 1)), run_dir=tmp_path).report.rounds[1]
    paid = len(answers) - len(VAL)
    assert (skipped.status, skipped.ledger.metric_calls, skipped.ledger.cost) == ("skipped", paid, PRICE * paid)
    # Its two demos, and the examples that were under way when the first was scored.
    assert paid >= 3
    assert spent(tmp_path) == PRICE * len(answers)


@pytest.mark.parametrize(("calls", "ended"), [(5, "student"), (25, "p")])
def test_a_call_whose_budget_an_earlier_one_used_up_pays_nothing(
    tmp_path: Path, answers: list[dspy.BaseLM], calls: int, ended: str
) -> None:
    paid = []
    for _ in range(2):
        report = compile_(PRICE, "p", budget=Budget(cost=PRICE * calls), run_dir=tmp_path).report
        paid.append(len(answers))
        assert report.rounds[-1].name == ended
        assert spent(tmp_path) == PRICE * len(answers) >= PRICE * calls
    assert paid[0] == paid[1]


def test_a_larger_budget_has_what_earlier_calls_left_of_it(tmp_path: Path, answers: list[dspy.BaseLM]) -> None:
    for calls in (5, 24, 500):
        before = len(answers)
        report = compile_(PRICE, "p", budget=Budget(cost=PRICE * calls), run_dir=tmp_path).report
        assert spent(tmp_path) == PRICE * len(answers)
        # With nothing left of it by the earlier ones, the second would pay 24 itself.
        assert calls == 500 or len(answers) - before < 24
    assert [record.status for record in report.rounds] == ["complete", "complete"]


def test_what_was_spent_is_on_disk_with_each_record(tmp_path: Path, answers: list[dspy.BaseLM]) -> None:
    noted = []

    class Reading(Callback):
        def on_step_end(self, event: Any) -> None:
            noted.append((spent(tmp_path), PRICE * len(answers)))

    compile_(PRICE, "p", callbacks=[Reading()], run_dir=tmp_path)
    assert noted == [(5.0, 5.0), (PRICE * len(answers), PRICE * len(answers))]


def test_a_cost_can_not_be_bounded_where_a_price_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"Budget\(cost=5\) is not allowed here: .* price DSPy does not know"):
        compile_(None, "p", budget=Budget(cost=5))


def test_where_a_price_is_not_known_within_a_step_the_same_run_goes_on_with_the_budget_that_is_advised(
    tmp_path: Path,
) -> None:
    def call(budget: Budget) -> Any:
        p = BootstrapFewShotRS(parity_match, num_candidates=1)
        student, teacher = parity_program(parity_engine(lambda request, number: number % 2 == 0)), dspy.Predict(Parity)
        teacher.set_lm(PaidLM(None))
        return BetterTogether(parity_match, p=p).compile(
            student,
            trainset=TRAIN,
            valset=VAL,
            teacher=teacher,
            strategy="p",
            progress=False,
            budget=budget,
            run_dir=tmp_path,
        )

    report = call(Budget(cost=5)).report
    assert [record.status for record in report.rounds] == ["complete", "failed"]
    assert report.warnings[-1].endswith(
        "Bound tokens, metric_calls or minutes instead. "
        f"The same call with run_dir={str(tmp_path)!r} and such a budget goes on after the last finished step."
    )
    assert [record.status for record in call(Budget(tokens=10**9)).report.rounds] == ["complete", "complete"]


def test_the_table_shows_costs_where_there_are_any() -> None:
    lines = str(compile_(PRICE, "p").report).splitlines()
    assert lines[2].split()[-3:] == ["cost", "seconds", "status"]
    assert "$5.00" in lines[3]
    assert "  ?  " in str(compile_(None, "p").report).splitlines()[3]


def test_a_record_of_before_costs_were_counted_is_read() -> None:
    data = StepRecord(0, "", "", "complete").to_dict()
    del data["ledger"]["cost"]
    assert StepRecord.from_dict(data).ledger.cost == 0
