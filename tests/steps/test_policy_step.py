"""The policy step: a program learns what its metric rewards, only where it may, and goes on after a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import TrainingWatch
from policy_programs import (
    FADING,
    POLICY,
    QUICK,
    SHORT,
    Picks,
    Twice,
    details_of,
    is_a,
    program_of,
    rewards_of,
    tuned,
    words,
)
from safetensors.torch import load_file
from small_models import save_adapter

from bettertogether import BetterTogether, Budget, PolicyConfig, PolicyFinetune
from bettertogether.callbacks import Callback, events
from bettertogether.engines import TransformersEngine
from bettertogether.errors import NoTrainingDataError, TrainingError
from bettertogether.programs.program import model_names
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import Trace
from bettertogether.steps.policy_groups import Groups
from bettertogether.steps.policy_run import PATIENCE, PolicyRun, RunState
from bettertogether.steps.step import StepContext
from bettertogether.steps.work import Outlook


def test_a_program_learns_the_letter_that_is_rewarded(engine: TransformersEngine, tmp_path: Path) -> None:
    step, student, watcher = PolicyFinetune(is_a, folder=tmp_path, **QUICK), program_of(engine), TrainingWatch()
    assert student(word="w9").letter != "a"
    with events.listening([watcher]):
        program = tuned(step, student)
    assert program(word="w9").letter == "a"
    assert student(word="w9").letter != "a"
    none, first, *_, last = rewards_of(step)
    assert none is None
    assert first is not None
    assert last is not None
    assert first < 0.3 < 0.6 < last
    details = details_of(step)
    assert [line.held_out_score for line in details.history] == [0.0, None, None, 1.0]
    assert (details.best_step, details.held_out_examples, list(details.adapters)) == (3, 4, [program.lm.model])
    assert [event["rewards"] for event in watcher.events] == list(details.history[1:])
    assert watcher.events[-1]["progress"].tokens == step.ledger.trained_tokens > 0
    assert (step.ledger.program_calls, step.step_gain) == (3 * 12 + 2 * 4, None)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [program.lm.model.partition("/")[2]]


def test_without_a_valset_its_gain_is_the_rise_of_the_score_on_examples_held_out(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    step = PolicyFinetune(lambda e, p, trace=None: 0.5 + 0.5 * is_a(e, p), folder=tmp_path, **QUICK)
    tuned(step, program_of(engine), trainset=words(24), valset=None)
    assert [line.held_out_score for line in details_of(step).history] == [0.5, None, None, 1.0]
    assert (details_of(step).held_out_examples, step.step_gain) == (4, 0.5)


def test_of_two_modules_each_learns_in_an_adapter_of_its_own(engine: TransformersEngine, tmp_path: Path) -> None:
    step = PolicyFinetune(is_a, folder=tmp_path, multitask=False, **QUICK)
    program = tuned(step, program_of(engine, Twice))
    assert len(set(model_names(program).values())) == 2
    trained_from = [adapter.trained_from for adapter in details_of(step).adapters.values()]
    assert trained_from == [f"local/{engine.base_name} first", f"local/{engine.base_name} second"]
    assert [line.groups for line in details_of(step).history] == [0, 4, 4, 4]
    assert program(word="w9").letter == "a"


class Sometimes(Twice):
    """Its second predictor is asked of one word alone."""

    def forward(self, word: str) -> dspy.Prediction:
        return super().forward(word) if word == "rare" else self.first(word=word)


def test_an_adapter_whose_predictor_is_not_called_stays_unmoved_beside_one_that_learns(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    step = PolicyFinetune(is_a, folder=tmp_path, multitask=False, **QUICK)
    program = tuned(step, program_of(engine, Sometimes))
    assert program(word="w9").letter == "a"
    tensors = {
        name.partition(".")[0]: load_file(adapter_folder / "adapter_model.safetensors")
        for name, adapter_folder in ((n, engine.adapter_folder(m)) for n, m in model_names(program).items())
        if adapter_folder is not None
    }
    moved = {
        name: any(bool(tensor.any()) for key, tensor in held.items() if "lora_B" in key)
        for name, held in tensors.items()
    }
    assert moved == {"first": True, "second": False}


def test_a_frozen_module_stays_as_it_was(engine: TransformersEngine, tmp_path: Path) -> None:
    step = PolicyFinetune(is_a, folder=tmp_path, frozen=["first"], **SHORT)
    program = tuned(step, program_of(engine, Twice))
    assert model_names(program) == {
        "first": f"local/{engine.base_name}",
        "second": next(iter(details_of(step).adapters)),
    }
    assert [line.groups for line in details_of(step).history] == [0, 2, 2]


def test_in_groups_by_branch_each_call_of_a_run_is_answered_anew(engine: TransformersEngine, tmp_path: Path) -> None:
    policy = PolicyConfig(**{**POLICY, "group_by": "branch"})
    step, student = PolicyFinetune(is_a, folder=tmp_path, **{**QUICK, "policy": policy}), program_of(engine, Twice)
    program = tuned(step, student, valset=None)
    assert program(word="w9").letter == "a"
    # Of each example one run, and five new answers to each of its two calls.
    assert step.ledger.program_calls == 3 * 2 * (1 + 2 * 5)
    assert [(line.examples, line.groups) for line in details_of(step).history[1:]] == [(2, 4)] * 3
    outlook = Outlook(0.5, 0.2, 1.0, None, branch_runs={"first": 1.0, "second": 0.5})
    assert step.work(student, StepContext(words(4)), outlook).plain_runs == 3 * 2 * (1 + 5 * 1.5)


class Killer(Callback):
    """Interrupts in the middle of the runs of a step."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def on_progress(self, event: events.ProgressEvent) -> None:
        if event["phase"] == self.phase and event["done"] == 5:
            raise KeyboardInterrupt


def test_after_a_kill_in_the_middle_of_a_step_the_same_call_ends_with_the_same_adapters(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    def step(folder: str) -> PolicyFinetune:
        return PolicyFinetune(is_a, folder=tmp_path / folder, multitask=False, **SHORT)

    whole = step("whole")
    expected = model_names(tuned(whole, program_of(engine, Twice)))
    killed = step("killed")
    with pytest.raises(KeyboardInterrupt), events.listening([Killer("step 2 of 2")]):
        tuned(killed, program_of(engine, Twice))
    before = engine.counters()["requests"]
    resumed = step("killed")
    assert model_names(tuned(resumed, program_of(engine, Twice))) == expected
    # The runs and the scoring of the last step, two calls each.
    assert engine.counters()["requests"] - before == 2 * (12 + 4)
    assert rewards_of(resumed) == rewards_of(whole)
    assert resumed.ledger.program_calls == whole.ledger.program_calls
    assert sorted(path.name for path in (tmp_path / "killed").iterdir() if path.is_dir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir() if path.is_dir()
    )


def test_a_budget_ends_it_between_two_steps_and_a_larger_one_goes_on(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    def compiled(budget: Budget | None, run_dir: str) -> dspy.Module:
        optimizer = BetterTogether(is_a, r=PolicyFinetune(is_a, **SHORT))
        return optimizer.compile(
            program_of(engine),
            trainset=words(4),
            valset=words(4, start=4),
            strategy="r",
            run_dir=tmp_path / run_dir,
            budget=budget,
            progress=False,
        )

    whole = compiled(None, "whole")
    short = compiled(Budget(metric_calls=4 + 4 + 12 + 3), "short")
    assert "The budget is used up" in str(short.report)
    longer = compiled(Budget(metric_calls=1000), "short")
    assert model_names(longer) == model_names(whole)
    spent = [json.loads((tmp_path / name / "run.json").read_text())["spent"] for name in ("whole", "short")]
    # What the first call trained is not charged again.
    assert spent[0]["trained_tokens"] == spent[1]["trained_tokens"] > 0
    assert "reward 0." in str(longer.report)
    assert "in 2 steps; score on 4 examples held out 0.000 -> " in str(longer.report)
    assert "Mean reward" in (tmp_path / "short" / "report.html").read_text()


def test_demos_fade_from_all_runs_to_none_and_the_tuned_program_has_none(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, int]] = []
    complete = engine.complete

    def noted(request: Any) -> Any:
        asked.append((request.config.temperature, sum(message.role == "assistant" for message in request.messages)))
        return complete(request)

    monkeypatch.setattr(engine, "complete", noted)
    student = program_of(engine)
    student.demos = [dspy.Example(word="x", letter="a").with_inputs("word")]
    step = PolicyFinetune(is_a, folder=tmp_path, validation_share=0, **FADING)
    program = tuned(step, student)
    demos = [demos for _, demos in asked]
    assert [sum(demos[start : start + 12]) for start in (0, 12, 24)] == [12, 6, 0]
    assert program.demos == []
    assert {temperature for temperature, _ in asked} == {1.0}


def test_fading_demos_that_are_worth_more_than_the_training_stay(engine: TransformersEngine, tmp_path: Path) -> None:
    class Shown(Picks):
        def forward(self, word: str) -> dspy.Prediction:
            return dspy.Prediction(letter=self.pick(word=word).letter, demos=len(self.pick.demos))

    def by_demos(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return 0.5 * prediction.demos + 0.25 * is_a(example, prediction)

    student = program_of(engine, Shown)
    student.pick.demos = [dspy.Example(word="x", letter="b").with_inputs("word")]
    step = PolicyFinetune(by_demos, folder=tmp_path, **FADING)
    program = tuned(step, student)
    assert [line.held_out_score for line in details_of(step).history] == [0.5, None, None, 0.25]
    assert program.pick.demos == student.pick.demos
    assert model_names(program) == model_names(student)


def test_what_is_solved_with_demos_is_learned_as_they_fade(engine: TransformersEngine, tmp_path: Path) -> None:
    class Helped(Picks):
        def forward(self, word: str) -> dspy.Prediction:
            letter = self.pick(word=word).letter
            return dspy.Prediction(letter="a" if self.pick.demos else letter)

    student = program_of(engine, Helped)
    student.pick.demos = [dspy.Example(word="x", letter="a").with_inputs("word")]
    step = PolicyFinetune(is_a, folder=tmp_path, validation_share=0, **FADING)
    program = tuned(step, student)
    assert [line.kept_groups > 0 for line in details_of(step).history[1:]] == [False, True, True]
    assert program.pick.demos == []
    assert model_names(program) != model_names(student)


def test_where_no_demos_fade_a_first_step_without_differences_is_an_error(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    step = PolicyFinetune(lambda e, p, trace=None: 1.0, folder=tmp_path, **FADING)
    with pytest.raises(NoTrainingDataError, match="There is nothing to learn from"):
        tuned(step, program_of(engine))


def test_examples_whose_runs_are_alike_are_replaced_by_others(engine: TransformersEngine, tmp_path: Path) -> None:
    def only_w1(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return float(example.word != "w1" or prediction.letter == "a")

    policy = PolicyConfig(**{**POLICY, "steps": 2, "most_draws": 2})
    step = PolicyFinetune(only_w1, folder=tmp_path, validation_share=0, **{**QUICK, "policy": policy})
    tuned(step, program_of(engine))
    assert [(line.examples, line.kept_groups, line.groups) for line in details_of(step).history[1:]] == [(4, 1, 4)] * 2


def test_what_does_worse_than_before_is_not_taken_and_adapter_and_demos_stay_as_they_were(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    def is_d_when_scored(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return float(prediction.letter == ("d" if example.word > "w3" else "a"))

    student = program_of(engine)
    student.lm.model = engine.add_adapter(save_adapter(tmp_path / "before", seed=0))
    student.demos = [dspy.Example(word="x", letter="a").with_inputs("word")]
    step = PolicyFinetune(is_d_when_scored, folder=tmp_path / "after", start_from="base", **FADING)
    program = tuned(step, student)
    assert (program.lm.model, program.demos) == (student.lm.model, student.demos)
    assert details_of(step).best_step == 0
    assert re.search(r"No step scored as high .* \(1\.000\): the program is given back as it was", step.warnings[0])


def test_of_steps_that_score_the_same_but_for_rounding_the_last_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, [], [], is_a, PolicyConfig(), RunSettings(), tmp_path, "run")
    run.state = RunState(step=5, best_step=0, best_score=0.1 + 0.2 + 0.3)
    monkeypatch.setattr(run, "_score", lambda step: 0.3 + 0.2 + 0.1)
    run._scored()
    assert run.state.best_step == 5
    monkeypatch.setattr(run, "_score", lambda step: 0.5)
    run.state = replace(run.state, step=6)
    run._scored()
    assert run.state.best_step == 5


def test_it_ends_after_three_steps_in_a_row_whose_runs_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PolicyConfig(steps=9)
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, words(1), [], is_a, policy, RunSettings(), tmp_path, "run")
    trace, kept = Trace(0, dspy.Example(), None, (), Verdict(1.0, True), "sample"), iter([1, 0, 0, 1, 0, 0, 0])
    monkeypatch.setattr(run, "_runs", lambda: ([trace], Groups({}, next(kept), 1, frozenset())))
    assert run.run().step == 7


@pytest.mark.parametrize(
    ("held_out", "score", "fade", "steps"),
    [
        (1.0, 1.0, False, 4),
        (0.9, 1.0, False, 9),
        (1.0, 2.0, False, 9),
        (1.5, 1.0, False, 9),
        (None, 1.0, False, 9),
        (1.0, 1.0, True, 9),
    ],
)
def test_where_the_examples_held_out_are_solved_it_ends_when_runs_of_hardly_any_example_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: float | None, score: float, fade: bool, steps: int
) -> None:
    policy = PolicyConfig(steps=9, score_every=1, fade_demos=fade)
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, words(1), [], is_a, policy, RunSettings(), tmp_path, "run")
    vars(run)["_fades"] = fade
    traces = [Trace(i, dspy.Example(), None, (), Verdict(score, True), "sample") for i in range(5)]
    differ = iter([{0, 1}, {0}, {0}, {0}, *[{0}] * 5])
    monkeypatch.setattr(run, "_runs", lambda: (traces, Groups({}, 1, 4, frozenset(next(differ)))))
    monkeypatch.setattr(run, "_score", lambda step: held_out)
    assert run.run().step == steps


@pytest.mark.parametrize("content", ["{", "{}", "[]", "null", '{"schema": 1, "run": "run", "step": "x"}'])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_delete(tmp_path: Path, content: str) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "state.json").write_text(content)
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, [], [], is_a, PolicyConfig(), RunSettings(), tmp_path, "run")
    with pytest.raises(TrainingError, match=r"The checkpoint in .*step-1 is damaged .*: delete .* and train again"):
        run.run()


def test_a_checkpoint_that_was_deleted_in_part_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-2").mkdir()
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, [], [], is_a, PolicyConfig(), RunSettings(), tmp_path, "run")
    run.state = RunState(idle=PATIENCE)
    assert run.run().step == 0


def test_no_two_runs_of_a_training_have_the_same_number(tmp_path: Path) -> None:
    policy = PolicyConfig(group_size=3)
    run = PolicyRun(lambda _: dspy.Module(), {}, {}, [], [], is_a, policy, RunSettings(), tmp_path, "run")
    numbers = []
    for step in (1, 2, 3):
        run.state = RunState(step=step)
        numbers += [run._attempt(number).number for number in range(3)]
    assert numbers == list(range(1, 10))


def test_its_work_is_the_runs_of_all_steps_and_the_scores(engine: TransformersEngine) -> None:
    policy = PolicyConfig(**{**POLICY, "most_draws": 2})
    step, program = PolicyFinetune(is_a, policy=policy), program_of(engine)
    context = StepContext(words(40), words(4, start=40))
    least, most = (step.work(program, context, Outlook(0.5, 0.2, 1.0, None, patience=share)) for share in (0.0, 1.0))
    assert (least.plain_runs, most.plain_runs) == (3 * 2 * 6 + 2 * 4, 3 * 4 * 6 + 2 * 4)
    assert (least.trained_rows, least.trainings) == (3 * 2 * 6, 1)


def held_out(step: PolicyFinetune, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example]) -> tuple[int, int]:
    learned, scored = step._split(trainset, valset, 0)
    return len(learned), len(scored)


def test_the_best_step_is_chosen_on_part_of_a_large_trainset_or_on_the_valset() -> None:
    step = PolicyFinetune(is_a)
    assert held_out(step, words(200), words(50, start=200)) == (180, 20)
    assert held_out(step, words(40), words(50, start=200)) == (40, 16)
    assert held_out(step, words(40), ()) == (36, 4)
    assert held_out(step, words(10), ()) == (10, 0)
    assert held_out(PolicyFinetune(is_a, validation_share=0), words(200), words(50, start=200)) == (200, 0)


def test_an_estimate_counts_its_runs_and_its_training_whatever_the_scale_of_the_metric(
    engine: TransformersEngine,
) -> None:
    def of_ten(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        return 10 - 5 * is_a(example, prediction)

    optimizer = BetterTogether(of_ten, r=PolicyFinetune(of_ten, **SHORT))
    found = optimizer.estimate(program_of(engine), trainset=words(40), valset=words(4, start=40), strategy="r")
    assert found.rounds[1].likely.program_calls == 2 * 2 * 6 + 2 * 4 + 4
    assert found.rounds[1].likely.trained_tokens > 0
    assert found.notes == ()
