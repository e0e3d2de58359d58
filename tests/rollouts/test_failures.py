"""Silence is no result: what makes a round, a step or an evaluation meaningless is said at once and in the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import learner, number_of, numbers, parity_engine, parity_match, parity_program, placeless, reply, right

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.callbacks import Callback, WarningEvent
from bettertogether.errors import TooManyErrors
from bettertogether.records import Failure, StepRecord
from bettertogether.report import CompileReport
from bettertogether.report.html import render
from bettertogether.report.view import view_of
from bettertogether.rollouts.evaluation import compare, evaluate
from bettertogether.rollouts.failures import all_failed, all_raised, failure_warning, no_difference, round_warnings
from bettertogether.run.selection import select
from bettertogether.testing import FakeEngine

PARSE = Failure("parse failure", 1, "parity not found in the answer 'no'", "example 0: number=0")


class Said(Callback):
    """The warnings of a run, each with the number of rounds that had ended by then."""

    def __init__(self) -> None:
        self.warnings: list[tuple[int, str]] = []
        self.rounds = 0
        self.ends: list[str | None] = []

    def on_warning(self, event: WarningEvent) -> None:
        self.warnings.append((self.rounds, event["text"]))

    def on_step_end(self, event: Any) -> None:
        self.rounds += 1

    def on_run_end(self, event: Any) -> None:
        self.ends.append(event["error"])


def failures(kind: str, count: int) -> tuple[Failure, ...]:
    return (Failure(kind, count, "reason", "example 0: number=0"),) if count else ()


def record(index: int, scores: tuple[float, ...], strategy: str = "", **fields: Any) -> StepRecord:
    return StepRecord(index, strategy, strategy, "complete", sum(scores) / len(scores), scores, **fields)


def compiled_with(
    engine: FakeEngine, metric: Callable[..., Any] = parity_match, *, val: int = 10, **options: Any
) -> dspy.Module:
    steps = options.pop("steps", None) or {"p": BootstrapFewShotRS(metric, num_candidates=1, num_samples=0)}
    arguments: dict[str, Any] = {"trainset": numbers(7, 40), "valset": numbers(val), "strategy": "p"}
    return BetterTogether(metric, **steps).compile(parity_program(engine), progress=False, **arguments | options)


def warnings_of(program: dspy.Module, start: str) -> list[str]:
    return [placeless(warning) for warning in program.report.warnings if warning.startswith(start)]


def broken(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> Any:
    raise ValueError("broken")


TROUBLES = {
    "raises": (broken, "10 x metric error, most often ValueError: broken (example 0: number=0). Mend the metric."),
    "none": (
        lambda e, p, trace=None: None,
        "10 x metric error, most often TypeError: the metric must return a bool, a number or Prediction(score=...), it "
        "returned None (example 0: number=0). Mend the metric.",
    ),
    "text": (
        lambda e, p, trace=None: "good",
        "10 x metric error, most often TypeError: the metric must return a bool, a number or Prediction(score=...), it "
        "returned 'good' (example 0: number=0). Mend the metric.",
    ),
    "nan": (
        lambda e, p, trace=None: math.nan,
        "10 x metric returned NaN (example 0: number=0). Let the metric return a finite number.",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_metric_that_is_broken_on_every_example_is_reported_with_the_reason_and_an_example(trouble: str) -> None:
    metric, told = TROUBLES[trouble]
    compiled = compiled_with(parity_engine(learner), metric)
    said = f"all 10 examples failed, so the result says nothing: {told}"
    assert warnings_of(compiled, "student: ") == [f"student: {said}"]
    assert warnings_of(compiled, "p: all") == [f"p: {said}"]
    assert compiled.flag_compilation_error_occurred
    assert compiled.report.selected == 0


def test_it_is_said_at_once_in_the_log_and_to_callbacks_before_the_round_ends(caplog: pytest.LogCaptureFixture) -> None:
    said = Said()
    compiled_with(parity_engine(learner), broken, callbacks=[said])
    starts = [(rounds, text.partition(":")[0]) for rounds, text in said.warnings]
    assert starts == [(0, "The valset has 10 examples, so one of them is 10% of the score"), (0, "student")] + [
        (1, start) for start in ("bootstrap demos", "candidates", "p")
    ]
    assert [text for _, text in said.warnings] == [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_answers_of_which_none_can_be_parsed_are_reported_at_any_size_without_the_flag() -> None:
    compiled = compiled_with(FakeEngine(lambda _: "no idea"), val=30)
    assert warnings_of(compiled, "student: ")[0].startswith(
        "student: all 30 examples failed, so the result says nothing: 30 x parse failure, most often parity not found "
        "in the answer 'no idea' (example 0: number=0). The answers lack the program's output fields: "
    )
    assert not compiled.flag_compilation_error_occurred


@pytest.mark.parametrize(
    ("answer", "told"), [(lambda p, n: None, "None"), (lambda p, n: (p(number=n) for _ in "1"), "a generator")]
)
def test_a_program_that_returns_what_no_metric_can_judge_is_at_fault_itself(answer: Any, told: str) -> None:
    class Lost(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decide = parity_program(parity_engine(learner))

        def forward(self, number: int) -> Any:
            return answer(self.decide, number)

    (failure,) = evaluate(Lost(), numbers(4), parity_match).failures
    reason = f"it returned {told}, of which the metric says AttributeError: "
    assert (failure.kind, failure.count) == ("program error", 4)
    assert failure.reason.startswith(reason)


def test_a_program_that_raises_on_every_example_is_reported() -> None:
    class Broken(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = dspy.Predict("number: int -> parity")

        def forward(self, number: int) -> dspy.Prediction:
            return self.answr(number=number)

    program = Broken()
    program.set_lm(parity_program(parity_engine(learner)).lm)
    compiled = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=1)).compile(
        program, trainset=numbers(10, 40), valset=numbers(4), strategy="p", progress=False
    )
    assert warnings_of(compiled, "student: ") == [
        "student: all 4 examples failed, so the result says nothing: 4 x program error, most often AttributeError: "
        "'Broken' object has no attribute 'answr' (example 0: number=0). Mend the program."
    ]
    assert compiled.flag_compilation_error_occurred


def test_a_step_whose_result_can_not_be_called_as_the_student_is_reported_and_not_selected() -> None:
    compiled = compiled_with(parity_engine(learner), strategy="e", steps={"e": dspy.Ensemble()})
    assert warnings_of(compiled, "e: ") == [
        "e: all 10 examples failed, so the result says nothing: 10 x program error, most often TypeError: 'Predict' "
        "object is not iterable (example 0: number=0). Mend the program. The program that this step returned can't be "
        "called as the student is."
    ]
    assert compiled.flag_compilation_error_occurred
    assert compiled.report.selected == 0


def test_more_errors_than_allowed_still_end_the_run() -> None:
    with pytest.raises(TooManyErrors, match="ValueError: broken"):
        compiled_with(parity_engine(learner), broken, val=11)


def fails_below(limit: int) -> FakeEngine:
    return FakeEngine(lambda r: "no" if number_of(r) < limit else reply(r, parity=right(number_of(r))))


def test_half_of_the_examples_failing_is_counted_and_no_warning() -> None:
    compiled = compiled_with(fails_below(5))
    assert warnings_of(compiled, "student: ") == []
    assert compiled.report.rounds[0].failures == (
        Failure("parse failure", 5, "parity not found in the answer 'no'", "example 0: number=0"),
    )
    told = "student: 5 examples failed and scored 0: 5 x parse failure, most often parity not found in the answer "
    assert f"{told}'no'" in " ".join(str(compiled.report).split())
    page = render(view_of(compiled.report))
    assert "<td>5 x parse failure</td>" in page
    assert f"<li>{told}&#x27;no&#x27;</li>" in page


def test_more_than_half_of_the_examples_failing_is_a_warning() -> None:
    compiled = compiled_with(fails_below(6))
    assert warnings_of(compiled, "student: ")[0].startswith(
        "student: 6 of 10 examples failed, so the result says little: 6 x parse failure, most often parity not found"
    )
    assert not compiled.flag_compilation_error_occurred


def test_no_failure_is_no_word() -> None:
    compiled = compiled_with(parity_engine(learner), val=24)
    assert compiled.report.warnings == ()
    assert [round_.failures for round_ in compiled.report.rounds] == [(), ()]
    assert "failed" not in str(compiled.report)


def test_kinds_are_counted_apart_and_the_commonest_comes_first() -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        return math.nan if example.number == 9 else 1 / (example.number - 8)

    result = evaluate(parity_program(fails_below(3)), numbers(10), metric)
    assert [(failure.kind, failure.count) for failure in result.failures] == [
        ("parse failure", 3),
        ("metric error", 1),
        ("metric returned NaN", 1),
    ]
    assert repr(result) == (
        f"Evaluation(mean {result.mean:.3f} of 10 examples, failed: 3 x parse failure, 1 x metric error, "
        "1 x metric returned NaN, most often parity not found in the answer 'no')"
    )


def test_the_commonest_reason_of_a_kind_is_told_with_its_first_example() -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise KeyError("rare" if example.number == 0 else "common")

    (failure,) = evaluate(parity_program(parity_engine(learner)), numbers(4), metric).failures
    line = metric.__code__.co_firstlineno + 1
    reason = f"KeyError: 'common' (test_failures.py:{line} in metric)"
    assert failure == Failure("metric error", 4, reason, "example 1: number=1")


def test_a_secret_in_an_error_is_masked() -> None:
    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise ValueError("Judge(api_key='abc') is down")

    (failure,) = evaluate(parity_program(parity_engine(learner)), numbers(2), metric).failures
    assert placeless(failure.reason) == "ValueError: Judge(api_key='***') is down"


def test_a_public_evaluation_that_fails_warns_at_once(caplog: pytest.LogCaptureFixture) -> None:
    evaluate(parity_program(parity_engine(learner)), numbers(4), broken)
    assert [*map(placeless, caplog.messages)] == [
        "evaluate: all 4 examples failed, so the result says nothing: 4 x metric error, most often ValueError: broken "
        "(example 0: number=0). Mend the metric."
    ]


def test_a_comparison_says_how_many_examples_failed() -> None:
    program = parity_program(fails_below(1))
    text = compare({"new": evaluate(program, numbers(4), parity_match)})
    assert text.endswith("   failed: 1 x parse failure")


class InterruptedOnce(Teleprompter):
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        if not self.mark.exists():
            self.mark.touch()
            raise KeyboardInterrupt
        return student


def test_a_resumed_run_reports_the_same(tmp_path: Path) -> None:
    def run(folder: Path) -> CompileReport:
        stop = InterruptedOnce(tmp_path / "interrupted")
        steps = {"p": BootstrapFewShotRS(parity_match, num_candidates=1, num_samples=0), "x": stop}
        return compiled_with(fails_below(8), strategy="p -> x", steps=steps, run_dir=folder).report

    stopped = run(tmp_path / "run")
    assert [round_.failed for round_ in stopped.rounds] == [8, 8, 0]
    resumed, whole = run(tmp_path / "run"), run(tmp_path / "whole")
    assert resumed.warnings == whole.warnings
    assert len(resumed.warnings) == 6
    assert [round_.failures for round_ in resumed.rounds] == [round_.failures for round_ in whole.rounds]
    on_disk = CompileReport.from_dict(json.loads((tmp_path / "run" / "report.json").read_text()))
    assert on_disk == resumed


def test_runs_that_no_metric_accepts_are_said_in_the_prompt_step() -> None:
    metric = lambda e, p, trace=None: 0.5  # noqa: E731
    steps = {"p": BootstrapFewShotRS(metric, num_candidates=1, num_samples=1, rescue=False)}
    compiled = compiled_with(parity_engine(learner), metric, steps=steps)
    assert warnings_of(compiled, "p: bootstrap demos") == [
        "p: bootstrap demos: the metric accepted none of 63 runs on 7 examples (63 x score below threshold), so no "
        "demo comes from a run. Give a threshold= that runs can reach, or a teacher, or mend the metric."
    ]


def test_candidates_that_all_score_the_same_are_said_in_the_prompt_step() -> None:
    compiled = compiled_with(parity_engine(learner), lambda e, p, trace=None: 0.5)
    assert len(warnings_of(compiled, "p: candidates: each of the ")) == 1


def test_candidates_that_all_solve_everything_are_no_warning() -> None:
    compiled = compiled_with(parity_engine(lambda *_: True), val=20)
    assert compiled.report.warnings == (
        "student: each of the 20 examples has the full score 1: nothing is left to gain on them. Give a harder valset.",
    )


def test_failing_runs_of_the_weight_step_are_in_the_report() -> None:
    engine = FakeEngine(lambda r: "no" if number_of(r) % 4 else reply(r, parity=right(number_of(r))))
    steps = {"w": LoRAFinetune(parity_match, num_samples=0, rescue=False)}
    compiled = compiled_with(engine, strategy="w", steps=steps, trainset=numbers(24, 40))
    assert warnings_of(compiled, "w: collect")[0].startswith(
        "w: collect training data: 18 of 24 runs failed, so the result says little: 18 x parse failure"
    )


def test_a_round_of_equal_scores_is_told_once_for_each_score_with_an_answer() -> None:
    zero = record(0, (0.0, 0.0), scored_example="example 0: number=0 -> parity='odd'")
    rounds = [zero, record(1, (0.0, 0.0), "p"), record(2, (0.5, 0.5), "p -> w")]
    assert round_warnings(rounds, 1.0) == [
        "student: each of the 2 examples scores 0, so nothing can be told apart by it: check the metric, and what the "
        "program answers (example 0: number=0 -> parity='odd').",
        "p -> w: each of the 2 examples scores 0.5, so nothing can be told apart by it: check the metric, and what the "
        "program answers.",
    ]


def test_a_round_that_reaches_the_full_mark_everywhere_is_a_success() -> None:
    for full in (1.0, 0.6 + 0.3 + 0.1):
        assert round_warnings([record(0, (0.0, full)), record(1, (full, full), "p")], 1.0) == []


def test_the_full_mark_is_the_steps_threshold_where_that_is_higher() -> None:
    rounds = [record(0, (0.0, 90.0)), record(1, (50.0, 50.0), "p")]
    assert len(round_warnings(rounds, 80.0)) == 1
    assert round_warnings(rounds, 50.0) == []


def test_one_example_is_not_told_to_be_equal() -> None:
    assert round_warnings([record(0, (0.0,))], 1.0) == []


def test_rounds_that_no_score_tells_apart_are_told_of_at_the_end() -> None:
    same = [record(0, (0.0, 1.0)), record(1, (0.0, 1.0), "p")]
    assert no_difference(same, 1.0) == (
        "The 2 rounds have the same score on each of the 2 validation examples: the scores did not tell them apart, "
        "and the rule for ties selected."
    )
    assert no_difference([same[0]], 1.0) is None
    assert no_difference([same[0], record(1, (1.0, 0.0), "p")], 1.0) is None
    assert no_difference([record(0, (1.0, 1.0)), record(1, (1.0, 1.0), "p")], 1.0) is None


def test_a_round_whose_service_was_away_is_not_blamed_on_the_program_of_its_step() -> None:
    away = Failure("program error", 2, "LMBillingError: no", "example 0: number=0")
    assert round_warnings([record(0, (0.0, 1.0)), record(1, (0.0, 0.0), "p", failures=(away,))], 1.0) == [
        "p: all 2 examples failed, so the result says nothing: 2 x program error, most often LMBillingError: no "
        "(example 0: number=0). The LM's service refuses the key or the account: check the LM's api_key, and the "
        "account."
    ]


@pytest.mark.parametrize(("failed", "word"), [(0, None), (5, None), (6, "little"), (9, "little"), (10, "nothing")])
def test_the_threshold_of_a_warning_is_more_than_half(failed: int, word: str | None) -> None:
    text = failure_warning(failures("timeout", failed), 10, "p")
    assert (text is None) if word is None else (f"so the result says {word}" in str(text))


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("metric error", True),
        ("program error", True),
        ("timeout", True),
        ("metric returned NaN", True),
        ("parse failure", False),
        ("prompt too long", False),
    ],
)
def test_the_flag_is_for_what_is_broken_not_for_answers_that_can_not_be_read(kind: str, raised: bool) -> None:
    all_of_it = record(0, (0.0, 0.0), failures=failures(kind, 2))
    assert all_failed(all_of_it)
    assert all_raised(all_of_it) is raised
    assert not all_failed(record(0, (0.0, 1.0), failures=failures(kind, 1)))


def test_a_round_in_which_everything_failed_is_not_selected_although_zero_is_the_best_score() -> None:
    rounds = [record(0, (-3.0, -1.0)), record(1, (0.0, 0.0), "p", failures=failures("program error", 2))]
    assert select(rounds) == 0
    assert select([rounds[1]]) == 0


class Ends(Teleprompter):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        raise self.error


@pytest.mark.parametrize("action", ["return", "raise"])
def test_the_end_of_a_run_is_told_when_a_step_fails(action: str) -> None:
    said = Said()
    options: dict[str, Any] = {"strategy": "x", "steps": {"x": Ends(OSError("disk gone"))}, "on_step_error": action}
    if action == "raise":
        with pytest.raises(OSError, match="disk gone"):
            compiled_with(parity_engine(learner), callbacks=[said], **options)
    else:
        compiled_with(parity_engine(learner), callbacks=[said], **options)
    assert said.ends == ["OSError('disk gone')"]


def test_the_end_of_a_run_is_told_when_the_student_can_not_be_scored() -> None:
    said = Said()
    with pytest.raises(TooManyErrors):
        compiled_with(parity_engine(learner), broken, val=11, callbacks=[said])
    assert [str(end)[:13] for end in said.ends] == ["TooManyErrors"]


def test_the_end_of_a_run_is_told_after_ctrl_c_while_the_student_is_scored() -> None:
    def interrupts(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise KeyboardInterrupt

    said = Said()
    with pytest.raises(KeyboardInterrupt):
        compiled_with(parity_engine(learner), interrupts, callbacks=[said])
    assert said.ends == ["KeyboardInterrupt()"]


def test_what_a_callback_raises_at_the_end_does_not_hide_what_ended_the_run() -> None:
    class Broken(Callback):
        def on_run_end(self, event: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(TooManyErrors) as caught:
        compiled_with(parity_engine(learner), broken, val=11, callbacks=[Broken()])
    assert isinstance(caught.value.__context__, ZeroDivisionError)
