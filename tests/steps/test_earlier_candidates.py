"""What earlier rounds found takes part in a prompt step's race again."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program, prompt_details

from bettertogether.steps.prompt_capture import render_prompt
from bettertogether.steps.prompt_step import BootstrapFewShotRS
from bettertogether.steps.step import StepContext, StepResult
from bettertogether.steps.work import Outlook
from bettertogether.testing import FakeEngine


def with_demos(engine: FakeEngine, *demos: int, instructions: str | None = None) -> dspy.Predict:
    program = parity_program(engine)
    program.demos = [numbers(1, start=number)[0] for number in demos]
    if instructions:
        program.signature = program.signature.with_instructions(instructions)
    return program


def looked_at_again(earlier: list[dspy.Module], student: dspy.Module, **options: Any) -> StepResult:
    context = StepContext(numbers(40), restart_from=parity_program(student.lm.engine), earlier=earlier)
    options = {"num_samples": 0, "rescue": False, "race": False, "num_candidates": 4, **options}
    return BootstrapFewShotRS(parity_match, **options).run(student, context)


def test_what_earlier_rounds_found_is_ranked_anew_and_wins_where_it_is_best() -> None:
    engine = parity_engine(lambda request, number: any("80" in m["content"] for m in request.messages[1:-1]))
    earlier = [with_demos(engine, 90, 91), with_demos(engine, 80, 91)]
    result = looked_at_again(earlier, with_demos(engine, 95))
    names = [candidate.name for candidate in prompt_details(result).candidates]
    assert names == ["current", "zero-shot", "labels", "earlier 1", "earlier 2", "demos 1", "demos 2"]
    assert prompt_details(result).chosen == "earlier 2"
    assert [demo.number for demo in result.program.demos] == [80, 91]
    assert result.step_gain == 1.0


def test_earlier_prompts_with_other_instructions_are_no_duplicates_and_keep_them_in_a_restart() -> None:
    engine = parity_engine(lambda request, _: "SECRET" in request.system and request.demos > 0)
    result = looked_at_again([with_demos(engine, 95, instructions="SECRET")], with_demos(engine, 95))
    assert prompt_details(result).chosen == "earlier 1"
    assert result.program.signature.instructions == "SECRET"


def test_candidates_are_told_apart_by_content() -> None:
    engine = parity_engine(learner)
    current = with_demos(engine, 95)
    before = looked_at_again([], current)
    sampled = next(c["program"] for c in before.program.candidate_programs if c["name"] == "demos 1")
    earlier = [parity_program(engine), with_demos(engine, 95), with_demos(engine, 96), with_demos(engine, 96), sampled]
    names = [candidate.name for candidate in prompt_details(looked_at_again(earlier, current)).candidates]
    assert names == ["current", "zero-shot", "labels", "earlier 3", "earlier 5", "demos 1", "demos 2"]


@pytest.mark.parametrize(("sets", "again", "new"), [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 2), (5, 3, 2), (6, 3, 3)])
def test_those_of_before_count_among_the_candidates_and_some_are_always_new(sets: int, again: int, new: int) -> None:
    engine = parity_engine(learner)
    earlier = [with_demos(engine, 95), *(with_demos(engine, number) for number in (91, 92, 93))]
    result = looked_at_again(earlier, with_demos(engine, 95), num_candidates=sets)
    tried = [candidate.name for candidate in prompt_details(result).candidates]
    before, sampled = [f"earlier {n}" for n in range(2, 2 + again)], [f"demos {n}" for n in range(1, 1 + new)]
    assert tried == ["current", "zero-shot", "labels", *before, *sampled]
    outlook = Outlook(solved=0.5, again=0.5, hinted=1.0, learned=None, has_demos=True)
    step = BootstrapFewShotRS(parity_match, num_candidates=sets)
    assert step.work(with_demos(engine, 95), StepContext(numbers(40), earlier=earlier), outlook).prompts == len(tried)


def test_of_equal_prompts_with_as_many_demos_the_current_ones_stay() -> None:
    engine = parity_engine(lambda request, _: request.demos == 1)
    result = looked_at_again([with_demos(engine, 96)], with_demos(engine, 95))
    assert prompt_details(result).chosen == "current"
    assert result.step_gain == 0.0


def test_earlier_demos_that_do_not_fit_the_context_are_dropped_and_counted() -> None:
    engine = parity_engine(learner)
    program = parity_program(engine)
    engine.max_length = len(engine.prompt_tokens(render_prompt(program, engine, {"number": 0}, numbers(1)))) + 256
    result = looked_at_again([with_demos(engine, 95, 96)], program, max_labeled_demos=0, max_bootstrapped_demos=0)
    assert [(c.name, c.demos) for c in prompt_details(result).candidates] == [("current", 0), ("earlier 1", 1)]
    assert prompt_details(result).dropped_demos == {"self": 1}


def test_the_prompts_given_are_not_taken_for_equal_before_all_of_their_scores_on_a_valset_are_known() -> None:
    trainset, valset = numbers(20), numbers(40, start=200)
    optimizer = BootstrapFewShotRS(parity_match, num_candidates=0, max_labeled_demos=0)
    hard = optimizer.split(trainset, valset, 0)[1][-1].number
    engine = parity_engine(lambda request, number: number != hard or request.demos > 0)
    result = optimizer.run(with_demos(engine, 95), StepContext(trainset, valset, restart_from=parity_program(engine)))
    scores = {candidate.name: (candidate.score, candidate.stopped) for candidate in prompt_details(result).candidates}
    assert scores == {"current": (1.0, False), "zero-shot": (39 / 40, False)}
    assert prompt_details(result).chosen == "current"
