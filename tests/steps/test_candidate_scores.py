"""Of candidates that are scored together, a broken one leaves alone."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, parity_match, placeless, plain_lm, prompt_details

from bettertogether.errors import TooManyErrors
from bettertogether.rollouts.settings import RunSettings
from bettertogether.steps.candidate_scores import CandidateScores
from bettertogether.steps.demo_sets import Candidate
from bettertogether.steps.prompt_step import BootstrapFewShotRS
from bettertogether.steps.step import StepContext

RAISED = (
    "4 of 4 examples raised, more than max_errors=3 allows. 4 x program error: ValueError: no demos, please. Mend the "
    "program or the metric, or give a higher max_errors."
)


class Shy(dspy.Module):
    """Raises where its prompt shows demos; is right about even numbers."""

    def __init__(self, demos: int = 0) -> None:
        super().__init__()
        self.decide = dspy.Predict(Parity)
        self.decide.demos = numbers(demos)
        self.set_lm(plain_lm(parity_engine(lambda _, number: number % 2 == 0)))

    def forward(self, number: int) -> Any:
        answer = self.decide(number=number)
        if self.decide.demos:
            raise ValueError("no demos, please")
        return answer


def scores(*candidates: Candidate, max_errors: int = 3) -> CandidateScores:
    return CandidateScores(candidates, numbers(4), parity_match, RunSettings(max_errors=max_errors))


def test_one_that_raises_has_no_scores_and_is_told_with_its_error() -> None:
    candidates = [Candidate("current", Shy()), Candidate("demos 1", Shy(1)), Candidate("zero-shot", Shy())]
    scoring = scores(*candidates)
    assert scoring(candidates, range(4)) == [(1.0, 0.0, 1.0, 0.0), None, (1.0, 0.0, 1.0, 0.0)]
    assert [*map(placeless, scoring.broken)] == [f"candidates: 'demos 1' leaves the race: {RAISED}"]
    assert scoring.ledger.lm_calls == 12


def test_errors_up_to_the_limit_are_zeros() -> None:
    candidates = [Candidate("current", Shy()), Candidate("demos 1", Shy(1))]
    scoring = scores(*candidates, max_errors=4)
    assert (scoring(candidates, range(4)), scoring.broken) == ([(1.0, 0.0, 1.0, 0.0), (0.0,) * 4], [])


def test_errors_of_earlier_examples_count() -> None:
    candidates = [Candidate("current", Shy()), Candidate("demos 1", Shy(1))]
    scoring = scores(*candidates)
    assert scoring(candidates, range(2)) == [(1.0, 0.0), (0.0, 0.0)]
    for candidate in candidates:
        candidate.scores = {0: 0.0, 1: 0.0}
    assert scoring(candidates, range(2, 4)) == [(1.0, 0.0), None]
    assert [*map(placeless, scoring.broken)] == [f"candidates: 'demos 1' leaves the race: {RAISED}"]


def test_prompts_given_that_raise_are_an_error() -> None:
    candidates = [Candidate("current", Shy(1)), Candidate("zero-shot", Shy())]
    with pytest.raises(TooManyErrors, match=r"4 of 4 .*max_errors=3 allows.*no demos, please .*Mend"):
        scores(*candidates)(candidates, range(4))


def test_it_is_an_error_where_no_candidate_is_left() -> None:
    lost, broken = Candidate("current", Shy(), stopped=True), Candidate("demos 1", Shy(1))
    with pytest.raises(TooManyErrors, match=r"4 of 4 .*max_errors=3 allows.*no demos, please .*Mend"):
        scores(lost, broken)([broken], range(4))


@pytest.mark.parametrize(("race", "size"), [(True, 8), (False, 20)])
def test_a_prompt_step_goes_on_without_it(race: bool, size: int) -> None:
    options: dict[str, Any] = {"num_candidates": 0, "train_size": 10, "num_samples": 0, "max_errors": 3}
    result = BootstrapFewShotRS(parity_match, race=race, rescue=False, **options).run(Shy(), StepContext(numbers(30)))
    details = prompt_details(result)
    assert [(each.name, each.scored_on, each.stopped) for each in details.candidates] == [
        ("current", 20, False),
        ("labels", 0, True),
    ]
    assert (details.chosen, details.race.calls_made, result.ledger.metric_calls) == ("current", 20 + size, 30)
    assert [warning.partition(" of ")[0] for warning in result.warnings] == [
        f"candidates: 'labels' leaves the race: {size}"
    ]
