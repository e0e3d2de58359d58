"""The view holds what table and page show of a report, computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import COST, TWO_BY_TWO, record, report

from bettertogether.records import Failure, HeldOutLoss, PolicyDetails, RewardLine, TrainedAdapter, score_text
from bettertogether.report.intervals import paired_interval
from bettertogether.report.view import cost_text, loss_text, rewards_text, view_of


def test_a_round_has_its_numbers_as_text() -> None:
    rounds = view_of(report()).rounds
    assert [each.name for each in rounds] == ["student", "p", "p -> w", "p -> w -> p"]
    assert [each.score for each in rounds] == ["0.250", "0.500", "0.750", "-"]
    assert [each.gain_text for each in rounds] == ["", "+0.250 [+0.000, +1.000]", "+0.500 [+0.000, +1.000]", "-"]
    assert [each.examples for each in rounds] == ["4", "4", "4", "-"]
    assert [each.seconds for each in rounds] == ["12.5", "12.5", "100", "0.0"]
    assert [each.selected for each in rounds] == [False, False, True, False]


def test_the_selected_round_and_the_totals_are_those_of_the_report() -> None:
    view = view_of(report())
    assert view.selected.name == "p -> w"
    assert (view.examples, view.seconds, view.two_by_two) == ("4 validation examples", "125", None)
    assert view_of(report(valset_size=0)).examples == "no validation examples"


def test_a_gain_is_there_as_number_and_as_text() -> None:
    gain = view_of(report()).selected.gain
    assert gain is not None
    assert (gain.effect.gain, gain.number, gain.interval) == (0.5, "+0.500", "[+0.000, +1.000]")


def test_a_gain_without_an_interval_is_a_number_alone() -> None:
    rounds = (record(0, "", (0.0,)), record(1, "p", (1.0,)))
    assert view_of(report(rounds=rounds, selected=1)).selected.gain_text == "+1.000"


def test_failed_examples_are_counted_by_kind() -> None:
    failures = (Failure("timeout", 2, "slow", "example 0"), Failure("metric error", 1, "KeyError", "example 2"))
    rounds = (record(0, "", (0.0, 0.0, 0.0, 1.0), failures=failures),)
    assert view_of(report(rounds=rounds, selected=0)).rounds[0].failures == "2 x timeout, 1 x metric error"


def test_the_reasons_of_auto_are_those_of_its_rounds_and_of_its_end() -> None:
    rounds = (record(0, "", (0.0, 0.0)), record(1, "p", (1.0, 1.0), why="few pass"))
    assert view_of(report(rounds=rounds, selected=1, stopped="no gain")).reasons == ("p: few pass.", "stop: no gain.")
    assert view_of(report()).reasons == ()


def test_the_2x2_has_means_and_gains() -> None:
    view = view_of(
        report(rounds=(record(0, "", (0.0,) * 4), record(1, "w", (1.0,) * 4, two_by_two=TWO_BY_TWO)), selected=1)
    )
    assert view.two_by_two is not None
    assert view.two_by_two.means == {
        "base_old": "0.000",
        "base_new": "0.250",
        "tuned_old": "0.500",
        "tuned_new": "1.000",
    }
    gains = view.two_by_two.weights, view.two_by_two.prompts, view.two_by_two.both, view.two_by_two.total
    assert [gain.number for gain in gains] == ["+0.500", "+0.250", "+0.250", "+1.000"]


@pytest.mark.parametrize(("selected", "shown"), [(0, 2), (1, 1), (2, 2), (3, 2)])
def test_the_2x2_is_that_of_the_selected_round_or_of_the_latest_that_has_one(selected: int, shown: int) -> None:
    cells = {1: TWO_BY_TWO, 2: {**TWO_BY_TWO, "base_new": (0.0,) * 4}}
    rounds = tuple(record(index, "w" * index, (0.0,) * 4, two_by_two=cells.get(index)) for index in range(4))
    found = report(rounds=rounds, selected=selected)
    view = view_of(found).two_by_two
    assert view is not None
    assert (found.two_by_two, found.two_by_two_round) == (cells[shown], rounds[shown])
    assert view.other_round == ("" if shown == selected else "w" * shown)


def test_what_became_of_rewards_is_told_of_the_first_and_last_step_and_of_the_one_that_was_kept() -> None:
    history = RewardLine(0, held_out_score=0.1), RewardLine(1, 0.25), RewardLine(2, 0.5, held_out_score=0.75)
    details = PolicyDetails({}, (*history, RewardLine(3, 0.4, held_out_score=0.3)), 2, 8)
    assert rewards_text(details, score_text) == (
        "reward 0.250 -> 0.400 in 3 steps; score on 8 examples held out 0.100 -> 0.750 (step 2)"
    )
    one = PolicyDetails({}, (RewardLine(0), RewardLine(1, 0.25)), 1, 0)
    assert rewards_text(one, score_text) == "reward 0.250 in 1 step"
    small = report(rounds=(record(0, "", (0.05,)), record(1, "r", (0.05,), details=one)), selected=1)
    assert view_of(small).rounds[1].losses == ("reward 0.2500 in 1 step",)


def test_the_gain_of_a_round_is_computed_once_for_table_page_and_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def counted(*scores: Any, **options: Any) -> Any:
        calls.append(scores)
        return paired_interval(*scores, **options)

    monkeypatch.setattr("bettertogether.report.data.paired_interval", counted)
    rounds = tuple(record(index, "p" * index, (0.0, 1.0), ledger=COST) for index in range(3))
    result = report(rounds=rounds, selected=1)
    assert str(result)
    assert repr(result)
    assert result._repr_html_()
    result.to_html(tmp_path / "report.html")
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("everything", "fields", "text"),
    [
        (HeldOutLoss(None, None), {}, "held-out loss of all tokens 0.70 -> 0.12"),
        (HeldOutLoss(0.7, 0.12), {}, "held-out loss of all tokens 0.70 -> 0.12"),
        (HeldOutLoss(1.15, 0.11), {}, "held-out loss of the free tokens 0.70 -> 0.12; all tokens 1.15 -> 0.11"),
        (
            HeldOutLoss(1.15, 0.11),
            {"sentiment": HeldOutLoss(0.69, 0.1), "why": HeldOutLoss(2, 1.5)},
            "held-out loss of the free tokens 0.70 -> 0.12; by field: sentiment 0.69 -> 0.10, why 2.00 -> 1.50; "
            "all tokens 1.15 -> 0.11",
        ),
    ],
)
def test_the_held_out_loss_says_of_which_tokens_it_is(
    everything: HeldOutLoss, fields: dict[str, HeldOutLoss], text: str
) -> None:
    assert loss_text(TrainedAdapter("m", "f", "r", 1, HeldOutLoss(0.7, 0.12), (), everything, fields)) == text


def test_rows_and_losses_are_shown_as_far_as_they_are_known() -> None:
    adapter = TrainedAdapter("m", "f", "r", 1, HeldOutLoss(None, None), ())
    assert loss_text(adapter) == ""
    assert loss_text(replace(adapter, row_count=1)) == "1 row"
    assert loss_text(replace(adapter, row_count=2), pairs=True) == "2 pairs"


def test_a_cost_has_four_decimals_below_a_dollar() -> None:
    assert [cost_text(cost) for cost in (None, 0.01234, 1234.5)] == ["?", "$0.0123", "$1,234.50"]
