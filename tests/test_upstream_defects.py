"""What goes wrong in dspy 3.4.1's own fine-tuning and alternation, and goes right here; one test for each."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import (
    TwoSteps,
    learner,
    models,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    reply,
    two_step_engine,
    two_step_program,
)

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, load
from bettertogether.artifact import save
from bettertogether.errors import NoTrainingDataError, TooManyErrors
from bettertogether.lm import local_engine
from bettertogether.programs.program import prompts_state
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.testing import FakeEngine


def weights(metric: Any = parity_match, **options: Any) -> LoRAFinetune:
    return LoRAFinetune(metric, **({"num_samples": 0, "rescue": False, "balance": False} | options))


def test_rows_go_to_the_predictor_that_made_the_call_whatever_the_order_and_number_of_calls() -> None:
    """Defect 4: `multitask=False` picks trace entries by position."""

    class Order(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            if number % 2:
                return self.decide(number=number, remark="odd one")
            for _ in range(2):
                remark = self.remark(number=number).remark
            return self.decide(number=number, remark=remark)

    engine = two_step_engine(lambda *_: True)
    program = Order()
    program.set_lm(plain_lm(engine))
    weights(multitask=False).compile(program, trainset=numbers(6))
    fields = [{row.completion.split(" ## ]]")[0] for row in rows} for rows in engine.trainings]
    assert sorted(map(sorted, fields)) == [["[[ ## parity"], ["[[ ## remark"]]


def test_with_two_lms_each_is_trained_on_its_own_predictors_rows() -> None:
    """Defect 4: `multitask=True` with two LMs gives each the other's rows."""
    small, large = two_step_engine(lambda *_: True), two_step_engine(lambda *_: True, base_name="large")
    program = two_step_program(small)
    program.decide.lm = plain_lm(large)
    weights().compile(program, trainset=numbers(4))
    assert all("remark" in row.completion for row in small.trainings[0])
    assert all("parity" in row.completion for row in large.trainings[0])
    assert (len(small.trainings[0]), len(large.trainings[0])) == (4, 4)


def test_an_unparseable_answer_is_a_dropped_trace() -> None:
    """Defect 5: one unparseable output kills the compile, or counts as success."""
    engine = FakeEngine(lambda r: "no" if "\n1\n" in r.user else reply(r, parity="even"))
    weights(None).compile(parity_program(engine), trainset=numbers(4))
    assert len(engine.trainings[0]) == 3


def test_a_program_or_metric_that_raises_on_one_example_costs_that_example() -> None:
    """Defect 5: `not enough values to unpack`."""

    class Raises(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            if number == 1:
                raise ValueError("one")
            return super().forward(number)

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        return bool(1 / (example.number - 2))

    engine = two_step_engine(lambda *_: True)
    program = Raises()
    program.set_lm(plain_lm(engine))
    collected = weights(metric, threshold=-9).collect(program, trainset=numbers(5))
    assert {row.example for row in collected.rows} == {0, 3, 4}
    assert sum("error" in reason for reason in collected.card.dropped_by_reason) == 2


@pytest.mark.parametrize("score", [0.3, 1e-9, -1.0, math.nan, dspy.Prediction(score=0.0)])
def test_a_score_below_the_full_mark_is_no_success(score: Any) -> None:
    """Defect 6: 0.3, 1e-9, -1.0 and NaN all count as success; `Prediction(score=0.0)` too."""
    with pytest.raises(NoTrainingDataError):
        weights(lambda e, p, trace=None: score).compile(
            parity_program(parity_engine(lambda *_: True)), trainset=numbers(2)
        )


def test_the_metric_is_given_the_trace() -> None:
    """Defect 6: the metric always gets `trace=None`."""
    lengths: list[int] = []

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        lengths.append(len(trace))
        return True

    weights(metric).compile(two_step_program(two_step_engine(lambda *_: True)), trainset=numbers(2))
    assert lengths == [2, 2]


def test_without_a_passing_trace_nothing_is_trained() -> None:
    """Defect 7: training starts on an empty list."""
    engine = parity_engine(lambda *_: False)
    with pytest.raises(NoTrainingDataError, match="0 passed"):
        weights().compile(parity_program(engine), trainset=numbers(3))
    assert engine.trainings == []


def test_with_a_teacher_the_training_prompt_is_the_students_own() -> None:
    """Defect 8: the training prompt comes from the teacher's predictor, the inference prompt from the student's."""
    engine, teacher = parity_engine(lambda *_: False), parity_engine(lambda *_: True, base_name="big")
    teaching = parity_program(teacher)
    teaching.signature = teaching.signature.with_instructions("Teach.")
    compiled = weights().compile(parity_program(engine), trainset=numbers(3), teacher=teaching)
    compiled(number=1)
    assert engine.requests[-1].learned is not None


def test_every_adapter_of_dspy_gives_rows(adapter: dspy.Adapter) -> None:
    """Defect 9: NotImplementedError with JSONAdapter."""
    engine = parity_engine(lambda *_: True)
    compiled = weights().compile(parity_program(engine), trainset=numbers(3))
    compiled(number=1)
    assert engine.requests[-1].learned is not None


def test_the_prompt_step_after_a_weight_step_runs_on_the_tuned_lm() -> None:
    """Defect 10: the default `p` runs on `dspy.settings.lm`: the base model, or none at all."""
    engine, other = parity_engine(learner), parity_engine(lambda *_: True, base_name="other")
    with dspy.context(lm=plain_lm(other)):
        tuned = weights().compile(parity_program(engine), trainset=numbers(9))
        engine.requests.clear()
        compiled = BootstrapFewShotRS(parity_match, strengths=()).compile(tuned, trainset=numbers(20))
    assert models(engine.requests) == {tuned.lm.model} == {compiled.lm.model}
    assert other.requests == []


@pytest.mark.parametrize(("count", "size"), [(4, 1), (9, 1), (15, 2), (19, 2)])
def test_a_small_trainset_still_gives_a_valset_drawn_at_random(count: int, size: int) -> None:
    """Defect 11: under 10 examples there is no validation, at 10-19 one example, always the unshuffled head."""
    held_out = set()
    for seed in range(4):
        engine = parity_engine(learner)
        optimizer = BetterTogether(parity_match, p=dspy.LabeledFewShot(k=1))
        compiled = optimizer.compile(
            parity_program(engine), trainset=numbers(count), strategy="p", seed=seed, progress=False
        )
        assert compiled.report.valset_size == size
        held_out.add(tuple(sorted(number_of(request) for request in engine.requests[:size])))
    assert len(held_out) > 1


def test_a_tie_goes_to_the_tuned_program_when_its_own_step_shows_a_gain() -> None:
    """Defect 11: ties keep the untuned program."""
    engine = parity_engine(lambda *_: True)
    step = LoRAFinetune(parity_match, validation_share=0.2)
    compiled = BetterTogether(parity_match, w=step).compile(
        parity_program(engine), trainset=numbers(40), valset=numbers(8, start=50), strategy="w", progress=False
    )
    assert [record.score for record in compiled.report.rounds] == [1.0, 1.0]
    assert compiled.report.selected == 1


@pytest.mark.parametrize("strategy", ["p->w", "p -> w ", " p ->w"])
def test_white_space_in_a_strategy_does_not_matter(strategy: str) -> None:
    """Defect 12: `"p->w"` or a trailing space is rejected."""
    optimizer = BetterTogether(parity_match, p=dspy.LabeledFewShot(k=1), w=dspy.LabeledFewShot(k=2))
    program = parity_program(parity_engine(learner))
    report = optimizer.compile(program, trainset=numbers(4), strategy=strategy, progress=False).report
    assert [record.strategy for record in report.rounds] == ["", "p", "p -> w"]


def test_seed_threads_and_max_errors_reach_the_steps() -> None:
    """Defect 12: they are not passed to the steps."""
    seen: dict[str, Any] = {}

    class Step(Teleprompter):
        def compile(self, student: Any, *, trainset: Any, seed: Any, num_threads: Any, max_errors: Any) -> Any:
            seen.update(seed=seed, num_threads=num_threads, max_errors=max_errors)
            return student

    BetterTogether(parity_match, s=Step()).compile(
        parity_program(parity_engine(learner)),
        trainset=numbers(10),
        strategy="s",
        seed=7,
        num_threads=2,
        max_errors=5,
        progress=False,
    )
    assert seen == {"seed": 7, "num_threads": 2, "max_errors": 5}


def test_an_evaluation_that_crashes_is_an_error_and_not_a_zero() -> None:
    """Defect 12: a crashed evaluation scores 0.0 silently."""

    def broken(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        raise KeyError("gold")

    with pytest.raises(TooManyErrors, match=r"more than max_errors=3 allows.*KeyError: 'gold'"):
        evaluate(parity_program(parity_engine(learner)), numbers(20), broken, max_errors=3)


def test_a_failing_step_is_in_the_report_and_the_same_call_goes_on(tmp_path: Path) -> None:
    """Defect 13: a failing step is swallowed into a flag; nothing can be resumed."""
    ready = threading.Event()

    class Fails(Teleprompter):
        def compile(self, student: Any, *, trainset: Any) -> Any:
            if not ready.is_set():
                raise OSError("disk gone")
            return student

    engine = parity_engine(learner)

    def call() -> dspy.Module:
        optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match), x=Fails())
        return optimizer.compile(
            parity_program(engine), trainset=numbers(30), strategy="p -> x", progress=False, run_dir=tmp_path / "run"
        )

    first = call()
    assert first.flag_compilation_error_occurred is True
    assert "OSError: disk gone" in str(first.report.rounds[-1].error)
    ready.set()
    made = len(engine.requests)
    second = call()
    assert second.flag_compilation_error_occurred is False
    assert [record.status for record in second.report.rounds] == ["complete"] * 3
    assert len(engine.requests) - made <= second.report.valset_size


def test_every_candidate_answers_after_compile_with_its_own_prompts_and_weights() -> None:
    """Defect 14: returned candidates hold LMs whose server was killed, or ignore their own demos."""
    engine = parity_engine(learner)
    program = two_step_program(two := two_step_engine(learner))
    program.lock = threading.Lock()
    assert engine.requests == []
    compiled = BetterTogether(parity_match).compile(program, trainset=numbers(30), progress=False)
    assert [c["strategy"] for c in compiled.candidate_programs].count("") == 1
    for candidate in compiled.candidate_programs:
        two.requests.clear()
        candidate["program"](number=1)
        assert models(two.requests) == {candidate["program"].decide.lm.model}
        assert two.requests[-1].demos == len(candidate["program"].decide.demos)


def test_the_student_is_not_changed_so_a_second_compile_tunes_the_same_model() -> None:
    """Defect 15: the student is mutated in place."""
    engine = parity_engine(learner)
    program = parity_program(engine)
    before = prompts_state(program), program.lm, program._compiled
    results = [
        BetterTogether(parity_match, w=weights()).compile(program, trainset=numbers(30), strategy="w", progress=False)
        for _ in range(2)
    ]
    assert (prompts_state(program), program.lm, program._compiled) == before
    first, second = (result.candidate_programs for result in results)
    assert [c["program"].lm.model for c in first] == [c["program"].lm.model for c in second]
    assert [c["score"] for c in first] == [c["score"] for c in second]


def test_new_weights_have_a_new_name_so_that_dspys_cache_cannot_answer_for_old_ones() -> None:
    """Defect 16: DSPy's cache key is the request without the engine."""
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        engine = parity_engine(lambda request, number: request.trained_on > 0)
        program = parity_program(engine, cache=True)
        assert program(number=1).parity == "even"
        tuned = weights(None).compile(program, trainset=numbers(3))
        other = weights(None).compile(program, trainset=numbers(5))
        assert tuned(number=1).parity == "odd"
        assert len({program.lm.model, tuned.lm.model, other.lm.model}) == 3
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


def test_copies_of_an_lm_and_of_a_program_share_the_engine() -> None:
    """Defect 17: `copy.deepcopy(lm)` copies the engine and its weights; with a lock inside it raises."""
    program = parity_program(parity_engine(learner))
    for duplicate in (copy.deepcopy(program.lm), copy.deepcopy(program).lm, program.deepcopy().lm):
        assert duplicate.engine is program.lm.engine


def test_a_saved_program_keeps_its_lm_trainable_and_its_scores(tmp_path: Path) -> None:
    """Defect 18: saving to JSON loses the provider and the scores; the LM reloads as an OpenAI one."""
    engine = parity_engine(learner)
    compiled = BetterTogether(parity_match).compile(
        parity_program(engine), trainset=numbers(40), strategy="w", progress=False
    )
    save(compiled, tmp_path / "program")
    loaded = load(tmp_path / "program", into=parity_program(engine), base_model=engine)
    assert loaded.lm.model == compiled.lm.model
    assert local_engine(loaded.lm) is engine
    assert loaded.lm.provider.finetunable
    assert loaded.report.selected_round.score == compiled.report.selected_round.score
