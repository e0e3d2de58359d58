"""Records say what they hold, and come back from JSON as they were; so do those of schema 1."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.errors import DataError
from bettertogether.records import (
    CandidateScore,
    DataCard,
    HeldOutLoss,
    Ledger,
    LossLine,
    OtherDetails,
    PolicyDetails,
    PromptDetails,
    RaceResult,
    RewardedAdapter,
    RewardLine,
    SampleRow,
    StepRecord,
    TraceCounts,
    TrainedAdapter,
    WeightDetails,
    score_text,
)
from bettertogether.report import CompileReport

ROW: SampleRow = {
    "prompt": [{"role": "user", "content": "number: 3"}],
    "completion": [{"role": "assistant", "content": "odd"}],
    "predictor": "self",
    "example": 3,
    "label": "odd",
    "source": "student",
}
CARD = DataCard(
    kept_by_predictor={"self": 3},
    kept_by_label={"odd": 2, "even": 1},
    kept_by_source={"student": 3},
    dropped_by_reason={"score 0": 1},
    dropped_by_predictor={"": 1},
    examples=4,
    examples_covered=3,
    prompt_tokens={"min": 7, "median": 8, "max": 9},
    completion_tokens={"min": 1, "median": 1, "max": 2},
    samples=(ROW,),
    warnings=("few rows",),
)
PROMPTS = PromptDetails(
    candidates=(CandidateScore("current", 0.5, 8, False, 0), CandidateScore("demos 1", 0.75, 8, True, 3)),
    chosen="demos 1",
    validation_examples=8,
    race=RaceResult(16, 0, 0.95),
    traces=TraceCounts(4, 3, {"score 0": 1}),
    dropped_demos={"self": 2},
    left_out={"self": {"too long for the model's context": 1}},
)
WEIGHTS = WeightDetails(
    data_card=CARD,
    adapters={
        "local/m@r1-1f": TrainedAdapter(
            "local/m",
            "/runs/r1-1f",
            "/runs/r1-1f.rows.jsonl",
            2,
            HeldOutLoss(2.0, 1.0),
            ((1, "too long"),),
            HeldOutLoss(1.5, 0.5),
            {"answer": HeldOutLoss(3.0, 1.0)},
        )
    },
    history=(LossLine("local/m@r1-1f", 1, 2, 0.5, 2.0, None, 100, 1e-4),),
)
CELLS = {"base_old": (0.0, 1.0), "base_new": (1.0, 1.0), "tuned_old": (0.0, 0.0), "tuned_new": (1.0, 0.5)}
FOLDERS = {"local/m@r1-1f": "/runs/r1-1f"}
DEMOS = {"self": {"signature": {"instructions": "Say.", "fields": []}, "demos": [{"number": 3}], "lm": None}}


def record(**fields: Any) -> StepRecord:
    values = {"index": 1, "step": "p", "strategy": "p", "status": "complete", "score": 0.5, "scores": (0.0, 1.0)}
    return StepRecord(**{**values, **fields})


def as_json(value: StepRecord | CompileReport) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(value.to_dict()))
    return data


def in_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """A record as schema 1 wrote it: all that a step reported in one dict, and no kind."""
    old = copy.deepcopy(data)
    details = old["details"] or {}
    details.pop("kind", None)
    details["warnings"] = [warning for warning in old.pop("warnings") if warning != "few rows"]
    details["adapter_folders"] = old.pop("adapter_folders")
    if cells := old.pop("two_by_two"):
        details["two_by_two"] = cells
    return {**old, "schema": 1, "details": details}


REWARDS = PolicyDetails(
    adapters={"local/tiny@r1-ab": RewardedAdapter("local/tiny decide", "adapters/r1")},
    history=(RewardLine(0, held_out_score=0.25), RewardLine(1, 0.5, 0.25, 8, 3, 4, 0.01, 120.5, 0.5)),
    best_step=1,
    held_out_examples=4,
)
RECORDS = {
    "student": record(index=0, step="", strategy=""),
    "prompt": record(details=PROMPTS, warnings=("all scores are equal",), program=DEMOS),
    "weight": record(details=WEIGHTS, warnings=("few rows",), two_by_two=CELLS, adapter_folders=FOLDERS),
    "other": record(details=OtherDetails("COPRO"), adapter_folders=FOLDERS),
    "failed": record(status="failed", score=None, scores=None, error="Traceback: boom"),
}


@pytest.mark.parametrize("kept", [*RECORDS.values(), record(details=REWARDS)], ids=[*RECORDS, "policy"])
def test_a_record_comes_back_from_json_as_it_was(kept: StepRecord) -> None:
    assert StepRecord.from_dict(as_json(kept)) == kept


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_schema_1_is_read_as_one_of_today(name: str) -> None:
    assert StepRecord.from_dict(in_schema_1(as_json(RECORDS[name]))) == RECORDS[name]


def test_a_report_of_schema_1_is_read_as_one_of_today() -> None:
    report = CompileReport(tuple(RECORDS.values()), 2, 2, "p -> w")
    data = as_json(report)
    old = {**data, "schema": 1, "rounds": [in_schema_1(each) for each in data["rounds"]], "extra": {"lm_calls": 0}}
    assert CompileReport.from_dict(old) == report


def test_what_a_step_of_an_unknown_kind_reported_under_schema_1_is_left_out() -> None:
    old = in_schema_1(as_json(RECORDS["student"]))
    old["details"]["own"] = [1, 2]
    assert StepRecord.from_dict(old).details is None


def test_the_warnings_of_a_data_card_of_schema_1_are_those_of_its_step() -> None:
    old = in_schema_1(as_json(RECORDS["weight"]))
    old["details"]["warnings"] = ["many runs failed"]
    assert StepRecord.from_dict(old).warnings == ("many runs failed", "few rows")


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"kind": "soup"}, "details: Input tag 'soup' found using 'kind' does not match"),
        ({"kind": "other"}, "details.other.optimizer: Field required"),
        ({"kind": "other", "optimizer": "X", "more": 1}, "details.other.more: Unexpected keyword argument, got 1"),
        ({"kind": "other", "optimizer": 5}, "details.other.optimizer: Input should be a valid string, got 5"),
        ([], "details: "),
    ],
)
def test_details_that_are_none_of_the_known_are_our_error(details: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        StepRecord.from_dict({**as_json(RECORDS["other"]), "details": details})
    assert str(caught.value).startswith(f"The record is damaged at {message}")


@pytest.mark.parametrize("details", [[], "x", {"warnings": 5}, {"data_card": 5}, {"two_by_two": [1]}], ids=str)
def test_wrong_details_of_schema_1_are_our_error(details: Any) -> None:
    old = {**in_schema_1(as_json(RECORDS["student"])), "details": details}
    with pytest.raises(DataError, match="The record is damaged at"):
        StepRecord.from_dict(old)


@pytest.mark.parametrize("schema", [None, 0, 3, "2", [1]], ids=str)
def test_a_record_of_another_schema_is_refused_inside_a_report_too(schema: Any) -> None:
    data = as_json(CompileReport((RECORDS["student"],), 0, 2, "p"))
    data["rounds"][0]["schema"] = schema
    with pytest.raises(DataError, match=r"record with schema .*this version reads schemas 1 and 2"):
        CompileReport.from_dict(data)


def test_text_with_half_a_character_comes_back() -> None:
    given = record(program={"self": {"demos": [{"text": "half \ud83d"}]}}, error="\ud83d")
    assert StepRecord.from_dict(as_json(given)) == given


def test_a_run_directory_of_schema_1_goes_on_after_its_last_round(tmp_path: Path) -> None:
    def compile_() -> tuple[CompileReport, int]:
        engine = parity_engine(learner)
        p = BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False)
        w = LoRAFinetune(parity_match, num_samples=0, rescue=False)
        compiled = BetterTogether(parity_match, p=p, w=w).compile(
            parity_program(engine),
            trainset=numbers(40, start=40),
            valset=numbers(20),
            strategy="w -> p",
            run_dir=tmp_path,
            progress=False,
        )
        return compiled.report, len(engine.requests)

    report, requests = compile_()
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(in_schema_1(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for line in lines[:2]))
    resumed, requests_of_the_rest = compile_()
    assert resumed.rounds[:2] == report.rounds[:2]
    assert [(each.name, each.status, each.score) for each in resumed.rounds] == [
        (each.name, each.status, each.score) for each in report.rounds
    ]
    assert 0 < requests_of_the_rest < requests


def test_an_adapter_of_a_record_without_the_losses_of_all_tokens_and_fields_is_read() -> None:
    data = as_json(RECORDS["weight"])
    for adapter in data["details"]["adapters"].values():
        del adapter["all_tokens_loss"], adapter["field_losses"]
    details = StepRecord.from_dict(data).details
    assert isinstance(details, WeightDetails)
    (adapter,) = details.adapters.values()
    assert (adapter.all_tokens_loss, adapter.field_losses) == (HeldOutLoss(None, None), {})


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0.5, 1.0, "0.500"),
        (-0.04, 0.142, "-0.040"),
        (4.25, 9.99, "4.250"),
        (0.0, 0.0, "0.000"),
        (0.04, 20.0, "0.04"),
        (12.5, 1234.5, "12.5"),
        (0.0001, 0.02, "0.0001"),
        (0.00012, None, "0.000120"),
        (0.000012, None, "1.20e-05"),
        (None, 1.0, "-"),
        (math.nan, None, "-"),
    ],
)
def test_a_score_has_decimals_that_fit_the_largest(value: float | None, largest: float | None, text: str) -> None:
    assert score_text(value, largest) == text


def test_ledgers_add_up_and_their_cost_is_not_known_where_one_of_them_is_not() -> None:
    one, other = Ledger(1, 2, 3, seconds=0.5, cost=0.25), Ledger(10, lm_calls=30, cost=0.5)

    assert one + other == Ledger.total([one, other]) == Ledger(11, 2, 33, seconds=0.5, cost=0.75)
    assert Ledger.total([one, Ledger(cost=None), other]) == Ledger(11, 2, 33, seconds=0.5, cost=None)
    assert Ledger.total([]) == Ledger()
