"""More than one weight step in a strategy: the second collects fresh runs of the weights that the first tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import number_of, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.records import StepRecord, WeightDetails
from bettertogether.testing import FakeEngine, FakeRequest

TRAIN, VAL = numbers(48, start=40), numbers(24)
START_FROM = pytest.mark.parametrize("start_from", ["base", "current"])


def knows(request: FakeRequest, number: int) -> bool:
    """A quarter of the numbers; a quarter more with demos, and for every 12 rows that the model was trained on."""
    return (number // 2) % 4 < 1 + (request.demos > 0) + request.trained_on // 12


def compile_(engine: FakeEngine, strategy: str, w: Mapping[str, Any], **options: Any) -> dspy.Module:
    p = BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False)
    step = LoRAFinetune(parity_match, **{"num_samples": 0, "rescue": False, "validation_share": 0.0, **w})
    arguments: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "strategy": strategy, "progress": False}
    return BetterTogether(parity_match, p=p, w=step).compile(parity_program(engine), **arguments | options)


def by_name(compiled: dspy.Module) -> dict[str, StepRecord]:
    return {record.name: record for record in compiled.report.rounds}


def means(record: StepRecord) -> dict[str, float]:
    return {cell: sum(scores) / len(scores) for cell, scores in (record.two_by_two or {}).items()}


@pytest.fixture(scope="module", params=["base", "current"])
def twice(request: pytest.FixtureRequest) -> tuple[str, FakeEngine, dspy.Module]:
    """Where the second weight step starts from, the engine, and what was compiled."""
    engine = parity_engine(knows)
    return request.param, engine, compile_(engine, "w -> w", {"start_from": request.param})


def test_a_second_weight_step_learns_from_runs_of_the_first_ones_weights(
    twice: tuple[str, FakeEngine, dspy.Module],
) -> None:
    _, engine, compiled = twice
    assert [record.score for record in compiled.report.rounds] == [0.25, 0.5, 0.75]
    assert [len(rows) for rows in engine.trainings] == [12, 24]
    model = by_name(compiled)["w"].models["self"]
    fresh = {number_of(request) for request in engine.requests if request.model == model and number_of(request) >= 40}
    assert fresh == set(range(40, 88))


def test_start_from_says_whether_the_second_goes_on_with_the_adapter_of_the_first(
    twice: tuple[str, FakeEngine, dspy.Module],
) -> None:
    start_from, _, compiled = twice
    records = by_name(compiled)
    details = records["w -> w"].details
    assert isinstance(details, WeightDetails)
    ((name, adapter),) = details.adapters.items()
    assert name.startswith("local/fake@r1-" if start_from == "base" else "local/fake@r2-")
    assert adapter.trained_from == ("local/fake" if start_from == "base" else records["w"].models["self"])


@START_FROM
def test_the_programs_of_all_rounds_stay_callable(start_from: str) -> None:
    compiled = compile_(parity_engine(knows), "p -> w -> w -> p", {"start_from": start_from, "train_prompt": "vanilla"})
    programs = {each["strategy"]: each["program"] for each in compiled.candidate_programs}
    right = {
        name: sum(parity_match(each, program(number=each.number)) for each in VAL) / 24
        for name, program in programs.items()
    }
    assert right == {record.strategy: record.score for record in compiled.report.rounds}
    assert right == {"": 0.25, "p": 0.5, "p -> w": 0.75, "p -> w -> w": 1.0, "p -> w -> w -> p": 1.0}


@pytest.mark.parametrize(("start_from", "calls"), [("base", 400), ("current", 280)])
def test_a_run_that_was_stopped_goes_on_in_an_engine_without_its_adapters(
    start_from: str, calls: int, tmp_path: Path
) -> None:
    options = {"start_from": start_from}
    whole = compile_(parity_engine(knows), "p -> w -> w -> p", options)
    compile_(
        parity_engine(knows), "p -> w -> w -> p", options, run_dir=tmp_path / "run", budget=Budget(metric_calls=calls)
    )
    resumed = compile_(parity_engine(knows), "p -> w -> w -> p", options, run_dir=tmp_path / "run")
    assert [(r.strategy, r.status, r.scores, r.models, r.two_by_two) for r in resumed.report.rounds] == [
        (r.strategy, r.status, r.scores, r.models, r.two_by_two) for r in whole.report.rounds
    ]


def test_the_2x2_of_a_second_weight_step_compares_its_weights_with_the_students() -> None:
    compiled = compile_(parity_engine(knows), "p -> w -> w", {"train_prompt": "optimized"})
    records = by_name(compiled)
    assert means(records["p -> w"]) == {"base_old": 0.25, "base_new": 0.5, "tuned_old": 0.75, "tuned_new": 1.0}
    assert means(records["p -> w -> w"]) == {"base_old": 0.25, "base_new": 0.5, "tuned_old": 1.0, "tuned_new": 1.0}
    assert compiled.report.two_by_two == records["p -> w"].two_by_two


@pytest.mark.parametrize(("start_from", "gains"), [("base", [None, 1.0, None]), ("current", [None, 1.0, 1.0])])
def test_the_fall_of_the_loss_is_evidence_where_training_began_at_the_weights_before(
    start_from: str, gains: list[float | None]
) -> None:
    engine = parity_engine(lambda request, number: True)
    compiled = compile_(engine, "w -> w", {"start_from": start_from, "validation_share": 0.25})
    assert [record.step_gain for record in compiled.report.rounds] == gains


def test_a_second_weight_step_with_nothing_new_to_learn_trains_the_same_adapter_and_the_run_goes_on() -> None:
    compiled = compile_(
        parity_engine(lambda request, number: number % 3 == 0), "w -> w -> p", {"train_prompt": "vanilla"}
    )
    records = by_name(compiled)
    assert records["w"].models == records["w -> w"].models
    assert [record.status for record in compiled.report.rounds] == ["complete"] * 4
