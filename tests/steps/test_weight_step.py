"""The weight step trains adapters on the passing runs of a program, and the program answers with them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.experimental import Noul
from fakes import (
    TwoSteps,
    api_lm,
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
)
from parity_step import step

from bettertogether import BetterTogether
from bettertogether.errors import (
    ConfigError,
    DataError,
    NoTrainingDataError,
    NotTrainableError,
    ProgramError,
    TooManyErrors,
)
from bettertogether.programs.program import prompts_state
from bettertogether.records import Blame, WeightDetails
from bettertogether.steps.preference_step import PreferenceFinetune
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest
from bettertogether.training.config import LoRAConfig, TrainingConfig


def test_the_tuned_program_answers_with_an_adapter_trained_on_its_passing_runs() -> None:
    engine = parity_engine(learner)
    compiled = step().compile(parity_program(engine), trainset=numbers(9))
    assert compiled.lm.model.startswith("local/fake@r1-")
    assert [row.completion for row in engine.trainings[0]] == [
        "[[ ## parity ## ]]\n" + ("even" if n % 2 == 0 else "odd") + "\n\n[[ ## completed ## ]]\n" for n in (0, 3, 6)
    ]
    assert compiled(number=7).parity == "odd"
    assert engine.requests[-1].trained_on == 3


def test_the_student_is_not_changed() -> None:
    program = parity_program(parity_engine(learner))
    program.demos = numbers(2)
    lm, state = program.lm, prompts_state(program)
    step().compile(program, trainset=numbers(9))
    assert (program.lm, prompts_state(program), program._compiled) == (lm, state, False)
    assert program.lm.model == "local/fake"


def test_the_tuned_lm_keeps_the_options_of_the_lm() -> None:
    compiled = step().compile(parity_program(parity_engine(learner), max_tokens=77), trainset=numbers(9))
    assert compiled.lm.kwargs == {"temperature": 0.0, "max_tokens": 77}


def test_multitask_trains_one_adapter_on_the_calls_of_all_predictors() -> None:
    engine = two_step_engine(lambda *_: True)
    compiled = step().compile(two_step_program(engine), trainset=numbers(5))
    assert [len(rows) for rows in engine.trainings] == [10]
    assert compiled.remark.lm is compiled.decide.lm


def test_multitask_false_trains_one_adapter_a_predictor_on_its_own_calls() -> None:
    engine = two_step_engine(lambda *_: True)
    compiled = step(multitask=False).compile(two_step_program(engine), trainset=numbers(5))
    assert [len(rows) for rows in engine.trainings] == [5, 5]
    remark, decide = ({row.completion.split(" ## ]]")[0] for row in rows} for rows in engine.trainings)
    assert (remark, decide) == ({"[[ ## remark"}, {"[[ ## parity"})
    assert compiled.remark.lm.model != compiled.decide.lm.model
    assert compiled.remark.lm.engine is compiled.decide.lm.engine


def test_multitask_false_trains_the_right_predictor_when_one_is_called_twice_and_in_another_order() -> None:
    class Other(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            first = self.decide(number=number, remark="none").parity
            self.remark(number=number)
            return self.decide(number=number, remark=first)

    engine = two_step_engine(lambda *_: True)
    program = Other()
    program.set_lm(plain_lm(engine))
    step(multitask=False).compile(program, trainset=numbers(4))
    by_field = [{row.completion.split(" ## ]]")[0] for row in rows} for rows in engine.trainings]
    assert sorted(map(sorted, by_field)) == [["[[ ## parity"], ["[[ ## remark"]]
    assert sorted(len(rows) for rows in engine.trainings) == [4, 8]


def test_two_local_lms_are_each_trained_on_their_own_predictors_rows() -> None:
    small, large = two_step_engine(lambda *_: True), two_step_engine(lambda *_: True, base_name="large")
    program = two_step_program(small)
    program.decide.lm = plain_lm(large)
    compiled = step().compile(program, trainset=numbers(3))
    assert [{row.completion.split(" ## ]]")[0] for row in e.trainings[0]} for e in (small, large)] == [
        {"[[ ## remark"},
        {"[[ ## parity"},
    ]
    assert compiled.remark.lm.model.startswith("local/fake@")
    assert compiled.decide.lm.model.startswith("local/large@")


def test_two_engines_of_one_name_are_each_trained_on_their_own_rows() -> None:
    first, second = two_step_engine(lambda *_: True), two_step_engine(lambda *_: True)
    program = two_step_program(first)
    program.decide.lm = plain_lm(second)
    compiled = step().compile(program, trainset=numbers(3))
    assert [len(engine.trainings) for engine in (first, second)] == [1, 1]
    assert compiled(number=2).parity == "even"


def test_two_lms_of_one_engine_with_other_options_share_an_adapter_and_keep_their_options() -> None:
    engine = two_step_engine(lambda *_: True)
    program = two_step_program(engine)
    program.decide.lm = plain_lm(engine, max_tokens=9)
    compiled = step().compile(program, trainset=numbers(3))
    assert len(engine.trainings) == 1
    assert compiled.remark.lm.model == compiled.decide.lm.model
    assert [lm.kwargs["max_tokens"] for lm in (compiled.remark.lm, compiled.decide.lm)] == [None, 9]


def test_a_frozen_predictor_keeps_its_lm_and_its_demos() -> None:
    engine = two_step_engine(lambda *_: True)
    program = two_step_program(engine)
    program.remark.demos = [dspy.Example(number=1, remark="x")]
    compiled = step(frozen=["remark"]).compile(program, trainset=numbers(3))
    assert compiled.remark.lm is program.remark.lm
    assert len(compiled.remark.demos) == 1
    assert compiled.decide.lm.model != "local/fake"
    assert len(engine.trainings[0]) == 3


def test_the_name_of_a_module_freezes_the_predictors_in_it() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    program.remark = dspy.ChainOfThought("number -> remark")
    program.remarks = [dspy.Predict("number -> remark")]
    program.set_lm(program.decide.lm)
    frozen = step(frozen=["remark", "remarks"])
    assert {name for name, _ in program.named_predictors()} == {"decide", "remark.predict", "remarks[0]"}
    assert list(frozen.trainable(program)) == ["decide"]
    with pytest.raises(ConfigError, match=r"frozen=\['rem', 'remark.pre'\] are not predictors of the program, nor"):
        step(frozen=["rem", "remark.pre", "remark.predict"]).trainable(program)


def test_an_api_lm_is_left_alone() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    program.remark.lm = api_lm(lambda request: reply(request, remark="hm"))
    program.remark.demos = [dspy.Example(number=1, remark="x")]
    compiled = step().compile(program, trainset=numbers(3))
    assert compiled.remark.lm is program.remark.lm
    assert len(compiled.remark.demos) == 1
    assert compiled.decide.lm.model != "local/fake"


def test_a_program_with_api_lms_alone_is_an_error_that_says_what_to_use() -> None:
    program = TwoSteps()
    program.set_lm(api_lm(lambda _: ""))
    with pytest.raises(NotTrainableError, match=r"'remark' uses 'local/api'.*local_lm.*frozen"):
        step().compile(program, trainset=numbers(3))


def test_all_predictors_frozen_is_an_error() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    with pytest.raises(NotTrainableError, match="leaves no predictor to train"):
        step(frozen=["remark", "decide"]).compile(program, trainset=numbers(3))


@pytest.mark.parametrize("kind", [LoRAFinetune, PreferenceFinetune])
def test_a_decision_is_refused_before_any_work_and_left_alone_where_it_is_frozen(kind: Any) -> None:
    engine = two_step_engine(lambda *_: True)
    program = two_step_program(engine)
    program.decide.signature = dspy.Signature("number: int, remark: str -> parity: Noul", custom_types={"Noul": Noul})
    with pytest.raises(NotTrainableError, match=r"\['decide'\] make decisions.*frozen=\['decide'\]"):
        kind(parity_match).compile(program, trainset=numbers(4))
    assert engine.requests == []
    assert list(kind(parity_match, frozen=["decide"]).trainable(program)) == ["remark"]


def test_a_frozen_name_that_is_no_predictor_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match=r"frozen=\['nope'\] are not predictors.*\['decide', 'remark'\]"):
        step(frozen=["nope"]).compile(two_step_program(two_step_engine(lambda *_: True)), trainset=numbers(3))


def test_a_predictor_that_gave_no_rows_keeps_its_lm_and_its_demos() -> None:
    class Skips(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            return self.decide(number=number, remark="none")

    program = Skips()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    program.remark.demos = [dspy.Example(number=1, remark="x")]
    compiled = step(multitask=False).compile(program, trainset=numbers(3))
    assert compiled.remark.lm.model == "local/fake"
    assert len(compiled.remark.demos) == 1
    assert compiled.decide.lm.model != "local/fake"


@pytest.mark.parametrize(("train_prompt", "demos_left"), [("vanilla", 0), ("optimized", 2), ("mixed", 2)])
def test_demos_stay_in_the_prompt_when_they_were_trained_with(train_prompt: str, demos_left: int) -> None:
    program = parity_program(parity_engine(lambda *_: True))
    program.demos = numbers(2, start=50)
    compiled = step(train_prompt=train_prompt).compile(program, trainset=numbers(4))
    assert len(compiled.demos) == demos_left


def test_a_second_step_starts_from_the_base_weights() -> None:
    engine = parity_engine(lambda *_: True)
    first = step().compile(parity_program(engine), trainset=numbers(4))
    second = step().compile(first, trainset=numbers(4, start=10))
    assert second.lm.model.startswith("local/fake@r1-")
    second(number=1)
    assert engine.requests[-1].trained_on == 4


def test_a_second_step_goes_on_with_the_adapter_in_use_where_asked_to() -> None:
    engine = parity_engine(lambda *_: True)
    first = step().compile(parity_program(engine), trainset=numbers(4))
    second = step(start_from="current").compile(first, trainset=numbers(4, start=10))
    assert second.lm.model.startswith("local/fake@r2-")
    second(number=1)
    assert engine.requests[-1].trained_on == 8


def test_an_adapter_whose_folder_is_gone_is_not_trained_further_which_the_step_says_before_any_work(
    tmp_path: Path,
) -> None:
    engine = parity_engine(lambda *_: True)
    first = step().compile(parity_program(engine), trainset=numbers(4), folder=tmp_path / "first")
    optimizer = BetterTogether(parity_match, w=step(start_from="current"))
    first._compiled = False

    def run(name: str) -> dspy.Module:
        trainset, valset, run_dir = numbers(8), numbers(4, 20), tmp_path / name
        return optimizer.compile(first, trainset=trainset, valset=valset, strategy="w", run_dir=run_dir, progress=False)

    run("done")
    shutil.rmtree(tmp_path / "first")
    assert [record.status for record in run("done").report.rounds] == ["complete", "complete"]
    made = len(engine.requests)
    student, failed = run("another").report.rounds
    assert re.search(rf"its folder {tmp_path / 'first'}.* is gone.*start_from='base'", failed.error)
    assert len(engine.requests) == made + student.ledger.lm_calls
    step(start_from="base").compile(first, trainset=numbers(4), folder=tmp_path / "second")


def test_start_from_current_without_an_adapter_starts_from_the_base() -> None:
    compiled = step(start_from="current").compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(4))
    assert compiled.lm.model.startswith("local/fake@r1-")


def test_base_and_every_round_stay_callable() -> None:
    engine = parity_engine(lambda *_: True)
    program = parity_program(engine)
    first = step().compile(program, trainset=numbers(4))
    second = step().compile(first, trainset=numbers(6))
    for each in (program, first, second):
        each(number=1)
    assert [request.trained_on for request in engine.requests[-3:]] == [0, 4, 6]


def test_no_passing_run_is_an_error_and_nothing_is_trained() -> None:
    engine = parity_engine(lambda *_: False)
    with pytest.raises(NoTrainingDataError, match="No training rows"):
        step().compile(parity_program(engine), trainset=numbers(4))
    assert engine.trainings == []


def test_an_empty_trainset_is_an_error() -> None:
    with pytest.raises(DataError, match="trainset cannot be empty"):
        step().compile(parity_program(parity_engine(learner)), trainset=[])


def test_a_program_without_an_lm_is_an_error() -> None:
    with pytest.raises(ProgramError, match="must have a language model set"):
        step().compile(TwoSteps(), trainset=numbers(3))


def test_too_many_errors_end_the_step() -> None:
    optimizer = LoRAFinetune(lambda e, p, trace=None: 1 / 0, max_errors=1)
    with pytest.raises(TooManyErrors):
        optimizer.compile(parity_program(parity_engine(learner)), trainset=numbers(8))


def test_no_metric_accepts_every_run_that_does_not_fail() -> None:
    engine = parity_engine(lambda *_: False)
    LoRAFinetune(validation_share=0.0).compile(parity_program(engine), trainset=numbers(4))
    assert len(engine.trainings[0]) == 4


def test_configs_and_seed_reach_the_engine() -> None:
    seen: dict[str, Any] = {}
    engine = parity_engine(lambda *_: True)
    original = engine.finetune
    engine.finetune = lambda rows, **keywords: seen.update(keywords) or original(rows, **keywords)  # type: ignore[method-assign]
    step(lora=LoRAConfig(rank=4)).compile(parity_program(engine), trainset=numbers(3), seed=9)
    assert seen["lora"].rank == 4
    assert seen["training"].seed == 9


def test_the_same_call_gives_the_same_adapter() -> None:
    names = {
        step(num_samples=2).compile(parity_program(parity_engine(learner)), trainset=numbers(12)).lm.model
        for _ in range(2)
    }
    assert len(names) == 1


def test_the_paper_takes_one_run_an_example_and_its_own_configs() -> None:
    optimizer = LoRAFinetune.paper(parity_match)
    assert optimizer.lora == LoRAConfig.paper()
    assert optimizer.training == TrainingConfig.paper()
    assert (optimizer.sampling.num_samples, optimizer.sampling.rescue, optimizer.rows.balance) == (0, False, False)
    assert (optimizer.validation_share, optimizer.rows.train_prompt) == (0.0, "vanilla")
    assert LoRAFinetune.paper(parity_match, num_samples=2).sampling.num_samples == 2


def test_answers_that_alone_repair_a_run_are_learned_and_the_blame_is_in_the_details() -> None:
    def answer(request: FakeRequest) -> str:
        if "1. `parity`" in request.system:
            return reply(request, parity=right(number_of(request)) if "good" in request.user else "none")
        return reply(request, remark="good" if request.temperature else "bad")

    engine = FakeEngine(answer)
    optimizer = step(branches=2)
    optimizer.compile(two_step_program(engine), trainset=numbers(4))
    details = optimizer.last.details if optimizer.last else None
    assert isinstance(details, WeightDetails)
    assert details.blame == {"remark": Blame(4, 4, 4), "decide": Blame(4, 4, 0)}
    assert details.data_card.kept_by_source == {"branch": 8}
    assert ["good" in row.completion for row in engine.trainings[0]] == [True, False] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_from": "scratch"}, "start_from='scratch'"),
        ({"validation_share": 1.0}, r"give a number in \[0, 1\)"),
        ({"num_samples": -1}, "num_samples=-1"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"train_prompt": "best"}, "train_prompt='best'"),
        ({"frozen": "remark"}, "frozen='remark'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step(**options)
