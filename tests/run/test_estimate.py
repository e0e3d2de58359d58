"""What `estimate` says before a run, against what the run takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import (
    PaidLM,
    Parity,
    learner,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    reply,
    right,
    two_step_engine,
    two_step_program,
    wrong,
)
from small_models import save_model

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    PolicyFinetune,
    PreferenceFinetune,
    TrainingConfig,
    local_lm,
)
from bettertogether.errors import StrategyError
from bettertogether.files import adapters_cache
from bettertogether.programs.program import prompts_state
from bettertogether.records import Ledger
from bettertogether.rollouts.tries import Sampling
from bettertogether.run.estimate import Estimate, _price
from bettertogether.run.probe import EXAMPLES, TEACHER_EXAMPLES, Probe, Sample
from bettertogether.steps.race import expected_calls
from bettertogether.steps.step import StepContext
from bettertogether.steps.training_probe import TrainingCosts
from bettertogether.steps.work import ExpectedTries, Outlook, Work
from bettertogether.testing import FakeEngine, FakeRequest
from bettertogether.training.auto import auto_epochs

TRAIN, VAL = numbers(20), numbers(16, start=100)
HALF = Outlook(solved=0.5, again=0.5, hinted=1.0, learned=None)


def better_together(**options: Any) -> BetterTogether:
    return BetterTogether(
        parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=2), w=LoRAFinetune(parity_match, **options)
    )


def estimate(program: dspy.Module, **options: Any) -> Estimate:
    return better_together().estimate(program, **{"trainset": TRAIN, "valset": VAL, **options})


def test_the_training_of_an_estimate_is_where_other_machines_see_it_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_nodes = tmp_path / "two_nodes.yaml"
    machines = "num_processes: 2\nnum_machines: 2\nmain_process_ip: node0\nmain_process_port: 29500\n"
    two_nodes.write_text(f"distributed_type: MULTI_CPU\nuse_cpu: true\n{machines}")
    folders: list[Path] = []
    finetune = FakeEngine.finetune

    def noted(*args: Any, **options: Any) -> Any:
        folders.append(options["folder"])
        return finetune(*args, **options)

    monkeypatch.setattr(FakeEngine, "finetune", noted)
    training = TrainingConfig(accelerate_config=two_nodes, launch_command=["srun"])
    program = parity_program(parity_engine(learner))
    better_together(training=training).estimate(program, trainset=TRAIN, valset=VAL, strategy="w")
    (folder,) = folders
    assert folder.parent == adapters_cache()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("strategy", "knows"),
    [("p -> w -> p", learner), ("p -> w", lambda request, number: True)],
    ids=["some are solved", "all are solved"],
)
def test_a_run_takes_no_less_and_no_more_than_was_estimated(
    strategy: str, knows: Callable[[FakeRequest, int], bool]
) -> None:
    program = parity_program(parity_engine(knows))
    said = estimate(program, strategy=strategy)
    compiled = better_together().compile(program, trainset=TRAIN, valset=VAL, strategy=strategy, progress=False)
    assert [each.name for each in said.rounds] == [record.name for record in compiled.report.rounds]
    for each, record in zip(said.rounds, compiled.report.rounds, strict=True):
        for name in ("lm_calls", "prompt_tokens", "generated_tokens", "trained_tokens"):
            low, taken, high = (getattr(ledger, name) for ledger in (each.low, record.ledger, each.high))
            assert low <= taken <= high, (each.name, name)


@pytest.mark.parametrize(
    ("strategy", "second", "calls"),
    [(["p -> w", "w -> p"], "w", (16, 16, 16)), (["w -> p", "p -> w"], "p", (0, 38, 48))],
    ids=str,
)
def test_what_one_strategy_of_a_list_ran_the_next_is_not_said_to_run_again(
    strategy: list[str], second: str, calls: tuple[int, ...]
) -> None:
    engine = parity_engine(lambda request, number: bool(request.trained_on) or number % 3 == 0)
    steps = {
        "p": BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False),
        "w": LoRAFinetune(parity_match, num_samples=0, rescue=False),
    }
    optimizer = BetterTogether(parity_match, **steps)
    options: dict[str, Any] = {"trainset": TRAIN, "valset": VAL, "strategy": strategy}
    said = optimizer.estimate(parity_program(engine), **options).rounds[3]
    taken = optimizer.compile(parity_program(engine), progress=False, **options).report.rounds[3]
    # The student ran on the whole trainset in the first strategy: here the valset is scored, or the prompts race on it.
    assert (said.name, taken.name) == (second, second)
    assert (said.low.lm_calls, said.likely.lm_calls, said.high.lm_calls) == calls
    assert taken.ledger.lm_calls == calls[-1]


def test_a_prompt_step_runs_on_no_example_of_the_trainset_that_the_student_ran_on() -> None:
    program = parity_program(parity_engine(learner))
    step = BootstrapFewShotRS(parity_match, num_candidates=0, max_labeled_demos=0, num_samples=0, rescue=False)
    train, validation = step.split(TRAIN, None, 0)
    for share, plain, raced in ((0.0, len(train), len(validation)), (1.0, 0, 0)):
        work = step.work(program, StepContext(TRAIN), replace(HALF, known=share, bare=share))
        assert (work.plain_runs, work.demo_runs) == (plain, raced)
        assert (work.given, work.bare) == (len(train), len(train))


def test_of_tuned_weights_a_prompt_step_races_the_best_prompts_at_other_strengths_too() -> None:
    program = parity_program(parity_engine(learner))
    step = BootstrapFewShotRS(parity_match, num_candidates=0, max_labeled_demos=0, strengths=(0.5, 0.75, 1))
    works = [step.work(program, StepContext(TRAIN, VAL), replace(HALF, is_tuned=tuned)) for tuned in (False, True)]
    assert [(work.demo_runs, work.prompts) for work in works] == [(len(VAL), 1), (3 * len(VAL), 3)]


def test_of_a_teacher_a_prompt_step_takes_the_runs_that_demos_come_from() -> None:
    program = parity_program(parity_engine(learner))
    step = BootstrapFewShotRS(parity_match, num_samples=0, rescue=False)
    work = step.work(program, StepContext(TRAIN, VAL, [program]), HALF)
    assert (work.teacher_runs, work.plain_runs) == (len(TRAIN), 0)


def test_at_least_further_tries_of_known_examples_are_known_too() -> None:
    runs = []
    for tried in (False, True):
        tries = ExpectedTries(replace(HALF, tried=tried), examples=16)
        Sampling(num_samples=1).carry_out(tries)
        runs.append((tries.runs, tries.unknown(16), tries.unknown(8)))
    assert runs == [(24, 8, 16), (24, 0, 12)]


def test_an_estimate_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path))
    engine = parity_engine(learner)
    program = parity_program(engine, cache=True)
    before = prompts_state(program)
    said = estimate(program)
    assert engine.dump_state()["adapters"] == []
    assert (prompts_state(program), list(tmp_path.iterdir())) == (before, [])
    assert len(engine.requests) == said.probe.lm_calls == 2 * EXAMPLES - 1
    program(number=TRAIN[0].number)
    assert len(engine.requests) == said.probe.lm_calls + 1


def test_an_estimate_says_the_range_of_each_round_and_of_all() -> None:
    lines = str(estimate(parity_program(parity_engine(learner)), strategy="p")).splitlines()
    assert lines[0].startswith("p: an estimate, from 31 runs and a few training steps (")
    assert lines[2].split("  ")[0] == "round"
    assert [line.split()[0] for line in lines[3:6]] == ["student", "p", "total"]
    assert lines[3].split()[1] == str(len(VAL))


def test_a_paid_teacher_costs_its_runs() -> None:
    teacher = dspy.Predict(Parity)
    teacher.set_lm(PaidLM(0.25))
    said = estimate(parity_program(parity_engine(learner)), teacher=teacher, strategy="w")
    # All are solved at once, those of the valset too that the loss is measured on.
    assert said.likely.cost == 0.25 * (len(TRAIN) + len(VAL))
    assert said.probe.cost == 0.25 * TEACHER_EXAMPLES
    assert "$9.00" in str(said)


def test_a_step_of_any_optimizer_is_told_to_be_a_guess() -> None:
    optimizer = BetterTogether(parity_match, g=dspy.BootstrapFewShot(metric=parity_match))
    said = optimizer.estimate(parity_program(parity_engine(learner)), trainset=TRAIN, valset=VAL, strategy="g")
    assert said.notes == ("g (BootstrapFewShot) is not ours: its range is a guess.",)
    assert (said.rounds[1].low.lm_calls, said.rounds[1].high.lm_calls) == (16, 20 * 36 + 16)


def test_with_auto_the_rounds_are_the_most_that_there_may_be() -> None:
    said = estimate(parity_program(parity_engine(learner)), strategy="auto", max_rounds=3)
    assert [each.name for each in said.rounds] == ["student", "p", "p -> w", "p -> w -> p"]
    assert "auto" in said.notes[0]


def test_what_compile_refuses_an_estimate_refuses() -> None:
    with pytest.raises(StrategyError):
        estimate(parity_program(parity_engine(learner)), strategy="q")


def test_expected_tries_are_those_of_a_real_schedule() -> None:
    tries = ExpectedTries(HALF, examples=16, hints=1)
    Sampling(num_samples=2).carry_out(tries)
    # 16, then 8 and 4 unsolved, then a hint for 2 which solves them.
    assert (tries.runs, tries.solved) == (16 + 8 + 4 + 2, 16)


def test_branches_of_a_frozen_predictor_and_of_a_loop_are_counted_as_they_are_made() -> None:
    class Loop(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.note = dspy.Predict("number: int, notes: list[str] -> note: str")
            self.decide = dspy.Predict("number: int, notes: list[str] -> parity: str")

        def forward(self, number: int) -> dspy.Prediction:
            notes: list[str] = []
            for _ in range(8):
                notes.append(self.note(number=number, notes=list(notes)).note)
            return self.decide(number=number, notes=notes)

    def answer(request: FakeRequest) -> str:
        if "`note`" in request.system.split("output fields")[1]:
            return reply(request, note=f"note {request.seed}")
        known = request.temperature == 0 or (request.seed or 0) % 2 == 0
        return reply(request, parity=(right if known else wrong)(number_of(request)))

    program = Loop()
    program.set_lm(plain_lm(FakeEngine(answer)))
    optimizer = BetterTogether(parity_match, r=PreferenceFinetune(parity_match, num_samples=2, frozen=["note"]))
    options: dict[str, Any] = {"trainset": numbers(6), "valset": numbers(4, start=100), "strategy": "r"}
    said = optimizer.estimate(program, **options).rounds[1]
    taken = optimizer.compile(program, progress=False, **options).report.rounds[1].ledger.lm_calls
    # Six runs, and ten of which the notes 1, 4 and 8 and the decision are answered anew twice; four are scored.
    assert taken == 6 * 9 + 10 * 2 * (9 + 6 + 2 + 1) + 4 * 9
    assert said.low.lm_calls == said.likely.lm_calls == said.high.lm_calls == taken


def step_work(count: int, **options: Any) -> Work:
    program = two_step_program(two_step_engine(lambda *_: True))
    outlook = Outlook(solved=1.0, again=0.0, hinted=0.0, learned=1.0, calls=2.0)
    return LoRAFinetune(parity_match, **options).work(program, StepContext(numbers(count)), outlook)


def test_each_of_several_adapters_has_a_training_of_its_own() -> None:
    together, apart = (step_work(40, multitask=multitask) for multitask in (True, False))
    assert (together.trainings, apart.trainings) == (1, 2)
    assert together.trained_rows == auto_epochs(72, 8, held_out=True) * 72
    assert apart.trained_rows == 2 * auto_epochs(36, 8, held_out=True) * 36


@pytest.mark.parametrize(("count", "rows"), [(19, 38), (20, 32)])
def test_as_many_rows_are_expected_to_be_held_out_as_a_training_holds_out(count: int, rows: int) -> None:
    work = step_work(count, training=TrainingConfig(epochs=1))
    assert (work.trained_rows, work.held_out_rows) == (rows, 2 * (2 * count - rows))


def test_a_limit_on_minutes_is_of_each_training_and_of_no_policys() -> None:
    runs, limit = Sample(Ledger(), 1, 1), TrainingConfig(max_minutes=1)
    costs = TrainingCosts(row_tokens=10, row_s=1.0, held_out_row_s=0.0, set_up_s=5.0, most_s=60.0)
    measured = Probe(runs, runs, None, 0.0, 0.0, (True,), False, {}, {"w": costs}, Ledger(), None, None)
    cost = [_price(measured, Work(trained_rows=rows, trainings=2), ("w",)).seconds for rows in (20, 1000)]
    assert cost == [20 + 2 * 5, 2 * 60]
    assert PolicyFinetune(parity_match, training=limit).timed.training.max_minutes is None
    assert LoRAFinetune(parity_match, training=limit).timed.training.max_minutes == 1


def test_expected_tries_go_on_where_few_are_solved() -> None:
    tries = ExpectedTries(Outlook(solved=0, again=0, hinted=0, learned=None), examples=10, hints=1)
    Sampling(num_samples=4, enough=1).carry_out(tries)
    assert tries.runs == 10 + 8 * 10 + 10


def test_a_race_is_expected_to_end_early_only_where_one_is_better() -> None:
    assert expected_calls(5, 40, (1.0, 0.0)) == 4 * 8 + 40
    assert expected_calls(5, 40, (0.0, 0.0)) == expected_calls(5, 40, (1.0, 0.0), race=False) == 5 * 40


def test_a_real_training_is_timed_and_its_adapter_forgotten(tmp_path: Path) -> None:
    lm = local_lm(save_model(tmp_path / "model"), max_tokens=64)
    program = dspy.Predict(Parity)
    program.set_lm(lm)
    optimizer = better_together(training=TrainingConfig(epochs=2, batch_size=4))
    with dspy.context(adapter=dspy.JSONAdapter()):
        said = optimizer.estimate(program, trainset=TRAIN, valset=VAL, strategy="w")
    assert lm.engine.adapter_folders() == []
    assert said.rounds[1].likely.trained_tokens > 0
    assert said.rounds[1].likely.seconds > 0
    assert said.memory_gib is not None


def test_a_training_that_no_run_shows_is_not_counted() -> None:
    program = parity_program(FakeEngine(lambda request: "nonsense"))
    said = estimate(program, strategy="w", trainset=numbers(8))
    assert said.notes == ("w: no run of the probe could be learned from, so its training is not counted.",)
    assert said.high.trained_tokens == 0


def test_a_ledger_is_scaled_with_its_cost() -> None:
    assert Ledger(lm_calls=3, seconds=2.0, cost=1.0).times(1.5) == Ledger(lm_calls=4, seconds=3.0, cost=1.5)
