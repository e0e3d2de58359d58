"""A race scores candidates slice by slice and stops those that can't win."""

from __future__ import annotations

import random
from collections.abc import Sequence

import dspy
import pytest

from bettertogether.steps.demo_sets import Candidate
from bettertogether.steps.race import ScoreFunction, choose, run_race, slices, upper_bound

Table = dict[str, list[float]]


def candidates(table: Table) -> list[Candidate]:
    return [Candidate(name, dspy.Module()) for name in table]


def scorer(table: Table, calls: list[tuple[str, int]] | None = None) -> ScoreFunction:
    def score(running: Sequence[Candidate], positions: Sequence[int]) -> list[list[float]]:
        if calls is not None:
            calls.extend((candidate.name, position) for candidate in running for position in positions)
        return [[table[candidate.name][position] for position in positions] for candidate in running]

    return score


def separable(size: int, best: int, others: int, seed: int = 0) -> Table:
    """One candidate that is right nine times in ten, others twice in ten."""
    rng = random.Random(seed)
    rates = {f"c{i}": 0.9 if i == best else 0.2 for i in range(others)}
    return {name: [float(rng.random() < rate) for _ in range(size)] for name, rate in rates.items()}


@pytest.mark.parametrize(
    ("size", "ends"),
    [(250, [32, 64, 96, 128, 160, 192, 224, 250]), (40, [8, 16, 24, 32, 40]), (12, [8, 12]), (5, [5]), (1, [1])],
)
def test_a_slice_is_an_eighth_and_at_least_eight(size: int, ends: list[int]) -> None:
    parts = slices(size, race=True)
    assert [part.stop for part in parts] == ends
    assert [position for part in parts for position in part] == list(range(size))


def test_without_a_race_there_is_one_slice() -> None:
    assert slices(250, race=False) == [range(250)]


def test_without_a_race_every_candidate_is_scored_on_everything() -> None:
    table = separable(100, 1, 3)
    racers = candidates(table)
    result = run_race(racers, 100, scorer(table), race=False)
    assert (result.calls_made, result.calls_saved) == (300, 0)
    assert {racer.name: list(racer.scores.values()) for racer in racers} == table


def test_losers_stop_after_the_first_slice_and_the_calls_saved_are_counted() -> None:
    table = separable(100, 1, 4)
    racers = candidates(table)
    result = run_race(racers, 100, scorer(table))
    assert [racer.stopped for racer in racers] == [True, False, True, True]
    assert [len(racer.scores) for racer in racers] == [13, 100, 13, 13]
    assert (result.calls_made, result.calls_saved) == (139, 261)
    assert result.confidence == 0.95


def test_small_losses_add_up_over_the_slices() -> None:
    table = {"a": [1.0] * 40, "b": ([1.0] * 6 + [0.0] * 2) * 5}
    racers = candidates(table)
    run_race(racers, 40, scorer(table))
    assert [len(racer.scores) for racer in racers] == [40, 16]


def test_no_position_is_scored_twice() -> None:
    table = separable(100, 2, 4)
    calls: list[tuple[str, int]] = []
    run_race(candidates(table), 100, scorer(table, calls))
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("seed", range(20))
def test_the_winner_is_that_of_the_full_scoring_on_separable_data(seed: int) -> None:
    table = separable(60, seed % 5, 5, seed)
    winners = []
    for race in (True, False):
        racers = candidates(table)
        run_race(racers, 60, scorer(table), race=race)
        winners.append(choose(racers, 60).name)
    assert winners[0] == winners[1] == f"c{seed % 5}"


def test_little_is_lost_where_all_candidates_are_equally_good() -> None:
    """The hardest case: only chance makes a best one. Its lead over what is kept instead is small."""
    losses = []
    for seed in range(200):
        rng = random.Random(seed)
        table = {f"c{i}": [float(rng.random() < 0.5) for _ in range(100)] for i in range(5)}
        racers = candidates(table)
        run_race(racers, 100, scorer(table))
        best = max(sum(scores) for scores in table.values())
        losses.append((best - sum(table[choose(racers, 100).name])) / 100)
    assert sum(loss > 0 for loss in losses) <= 0.2 * len(losses)
    assert sum(losses) / len(losses) <= 0.005


def with_demos(table: Table, demos: dict[str, int]) -> list[Candidate]:
    found = []
    for name in table:
        program = dspy.Predict("a -> b")
        program.demos = [dspy.Example(a=i, b=i) for i in range(demos[name])]
        found.append(Candidate(name, program))
    return found


def test_of_candidates_that_answer_alike_the_simplest_goes_on() -> None:
    same = [1.0, 0.0, 1.0, 1.0] * 25
    table = {"long": same, "short": same, "later": same, "other": [0.0, 1.0, 1.0, 1.0] * 25}
    racers = with_demos(table, {"long": 3, "short": 1, "later": 1, "other": 0})
    result = run_race(racers, 100, scorer(table))
    assert [racer.stopped for racer in racers] == [True, False, True, False]
    assert [len(racer.scores) for racer in racers] == [26, 100, 26, 100]
    assert (result.calls_made, result.calls_saved) == (252, 148)
    assert choose(racers, 100).name == "other"


def test_answers_are_not_alike_before_sixteen_examples() -> None:
    table = {"a": [1.0, 0.0] * 8, "b": [1.0, 0.0] * 7 + [1.0, 1.0]}
    racers = candidates(table)
    run_race(racers, 16, scorer(table))
    assert not any(racer.stopped for racer in racers)


def test_one_that_answers_like_a_known_one_is_stopped() -> None:
    table = {"known": [1.0, 0.0] * 20, "new": [1.0, 0.0] * 20}
    known, new = candidates(table)
    known.scores = dict(enumerate(table["known"]))
    run_race([known, new], 40, scorer(table))
    assert (known.stopped, new.stopped, len(new.scores)) == (False, True, 16)


@pytest.mark.parametrize(
    ("score", "full_mark", "stopped"),
    [(0.0, 1.0, False), (0.5, 1.0, False), (1.0, 1.0, True), (0.6 + 0.3 + 0.1, 1.0, True), (5.0, 5.0, True)],
)
def test_one_that_so_far_equals_a_known_one_with_the_full_mark_everywhere_is_stopped(
    score: float, full_mark: float, stopped: bool
) -> None:
    table = {"known": [score] * 40, "new": [score] * 40}
    known, new = candidates(table)
    known.scores = dict(enumerate(table["known"]))
    run_race([known, new], 40, scorer(table), full_mark=full_mark)
    assert (known.stopped, new.stopped, len(new.scores)) == (False, stopped, 16 if stopped else 40)


def test_a_longer_one_too_where_a_simpler_one_is_as_good_so_far() -> None:
    table = {name: [1.0] * 40 for name in ("known", "longer", "simpler")}
    racers = with_demos(table, {"known": 1, "longer": 2, "simpler": 0})
    racers[0].scores = dict(enumerate(table["known"]))
    run_race(racers, 40, scorer(table))
    assert [racer.stopped for racer in racers] == [False, True, False]
    assert choose(racers, 40).name == "simpler"


@pytest.mark.parametrize(("wrong", "stopped"), [(0, False), (1, False), (2, True)])
def test_scores_that_are_nearly_all_the_same_do_not_say_that_candidates_are_alike(wrong: int, stopped: bool) -> None:
    same = [0.0] * wrong + [1.0] * (39 - wrong)
    table = {"simple": [*same, 0.0], "best": [*same, 1.0]}
    racers = with_demos(table, {"simple": 0, "best": 1})
    run_race(racers, 40, scorer(table))
    assert (racers[1].stopped, choose(racers, 40).name) == (stopped, "simple" if stopped else "best")


def test_the_bound_is_exact_when_all_examples_were_seen() -> None:
    differences = [-1.0, 0.0, 0.0, 0.0]
    assert upper_bound(differences, 4, 0.05) == -0.25


def test_the_bound_is_as_if_one_more_was_won_and_one_lost_and_less_wide_by_what_was_seen() -> None:
    # Of -1, -1, 0, 0, 1, -1 the variance is 2/3, and of nine more examples six are left.
    assert upper_bound([-1.0, -1.0, 0.0, 0.0], 10, 0.05) == pytest.approx(-0.5 + 1.6448536 * (2 / 3 / 4 * 6 / 9) ** 0.5)


def test_the_bound_shrinks_with_more_examples() -> None:
    bounds = [upper_bound([-0.5, 0.5, 0.0] * n, 1000, 0.05) for n in (4, 16, 64)]
    assert bounds == sorted(bounds, reverse=True)


def test_the_bound_scales_with_the_metrics_unit() -> None:
    differences = [-1.0, -1.0, 0.0, 1.0] * 4
    percent = [100 * d for d in differences]
    assert upper_bound(percent, 100, 0.05) == pytest.approx(100 * upper_bound(differences, 100, 0.05))


def test_a_few_lost_examples_in_a_row_do_not_stop_a_candidate() -> None:
    assert upper_bound([-1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 100, 0.05) > 0


def test_one_that_was_scored_before_takes_part_with_its_scores_and_costs_nothing() -> None:
    table = {"known": [1.0, 0.0] * 50, "loser": [0.0] * 100, "winner": [1.0] * 100}
    known, *others = candidates(table)
    known.scores = dict(enumerate(table["known"]))
    calls: list[tuple[str, int]] = []
    result = run_race([known, *others], 100, scorer(table, calls))
    assert {name for name, _ in calls} == {"loser", "winner"}
    assert (result.calls_made, result.calls_saved) == (len(calls), 200 - len(calls))
    assert [candidate.stopped for candidate in (known, *others)] == [False, True, False]


def test_means_that_differ_by_rounding_are_equal() -> None:
    plain, shown = Candidate("current", dspy.Predict("q -> a")), Candidate("demos 1", dspy.Predict("q -> a"))
    shown.program.demos = [dspy.Example(q="1", a="2")]
    plain.scores, shown.scores = dict(enumerate([0.3, 0.2, 0.1])), dict(enumerate([0.1, 0.2, 0.3]))
    assert shown.mean > plain.mean
    assert choose([plain, shown], 3) is choose([shown, plain], 3) is plain


def test_with_all_scores_there_is_no_race() -> None:
    known = Candidate("known", dspy.Module(), scores={0: 1.0, 1: 0.0})
    result = run_race([known], 2, scorer({}))
    assert (result.calls_made, result.calls_saved) == (0, 0)
