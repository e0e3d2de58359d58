"""Rounds are the prefixes of the strategy, each scored, recorded and charged, and the best is returned."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import Parity, learner, number_of, parity_engine, parity_match, parity_program
from parity_run import TRAIN, VAL, Step, comparable, compile_, rounds, steps

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune
from bettertogether.callbacks import Callback
from bettertogether.errors import ConfigError, TooManyErrors
from bettertogether.records import CELLS, StepRecord
from bettertogether.report import CompileReport
from bettertogether.steps.step import StepContext, StepResult
from bettertogether.testing import FakeEngine, FakeRequest


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


def test_every_prefix_of_the_strategy_is_a_round_with_a_score_of_each_example(engine: FakeEngine) -> None:
    compiled = compile_(engine)
    assert rounds(compiled) == [(name, "complete") for name in ("", "p", "p -> w", "p -> w -> p")]
    for record in compiled.report.rounds:
        assert len(record.scores or ()) == 20
        assert record.score == sum(record.scores or ()) / 20


def test_the_ledgers_of_the_rounds_add_up_to_what_the_engine_and_the_metric_saw(engine: FakeEngine) -> None:
    calls = 0

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        nonlocal calls
        calls += 1
        return parity_match(example, prediction)

    optimizers = {"p": BootstrapFewShotRS(metric, num_candidates=2), "w": LoRAFinetune(metric, num_samples=1)}
    report = compile_(engine, metric=metric, optimizers=optimizers, num_threads=1).report
    assert report.metric_calls == calls
    assert report.lm_calls == len(engine.requests)


def test_the_best_round_on_the_valset_is_returned() -> None:
    engine = parity_engine(lambda request, number: "good" in request.system or number % 3 == 0)
    compiled = compile_(engine, "a -> b", optimizers={"a": Step("good"), "b": Step("bad")})
    assert compiled.report.selected == 1
    assert compiled.signature.instructions == "good"
    assert [c["strategy"] for c in compiled.candidate_programs] == ["a", "", "a -> b"]


def test_the_result_is_never_worse_than_the_student_on_the_valset() -> None:
    engine = parity_engine(lambda request, number: "bad" not in request.system)
    compiled = compile_(engine, "b", optimizers={"b": Step("bad")})
    assert compiled.report.selected == 0
    assert compiled.signature.instructions != "bad"


def test_without_a_valset_the_latest_round_is_returned(engine: FakeEngine) -> None:
    compiled = compile_(engine, "a -> b", optimizers={"a": Step("A"), "b": Step("B")}, valset=None, valset_ratio=0)
    assert compiled.signature.instructions == "B"
    assert [record.score for record in compiled.report.rounds] == [None] * 3
    assert engine.requests == []


def test_strategies_of_a_list_share_their_beginnings(engine: FakeEngine) -> None:
    compiled = compile_(engine, ["p -> w", "p", "w -> p", "p -> w -> p"])
    assert [name for name, _ in rounds(compiled)] == ["", "p", "p -> w", "w", "w -> p", "p -> w -> p"]
    assert len(engine.trainings) == 2


def test_auto_stops_when_a_cycle_brings_no_gain() -> None:
    engine = parity_engine(lambda *_: False)
    compiled = compile_(engine, "auto", optimizers={"a": Step("A"), "b": Step("B")}, max_rounds=6)
    assert [name for name, _ in rounds(compiled)] == ["", "a", "a -> b"]


def test_auto_goes_on_while_rounds_gain_up_to_max_rounds() -> None:
    engine = parity_engine(lambda request, number: number % 10 < 3 * len(request.system.split("!")[1:]))

    class Shouts(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            student.signature = student.signature.with_instructions(student.signature.instructions + " !")
            return student

    compiled = compile_(engine, "auto", optimizers={"a": Shouts()}, max_rounds=2)
    assert [name for name, _ in rounds(compiled)] == ["", "a", "a -> a"]
    compiled = compile_(engine, "auto", optimizers={"a": Shouts()}, max_rounds=9)
    assert [record.score for record in compiled.report.rounds] == [0.0, 0.3, 0.6, 0.9, 1.0]


class Forgets(LoRAFinetune):
    """Takes the demos away as well."""

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        result = super().run(student, context)
        result.program.demos = []
        return result


@pytest.mark.parametrize("kind", [LoRAFinetune, Forgets])
def test_after_a_weight_step_the_2x2_of_weights_and_the_prompts_before_it_is_scored(kind: type[LoRAFinetune]) -> None:
    def knows(request: FakeRequest, number: int) -> bool:
        return number % 4 < (1 + (request.demos > 0) + 2 * (request.trained_on > 0))

    optimizers = steps(w=kind(parity_match, num_samples=0, rescue=False))
    report = compile_(parity_engine(knows), "p -> w", optimizers=optimizers).report
    (record,) = (record for record in report.rounds if record.strategy == "p -> w")
    cells = {cell: sum(scores) / len(scores) for cell, scores in record.two_by_two.items()}
    assert cells == {"base_old": 0.25, "base_new": 0.5, "tuned_old": 0.75, "tuned_new": 1.0}
    assert report.attribution is not None
    assert (report.attribution.weights.gain, report.attribution.prompts.gain) == (0.5, 0.25)
    assert report.attribution.interaction.gain == 0.0


def test_the_2x2_runs_nothing_that_was_run_before(engine: FakeEngine) -> None:
    compile_(engine, "p -> w")
    on_valset = [(r.model, str(r.messages)) for r in engine.requests if number_of(r) < 20]
    assert len(on_valset) == len(set(on_valset))


def test_the_2x2_is_left_out_where_prompts_did_not_change_and_where_it_is_turned_off(engine: FakeEngine) -> None:
    assert all(record.two_by_two is None for record in compile_(engine, "w").report.rounds)
    off = compile_(engine, "p -> w", two_by_two=False).report
    assert all(record.two_by_two is None for record in off.rounds)
    assert set(CELLS) == set(compile_(engine, "p -> w").report.two_by_two or ())


class Orders(Teleprompter):
    """Notes the order in which it is given the trainset."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
        self.seen.append([example.number for example in trainset])
        return student


def orders(strategy: Any, **options: Any) -> list[list[int]]:
    """The orders in which "n" is given the trainset."""
    noting = Orders()
    compile_(parity_engine(learner), strategy, optimizers={"n": noting, "o": Step()}, **options)
    return noting.seen


def test_each_step_gets_the_trainset_in_another_order() -> None:
    first, second = orders("n -> n")
    assert first != second
    assert sorted(first) == sorted(second) == list(range(40, 80))
    assert orders("n -> n", shuffle_trainset_between_steps=False) == [list(range(40, 80))] * 2


def test_other_strategies_of_a_list_do_not_change_the_order_of_the_trainset() -> None:
    assert orders(["o -> o", "n -> n"]) == orders("n -> n")


def test_prompts_are_chosen_on_the_valset_and_on_a_small_one_only_for_weights_that_were_tuned(
    engine: FakeEngine,
) -> None:
    assert compile_(engine, "p").report.rounds[1].details.validation_examples == len(VAL)
    report = compile_(engine, valset=VAL[:8]).report
    assert report.rounds[1].details.validation_examples == 28
    assert report.rounds[3].details.validation_examples == 8


def test_the_steps_share_runs_of_the_same_program(engine: FakeEngine) -> None:
    compile_(engine, "p -> w")
    seen = [(r.model, str(r.messages), r.temperature, r.seed) for r in engine.requests]
    assert len(seen) == len(set(seen))


def test_a_predictor_that_dspy_does_not_find_is_told(engine: FakeEngine) -> None:
    class Nested(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.found = [parity_program(engine)]
            self.lost = {"parts": [parity_program(engine)]}

        def forward(self, number: int) -> Any:
            return self.lost["parts"][0](number=number)

    optimizer = BetterTogether(parity_match, i=Step())
    compiled = optimizer.compile(Nested(), trainset=TRAIN, valset=VAL, strategy="i", progress=False)
    assert [text.partition(":")[0] for text in compiled.report.warnings if "find" in text] == [
        """DSPy doesn't find the student's predictors ["self.lost['parts'][0]"]"""
    ]


def test_examples_without_an_input_of_the_student_are_told(engine: FakeEngine) -> None:
    train = [dspy.Example(n=n, number=n, parity="odd").with_inputs("n") for n in range(4)]
    optimizer = BetterTogether(parity_match, i=Step())
    compiled = optimizer.compile(parity_program(engine), trainset=train, valset=VAL, strategy="i", progress=False)
    assert compiled.report.warnings[0] == (
        "No example of the trainset has the student's input fields ['number'], so its prompts lack them: their inputs "
        "are ['n']. Name the fields alike, and in with_inputs(...)."
    )


class Asks(dspy.ChainOfThought):
    def forward(self, n: int) -> Any:
        return super().forward(number=n)


class WithDefault(Parity):
    style: str = dspy.InputField(default="brief")


@pytest.mark.parametrize("student", [Asks(Parity), dspy.Predict(WithDefault)])
def test_inputs_that_forward_or_a_default_gives_are_not_missed(engine: FakeEngine, student: Any) -> None:
    student.set_lm(parity_program(engine).lm)
    key = "n" if isinstance(student, Asks) else "number"
    train = [dspy.Example({key: n, "parity": "odd"}).with_inputs(key) for n in range(4)]
    optimizer = BetterTogether(parity_match, i=Step())
    compiled = optimizer.compile(student, trainset=train, valset=train, strategy="i", progress=False)
    assert not [warning for warning in compiled.report.warnings if "input fields" in warning]


def test_a_failing_step_that_would_fail_again_is_not_told_to_go_on(engine: FakeEngine) -> None:
    compiled = compile_(engine, "x", optimizers=steps(x=Step(raises=[TypeError("no such option")])))
    assert "The same call would fail again" in compiled.report.warnings[-1]


def test_a_failing_step_ends_the_run_with_the_best_so_far(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    optimizers = steps(x=Step(raises=[OSError("disk gone")]))
    with caplog.at_level(logging.ERROR, logger="bettertogether"):
        compiled = compile_(engine, "w -> x -> p", optimizers=optimizers)
    assert compiled.flag_compilation_error_occurred is True
    assert rounds(compiled) == [("", "complete"), ("w", "complete"), ("w -> x", "failed")]
    assert compiled.report.selected == 1
    assert "Traceback" in str(compiled.report.rounds[-1].error)
    assert "OSError: disk gone" in str(compiled.report.rounds[-1].error)
    assert "The run ended at 'w -> x': OSError: disk gone" in compiled.report.warnings[-1]
    (logged,) = (record for record in caplog.records if record.name == "bettertogether.run.loop")
    assert logged.exc_info is not None


def test_a_failing_step_raises_where_asked_to_and_all_is_kept_for_going_on(engine: FakeEngine, tmp_path: Path) -> None:
    failing = steps(x=Step(raises=[OSError("disk gone")]))
    with pytest.raises(OSError, match="disk gone"):
        compile_(engine, "w -> x", optimizers=failing, on_step_error="raise", run_dir=tmp_path / "run")
    trained = len(engine.trainings)
    compiled = compile_(engine, "w -> x", optimizers=steps(x=Step()), run_dir=tmp_path / "run")
    assert len(engine.trainings) == trained
    assert rounds(compiled)[-1] == ("w -> x", "complete")


def test_a_key_in_the_error_of_a_step_gets_into_no_file(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaks(Teleprompter):
        def compile(self, student: dspy.Module, **_: Any) -> dspy.Module:
            raise ValueError("Incorrect API key provided: sk-abcdefghijklmnop, api_key='hunter2'")

    compiled = compile_(engine, "x", optimizers={"x": Leaks()}, run_dir=tmp_path / "run")
    assert "Incorrect API key provided: ***, api_key='***'" in compiled.report.rounds[-1].error
    texts = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any("sk-abcdef" in text or "hunter2" in text for text in texts)


def test_the_budget_stops_the_run_with_the_best_so_far(engine: FakeEngine) -> None:
    compiled = compile_(engine, budget=Budget(metric_calls=60))
    assert compiled.flag_compilation_error_occurred is False
    assert rounds(compiled) == [("", "complete"), ("p", "skipped")]
    assert compiled.report.metric_calls == 60
    assert compiled.report.rounds[1].ledger.generated_tokens > 0
    assert "The budget is used up: " in str(compiled.report.rounds[-1].error)
    assert len(engine.requests) <= 60 + 8 + 8


def test_a_larger_budget_goes_on(engine: FakeEngine, tmp_path: Path) -> None:
    compile_(engine, budget=Budget(metric_calls=60), run_dir=tmp_path / "run")
    compiled = compile_(engine, budget=Budget(metric_calls=100_000), run_dir=tmp_path / "run")
    assert {status for _, status in rounds(compiled)} == {"complete"}


def test_calls_that_were_under_way_when_the_budget_ended_count_in_the_next_call(tmp_path: Path) -> None:
    judged = 0

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        nonlocal judged
        judged += 1
        return parity_match(example, prediction)

    for limit in (25, 40, 55):
        engine = parity_engine(learner, concurrency=8, delay_s=lambda request: 0.02)
        p = BootstrapFewShotRS(metric, num_candidates=2, num_samples=0, rescue=False)
        options: dict[str, Any] = {"budget": Budget(metric_calls=limit), "run_dir": tmp_path / "run"}
        compile_(engine, "p", metric=metric, optimizers={"p": p}, **options)
        spent = json.loads((tmp_path / "run" / "run.json").read_text())["spent"]
        assert limit <= spent["metric_calls"] == judged


def test_a_budget_of_trained_tokens_stops_between_rounds(engine: FakeEngine) -> None:
    compiled = compile_(engine, "w -> p", budget=Budget(tokens=20_000))
    assert rounds(compiled)[-1][1] == "skipped"


def test_a_metric_above_one_without_thresholds_ends_the_run_before_any_step(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"the steps \['p', 'w'\] take 1.0 as its full mark.*threshold="):
        compile_(engine, metric=lambda e, p, trace=None: 100.0 * parity_match(e, p))
    assert engine.trainings == []


def test_a_metric_below_zero_by_which_failing_would_be_best_ends_the_run_before_any_step(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"The metric gave -1 on the valset, .* whose worst score is 0"):
        compile_(engine, metric=lambda e, p, trace=None: parity_match(e, p) - 1.0)
    assert engine.trainings == []


def test_a_score_that_is_below_zero_by_rounding_ends_nothing() -> None:
    compiled = compile_(
        parity_engine(lambda *_: True), "p", metric=lambda e, p, trace=None: parity_match(e, p) - 1.0000001
    )
    assert rounds(compiled) == [("", "complete"), ("p", "complete")]


@pytest.mark.parametrize(("full", "threshold"), [(1.0000001, None), (100.0, 100)])
def test_a_full_mark_that_is_above_one_by_rounding_or_by_its_threshold_ends_nothing(
    full: float, threshold: Any
) -> None:
    metric = lambda e, p, trace=None: full * parity_match(e, p)  # noqa: E731
    optimizers = {"p": BootstrapFewShotRS(metric, threshold=threshold, num_candidates=0)}
    compiled = compile_(parity_engine(lambda *_: True), "p", metric=metric, optimizers=optimizers)
    assert rounds(compiled) == [("", "complete"), ("p", "complete")]
    warning = f"each of the 20 examples has the full score {full:.0f}: nothing is left to gain"
    assert warning in compiled.report.warnings[0]


def test_a_metric_above_one_with_thresholds_is_scored_in_its_unit(engine: FakeEngine) -> None:
    percent = lambda e, p, trace=None: 100.0 * parity_match(e, p)  # noqa: E731
    optimizers = {"p": BootstrapFewShotRS(percent, threshold=100), "w": LoRAFinetune(percent, threshold=100)}
    compiled = compile_(engine, metric=percent, optimizers=optimizers)
    assert {status for _, status in rounds(compiled)} == {"complete"}
    assert all(0 <= record.score <= 100 for record in compiled.report.rounds)
    assert max(record.score for record in compiled.report.rounds) > 1


def test_a_metric_above_one_needs_no_threshold_where_steps_learn_from_scores_as_they_are(engine: FakeEngine) -> None:
    class Rewarded(BootstrapFewShotRS):
        learns_from_solved = False

    five = lambda e, p, trace=None: 5.0  # noqa: E731
    compiled = compile_(engine, "a", metric=five, optimizers={"a": Rewarded(five, threshold=5)})
    assert rounds(compiled) == [("", "complete"), ("a", "complete")]
    assert "each of the 20 examples scores 5, so nothing can be told apart by it" in compiled.report.warnings[0]


def test_a_student_that_raises_on_too_many_examples_ends_the_run() -> None:
    def broken(e: Any, p: Any, trace: Any = None) -> float:
        raise KeyError("gold")

    with pytest.raises(TooManyErrors, match="KeyError: 'gold'"):
        compile_(parity_engine(learner), metric=broken, max_errors=3)


def test_events_come_in_order_with_the_records_already_on_disk(engine: FakeEngine, tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_run_start(self, event: Any) -> None:
            self.seen.append(("run_start", list(event["rounds"])))

        def on_step_start(self, event: Any) -> None:
            self.seen.append(("start", event["index"], event["strategy"]))

        def on_step_end(self, event: Any) -> None:
            lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
            last = StepRecord.from_dict(json.loads(lines[-1]))
            assert last.strategy == event["record"].strategy
            self.seen.append(("end", event["record"].index, event["record"].status))

        def on_run_end(self, event: Any) -> None:
            self.seen.append(("run_end", event["error"]))

    watch = Watch()
    compile_(engine, "p -> w", callbacks=[watch], run_dir=tmp_path / "run")
    assert watch.seen == [
        ("run_start", ["", "p", "p -> w"]),
        ("start", 0, ""),
        ("end", 0, "complete"),
        ("start", 1, "p"),
        ("end", 1, "complete"),
        ("start", 2, "p -> w"),
        ("end", 2, "complete"),
        ("run_end", None),
    ]


def test_the_report_does_not_depend_on_the_timing_of_threads(tmp_path: Path) -> None:
    def report(number: int) -> Any:
        engine = parity_engine(learner, delay_s=lambda r: number * (hash((r.user, r.seed, number)) % 7) / 4000)
        run_dir = tmp_path / str(number)
        return comparable(compile_(engine, num_threads=4 + number, seed=5, run_dir=run_dir).report, run_dir)

    first = report(0)
    assert report(1) == first
    assert report(2) == first


def test_the_run_directory_holds_report_records_adapters_and_html(engine: FakeEngine, tmp_path: Path) -> None:
    compiled = compile_(engine, "w", run_dir=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert CompileReport.from_dict(saved).selected == compiled.report.selected
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is not None
    assert (tmp_path / "run" / "adapters" / compiled.lm.model.partition("/")[2]).is_dir()
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
