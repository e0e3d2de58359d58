"""A step is given what the rounds before it found, in a resumed run as in one that was never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.programs.program import prompts_state
from bettertogether.records import Ledger, PromptDetails, StepRecord
from bettertogether.run.earlier import earlier_programs
from bettertogether.steps.step import Step, StepContext, StepResult
from bettertogether.testing import FakeEngine

State = Mapping[str, Any]


def looking(seen: list[list[State]], stops: int = 0) -> Step:
    """A step that notes the prompts it may look at again, and is interrupted the first few times."""

    class Look(Step, Teleprompter):
        def run(self, student: dspy.Module, context: StepContext) -> StepResult:
            seen.append([prompts_state(program) for program in context.earlier])
            assert {program.lm.model for program in context.earlier} <= {student.lm.model}
            if len(seen) <= stops:
                raise KeyboardInterrupt
            return StepResult(student, Ledger())

    return Look()


def compiled(engine: FakeEngine, strategy: str | list[str], look: Step, run_dir: Path) -> dspy.Module:
    steps = {
        "p": BootstrapFewShotRS(parity_match, num_candidates=4, num_samples=0, rescue=False),
        "w": LoRAFinetune(parity_match, num_samples=0, rescue=False),
        "l": look,
    }
    return BetterTogether(parity_match, **steps).compile(
        parity_program(engine),
        trainset=numbers(40, start=40),
        valset=numbers(20),
        strategy=strategy,
        run_dir=run_dir,
        progress=False,
    )


def best_of(record: StepRecord) -> list[State]:
    assert isinstance(record.details, PromptDetails)
    return list(record.details.best)


def each_once(states: list[State]) -> list[State]:
    return [state for index, state in enumerate(states) if state not in states[:index]]


def test_the_best_candidates_come_first_then_the_programs_of_the_rounds_each_once(tmp_path: Path) -> None:
    seen: list[list[State]] = []
    report = compiled(parity_engine(learner), "p -> w -> l", looking(seen), tmp_path / "run").report
    best = best_of(report.rounds[1])
    assert len(best) == 3
    assert best[0] == report.rounds[1].program
    assert seen == [each_once([*best, report.rounds[2].program, report.rounds[1].program])]


def test_the_latest_round_comes_first_and_the_student_is_none_of_them(tmp_path: Path) -> None:
    seen: list[list[State]] = []
    report = compiled(parity_engine(learner), "p -> w -> p -> l", looking(seen), tmp_path / "run").report
    new, old = best_of(report.rounds[3]), best_of(report.rounds[1])
    assert seen == [each_once([*new, *old, *(report.rounds[index].program for index in (3, 2, 1))])]
    assert len(seen[0]) > 3


def test_the_first_step_has_nothing_to_look_at(tmp_path: Path) -> None:
    seen: list[list[State]] = []
    compiled(parity_engine(learner), "l -> w", looking(seen), tmp_path / "run")
    assert seen == [[]]


def test_other_strategies_have_no_say(tmp_path: Path) -> None:
    seen: list[list[State]] = []
    compiled(parity_engine(learner), ["p", "w -> l"], looking(seen), tmp_path / "run")
    assert [[state["self"]["demos"] for state in states] for states in seen] == [[[]]]


def test_a_resumed_run_has_the_same(tmp_path: Path) -> None:
    seen: list[list[State]] = []
    engine, look = parity_engine(learner), looking(seen, stops=1)
    for _ in range(2):
        compiled(engine, "p -> w -> l", look, tmp_path / "run")
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 3


def test_candidates_that_show_no_demos_are_not_kept(tmp_path: Path) -> None:
    engine = parity_engine(lambda request, number: number % 2 == 0 or (request.demos == 0 and number % 9 != 0))
    report = compiled(engine, "p", looking([]), tmp_path / "run").report
    assert report.rounds[1].details.chosen == "current"
    assert len(best_of(report.rounds[1])) == 3
    assert all(state["self"]["demos"] for state in best_of(report.rounds[1]))


def test_rounds_before_one_that_can_not_be_saved_are_left_out() -> None:
    program = parity_program(parity_engine(learner))
    state = prompts_state(program)
    records = [
        StepRecord(1, "p", "p", "complete", program=state),
        StepRecord(2, "x", "p -> x", "complete", program=None),
        StepRecord(3, "p", "p -> x -> p", "complete", program=state),
    ]
    assert earlier_programs(program, records[:1]) != []
    assert earlier_programs(program, records[:2]) == []
    assert len(earlier_programs(program, records)) == 1


def test_prompts_of_other_predictors_are_left_out() -> None:
    program = parity_program(parity_engine(learner))
    record = StepRecord(1, "p", "p", "complete", program={"other": prompts_state(program)["self"]})
    assert earlier_programs(program, [record]) == []
