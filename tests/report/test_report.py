"""The report as text, HTML and JSON: each round with score, gain, cost and status."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from reports import EVIL, TWO_BY_TWO, Page, full_report, loss_line, page_of, record, report

from bettertogether.errors import DataError
from bettertogether.records import (
    Blame,
    CandidateScore,
    DataCard,
    HeldOutLoss,
    PromptDetails,
    RaceResult,
    TraceCounts,
    TrainedAdapter,
    WeightDetails,
)
from bettertogether.report import CompileReport
from bettertogether.report.charts import bars, ticks
from bettertogether.report.text import compact


def test_the_table_has_every_round_with_score_gain_cost_and_status() -> None:
    assert str(report()).splitlines() == [
        "p -> w -> p, seed 0, 4 validation examples",
        "",
        "   strategy     score  gain [95% interval]      n  LM calls  tokens  seconds  status",
        "   student      0.250                           4        16    1200     12.5  complete",
        "   p            0.500  +0.250 [+0.000, +1.000]  4        16    1200     12.5  complete",
        "*  p -> w       0.750  +0.500 [+0.000, +1.000]  4        16   10.2k      100  complete",
        "   p -> w -> p      -  -                        -         0       0      0.0  failed",
        "-" * 86,
        "   total                                                 48   12.6k      125",
    ]


def test_the_table_fits_100_columns_and_keeps_the_end_of_a_long_strategy() -> None:
    long = " -> ".join(["prompt", "weights"] * 12)
    rounds = (record(0, "", (0.0, 1.0)), record(1, long, (1.0, 1.0)))
    text = str(report(rounds=rounds, selected=1, strategy=long, warnings=("word " * 60,)))
    assert max(map(len, text.splitlines())) <= 100
    assert "...s -> prompt -> weights  1.000" in text


@pytest.mark.parametrize(
    ("student", "best", "shown"),
    [
        (50.0, 85.0, "85.00  +35.00 [+35.00, +35.00]"),
        (12.0, 12.04, "12.04  +0.04 [+0.04, +0.04]"),
        (0.0002, 0.000375, "0.000375  +0.000175 [+0.000175, +0.000175]"),
    ],
)
def test_scores_have_decimals_that_fit_the_largest(student: float, best: float, shown: str) -> None:
    details = PromptDetails(
        (CandidateScore("x", best, 2, stopped=False, demos=0),), "x", 2, RaceResult(2, 0, 0.95), TraceCounts(0, 0, {})
    )
    rounds = (record(0, "", (student,) * 2), record(1, "p", (best,) * 2, details=details))
    found = report(rounds=rounds, selected=1)
    assert shown in str(found)
    assert f"x chosen{shown.split()[0]}2" in Page(page_of(found)).text


def test_without_scores_of_rounds_decimals_fit_the_largest_of_a_candidate() -> None:
    tried = tuple(CandidateScore(str(score), score, 2, stopped=False, demos=0) for score in (0.0, 0.000375))
    details = PromptDetails(tried, "0.000375", 2, RaceResult(2, 0, 0.95), TraceCounts(0, 0, {}))
    found = report(rounds=(record(0, "", None), record(1, "p", None, details=details)), selected=1)
    assert [found.number(each.score) for each in tried] == ["0.000000", "0.000375"]


def test_without_a_valset_the_table_shows_no_scores() -> None:
    rounds = (record(0, "", None), record(1, "p", None))
    lines = str(report(rounds=rounds, selected=1, valset_size=0)).splitlines()
    assert lines[0] == "p -> w -> p, seed 0, no validation examples"
    assert lines[4].split()[:5] == ["*", "p", "-", "-", "-"]


def test_the_total_is_the_work_of_all_rounds() -> None:
    assert report().metric_calls == 8 + 8 + 8
    assert report().lm_calls == 16 * 3


def test_a_gain_is_paired_with_the_student_and_unknown_without_scores() -> None:
    gain = report().gain(2)
    assert gain is not None
    assert gain.gain == 0.5
    assert gain.low <= 0.5 <= gain.high
    assert report().gain(3) is None


def test_the_ends_of_the_metric_are_told_by_all_scores_of_the_run() -> None:
    ends = record(0, "", (0.0,) * 12), record(1, "p", (1.0,) * 12)
    assert report(rounds=ends, selected=1).score_interval(0) == pytest.approx((0.0, 0.2646), abs=1e-4)
    found = report(rounds=(*ends, record(2, "w", (5.0,) * 12)), selected=1)
    assert (found.score_interval(0), found.score_interval(1)) == ((0.0, 0.0), (1.0, 1.0))
    gain = found.gain(1)
    assert gain is not None
    assert (gain.low, gain.high) == (1.0, 1.0)


def test_one_validation_example_gives_a_gain_without_an_interval() -> None:
    result = report(rounds=(record(0, "", (0.0,)), record(1, "p", (1.0,))), selected=1)
    assert "1.000  +1.000  " in str(result)
    gain = result.gain(1)
    assert gain is not None
    assert math.isnan(gain.low)


def test_the_2x2_is_shown_with_what_weights_and_prompts_gave() -> None:
    rounds = (record(0, "", (0.0,) * 4), record(1, "w", (1.0,) * 4, two_by_two=TWO_BY_TWO))
    found = report(rounds=rounds, selected=1)
    lines = str(found).splitlines()
    assert "base weights            0.000        0.250" in lines
    assert "tuned weights           0.500        1.000" in lines
    for start in ("gain from weights   +0.500 [", "gain from prompts   +0.250 [", "from both together  +0.250 ["):
        assert any(line.startswith(start) for line in lines)
    text = Page(page_of(found)).text
    assert "old promptsnew promptsbase weights0.0000.250tuned weights0.5001.000" in text


def test_a_2x2_of_another_round_than_the_selected_one_says_whose_it_is() -> None:
    rounds = (record(0, "", (0.0,) * 4), record(1, "w", (0.5,) * 4, two_by_two=TWO_BY_TWO), record(2, "p", (1.0,) * 4))
    found = report(rounds=rounds, selected=2)
    lines = str(found).splitlines()
    assert lines[lines.index(" " * 18 + "old prompts  new prompts") - 1] == "2x2 of w, which is not the selected round:"
    assert "Weights or prompts?Of w, which is not the selected round.old prompts" in Page(page_of(found)).text
    own = report(rounds=rounds, selected=1)
    assert "not the selected round" not in f"{own}{page_of(own)}"


def test_the_race_of_a_prompt_step_is_a_table_of_its_candidates() -> None:
    candidates = (
        CandidateScore("current", 0.5, scored_on=40, stopped=False, demos=0),
        CandidateScore("earlier 1", 0.75, scored_on=40, stopped=False, demos=3),
        CandidateScore("x" * 60 + " demos 2, strength 0.5", 0.25, scored_on=8, stopped=True, demos=2),
    )
    details = PromptDetails(candidates, "earlier 1", 40, RaceResult(88, 32, 0.95), TraceCounts(9, 3, {}))
    rounds = (record(0, "", (0.0, 0.0)), record(1, "p", (1.0, 1.0), details=details))
    result = report(rounds=rounds, selected=1)
    assert str(result).splitlines()[7:] == [
        "",
        "   candidates of p" + " " * 37 + "score   n  demos",
        "   current" + " " * 45 + "0.500  40      0",
        "*  earlier 1" + " " * 43 + "0.750  40      3",
        "   ..." + "x" * 25 + " demos 2, strength 0.5  0.250   8      2  stopped early",
    ]
    text = Page(page_of(result)).text
    assert "earlier 1 chosen0.750403" in text
    assert "strength 0.50.25082stopped early" in text


def test_the_reasons_of_auto_are_under_the_table_and_on_the_page() -> None:
    rounds = (record(0, "", (0.0, 0.0)), record(1, "p", (1.0, 1.0), why="few <pass>"))
    found = report(rounds=rounds, selected=1, stopped="no gain")
    assert str(found).splitlines()[-3:] == ["", "p: few <pass>.", "stop: no gain."]
    assert "<ul><li>p: few &lt;pass&gt;.</li><li>stop: no gain.</li></ul>" in page_of(found)
    assert "<ul><li>" not in page_of(report())


def test_a_2x2_that_was_not_measured_is_not_shown() -> None:
    rounds = (record(0, "", (0.0, 0.0)), record(1, "w", (1.0, 1.0), two_by_two={}))
    assert report(rounds=rounds, selected=1).attribution is None


def test_a_report_comes_back_from_json_as_it_was() -> None:
    result = report(warnings=("few examples",), versions={"dspy": "3.4.1"}, machine={"cpus": "2"})
    assert CompileReport.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_report_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 7"):
        CompileReport.from_dict({**report().to_dict(), "schema": 7})


def test_a_selected_round_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="selected=4"):
        report(selected=4)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (10_000, "10.0k"),
        (99_949, "99.9k"),
        (99_950, "100k"),
        (1_234_567, "1.2M"),
        (3e9, "3.0G"),
    ],
)
def test_counts_are_shortened(count: float, text: str) -> None:
    assert compact(count) == text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.46, 0.83], [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ([0.0], [-0.06, -0.04, -0.02, 0.0, 0.02, 0.04, 0.06]),
        ([], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([math.nan, 10.0, 90.0], [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values: list[float], expected: list[float]) -> None:
    assert ticks(values) == expected


def test_bars_are_shares_of_the_largest_count() -> None:
    assert 'style="width:100.0%"' in bars({"a": 4, "b": 1})
    assert 'style="width:25.0%"' in bars({"a": 4, "b": 1})


def test_the_page_is_well_formed_and_escapes_everything() -> None:
    html = page_of(full_report(EVIL))
    page = Page(html)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "object"})
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.text.count("alert('x')") > 15
    assert "<script" not in html


def test_the_page_needs_no_network() -> None:
    page = page_of(full_report("plain"))
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_the_page_has_a_section_for_each_thing_there_is() -> None:
    text = Page(page_of(full_report("T"))).text
    for title in (
        "Score of each round",
        "Weights or prompts?",
        "Prompt candidates (1)",
        "Loss per token, T",
        "Loss per token of rows held out",
        "Training rows",
        "3 rows are shown with demos too",
        "sets of demos shown, by origin",
        "prompts with demos left out, by reason",
        "Sample row 1: T, T",
        "Prompts of the selected program",
        "demo 1",
        "Cost",
    ):
        assert title in text


def test_the_page_has_the_loss_of_free_tokens_and_of_each_field_where_both_were_measured() -> None:
    text = Page(page_of(full_report("T"))).text
    after = text.partition("Loss per token of rows held out")[2]
    assert after.startswith("trained fromofbeforeafterTfree tokens2.0001.000TT2.0001.000Training rows")


def test_the_page_of_a_run_without_scores_or_details_has_rounds_and_cost_only() -> None:
    rounds = (record(0, "", None), record(1, "p", None))
    page = Page(page_of(report(rounds=rounds, selected=1, valset_size=0)))
    assert page.open == []
    assert "Score of each round" in page.text
    assert "Weights or prompts?" not in page.text
    assert "svg" not in page.tags


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_page(tmp_path: Path) -> None:
    history = tuple(loss_line("a", step, loss) for step, loss in enumerate([1.0, math.nan, 0.5]))
    details = WeightDetails(DataCard({}, {}, {}, {}, {}, 0, 0, {}, {}, ()), {}, history)
    rounds = (record(0, "", (0.0, 1.0)), record(1, "w", (1.0, 1.0), details=details))
    report(rounds=rounds, selected=1).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<polyline points="0.00,0.00 100.00,83.33"' in page
    assert "nan" not in page


def test_the_error_that_chose_the_epoch_is_drawn_beside_the_losses() -> None:
    history = tuple(replace(loss_line("a", step, None, 0.5), validation_error=0.5 - step / 4) for step in range(3))
    details = WeightDetails(DataCard({}, {}, {}, {}, {}, 0, 0, {}, {}, ()), {}, history)
    rounds = (record(0, "", (0.0, 1.0)), record(1, "w", (1.0, 1.0), details=details))
    assert "error held out" in page_of(report(rounds=rounds, selected=1))
    plain = replace(details, history=tuple(replace(line, validation_error=None) for line in history))
    assert "error held out" not in page_of(report(rounds=(rounds[0], replace(rounds[1], details=plain)), selected=1))


def test_the_held_out_losses_of_a_weight_step_are_under_the_table() -> None:
    details = full_report("t").rounds[2].details
    assert isinstance(details, WeightDetails)
    adapter = TrainedAdapter("m", "f", "r", 1, HeldOutLoss(0.7, 0.12), (), HeldOutLoss(1.15, 0.11), row_count=24)
    rounds = (record(0, "", (0.0,)), record(1, "w", (1.0,), details=replace(details, adapters={"a": adapter})))
    found = report(rounds=rounds, selected=1)
    text = "24 rows; held-out loss of the free tokens 0.70 -> 0.12; all tokens 1.15 -> 0.11"
    assert f"w: {text}" in str(found).splitlines()


def test_which_predictors_failures_came_from_is_in_the_table_and_on_the_page_the_guilty_first() -> None:
    details = full_report("t").rounds[2].details
    assert isinstance(details, WeightDetails)
    guilt = {"innocent": Blame(12, 8, 0), "guilty": Blame(8, 8, 6), "not asked": Blame(0, 0, 0)}
    rounds = (record(0, "", (0.0,)), record(1, "w", (1.0,), details=replace(details, blame=guilt)))
    found = report(rounds=rounds, selected=1)
    lines = [line.split() for line in str(found).splitlines()]
    start = lines.index(
        ["failures", "before", "w", "repaired", "by", "it", "alone", "[95%", "interval]", "runs", "calls"]
    )
    assert lines[start + 1 : start + 4] == [
        ["guilty", "0.75", "[0.41,", "0.93]", "6", "of", "8", "8"],
        ["innocent", "0.00", "[0.00,", "0.32]", "0", "of", "8", "12"],
        ["not", "asked", "-", "0", "of", "0", "0"],
    ]
    assert "guilty0.75 [0.41, 0.93]6 of 88" in Page(page_of(found)).text
