"""Each of DSPy's optimizers is a step, runs on the tuned LM and leaves no mark on the program."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import Counter
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import (
    careful,
    models,
    numbers,
    outputs_of,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    proposing_engine,
)
from foreign_optimizers import OVERRIDES, PROMPT_OPTIMIZERS, TRAIN, foreign

from bettertogether.errors import ProgramError
from bettertogether.programs.program import prompts_state
from bettertogether.records import OtherDetails
from bettertogether.rollouts.settings import RunSettings
from bettertogether.run.any_optimizer import accepted_arguments, keep_lms, lent, run_any
from bettertogether.run.restoring import is_restorable
from bettertogether.steps.prompt_step import BootstrapFewShotRS
from bettertogether.steps.step import StepContext, StepResult
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeRequest


def run_with(
    optimizer: Teleprompter,
    program: dspy.Module,
    given: dict[str, Any] | None = None,
    *,
    valset: Any = None,
    teachers: Any = (),
    num_threads: int = 4,
) -> StepResult:
    """Run it on `TRAIN`, with arguments for `compile` given by the user."""
    settings = RunSettings(num_threads, max_errors=20, seed=3)
    return run_any(optimizer, program, StepContext(TRAIN, valset, teachers, settings=settings), given or {})


def run(name: str, program: dspy.Module, teacher: dspy.Module | None = None) -> StepResult:
    optimizer = foreign(name, program.predictors()[0].lm)
    teachers = [] if teacher is None else [teacher]
    return run_with(optimizer, program, OVERRIDES.get(name), valset=numbers(8, start=16), teachers=teachers)


@pytest.mark.parametrize("name", PROMPT_OPTIMIZERS)
def test_each_of_dspys_prompt_optimizers_runs_on_the_tuned_lm_and_keeps_it(name: str) -> None:
    engine = proposing_engine(careful)
    tuned = LoRAFinetune(parity_match).compile(parity_program(engine), trainset=TRAIN)
    state = prompts_state(tuned)
    engine.requests.clear()
    other = parity_engine(lambda *_: True, base_name="other")
    with dspy.context(lm=plain_lm(proposing_engine(careful, base_name="proposals"))):
        result = run(name, tuned)
    assert result.program.lm.model == tuned.lm.model
    assert models(r for r in engine.requests if set(outputs_of(r)) == {"parity"}) <= {tuned.lm.model}
    assert other.requests == []
    assert prompts_state(tuned) == state
    engine.requests.clear()
    assert result.program(number=3).parity == "odd"
    assert models(engine.requests) == {tuned.lm.model}


@pytest.mark.parametrize("name", PROMPT_OPTIMIZERS)
def test_each_of_dspys_prompt_optimizers_runs_without_a_global_lm(name: str) -> None:
    engine = proposing_engine(careful)
    program = parity_program(engine)
    result = run(name, program)
    assert result.program.lm.model == program.lm.model
    # COPRO asks for two completions in one call.
    assert result.ledger.lm_calls == len(engine.requests) - (name == "COPRO")
    assert result.details == OtherDetails(name)


@pytest.mark.parametrize("name", PROMPT_OPTIMIZERS)
def test_no_mark_of_the_step_and_none_of_its_candidates_are_left_on_the_result_which_can_be_restored(name: str) -> None:
    program = parity_program(proposing_engine(careful))
    result = run(name, program).program
    assert not hasattr(result, "candidate_programs")
    for each in (program, result):
        for _, predictor in each.named_sub_modules(dspy.Predict):
            assert "reset" not in predictor.__dict__
    result.reset_copy()
    assert is_restorable(result, program, prompts_state(result))


def test_knn_few_shot_keeps_the_lm_when_the_program_is_called() -> None:
    engine = proposing_engine(careful)
    tuned = LoRAFinetune(parity_match).compile(parity_program(engine), trainset=TRAIN)
    other = proposing_engine(careful, base_name="other")
    with dspy.context(lm=plain_lm(other)):
        result = run("KNNFewShot", tuned)
        engine.requests.clear()
        assert result.program(number=5).parity == "odd"
    assert other.requests == []
    assert models(engine.requests) == {tuned.lm.model}
    assert max(request.demos for request in engine.requests) > 0


def test_weights_tuned_after_knn_few_shot_would_not_be_used_so_that_is_an_error() -> None:
    program = run("KNNFewShot", parity_program(proposing_engine(careful))).program
    with pytest.raises(ProgramError, match="Run the weight step before it"):
        LoRAFinetune(parity_match).compile(program, trainset=TRAIN)


def test_simba_made_before_there_is_an_lm_proposes_rules_with_the_programs_own() -> None:
    calls: Counter[int] = Counter()

    def every_other_time(request: FakeRequest, number: int) -> bool:
        calls[number] += 1
        return bool(calls[number] % 2)

    engine = proposing_engine(every_other_time)
    program = parity_program(engine)
    optimizer = dspy.SIMBA(metric=parity_match, bsize=8, num_candidates=3, max_steps=1, max_demos=0)
    run_with(optimizer, program)
    assert any("module_advice" in request.system for request in engine.requests)
    assert optimizer.prompt_model is None


def test_bootstrap_finetune_trains_on_the_lms_own_engine() -> None:
    engine = parity_engine(careful)
    program = parity_program(engine)
    result = run("BootstrapFinetune", program)
    assert len(engine.trainings) == 1
    assert result.program.lm.model.startswith("local/fake@r1-")
    assert program.lm.model == "local/fake"


def test_the_forward_that_bootstrap_finetune_leaves_on_its_program_is_taken_off() -> None:
    result = run("BootstrapFinetune", parity_program(parity_engine(careful))).program
    assert "forward" not in result.__dict__


def test_bootstrap_finetune_goes_on_with_a_tuned_lm() -> None:
    engine = parity_engine(careful)
    tuned = LoRAFinetune(parity_match).compile(parity_program(engine), trainset=TRAIN)
    result = run("BootstrapFinetune", tuned)
    assert result.program.lm.model.startswith("local/fake@r2-")


def test_a_teacher_keeps_its_own_lm() -> None:
    student, teacher = parity_engine(careful), parity_engine(lambda *_: True, base_name="big")
    teaching = parity_program(teacher)
    run("BootstrapFewShot", parity_program(student), teacher=teaching)
    assert len(teacher.requests) > 0
    assert student.requests == []
    assert "reset" not in teaching.__dict__


def test_the_ledger_of_a_foreign_step_counts_calls_and_tokens() -> None:
    engine = parity_engine(careful)
    ledger = run("BootstrapFewShotWithRandomSearch", parity_program(engine)).ledger
    counters = engine.counters()
    assert ledger.lm_calls == counters["requests"] == len(engine.requests)
    assert (ledger.prompt_tokens, ledger.generated_tokens) == (counters["prompt_tokens"], counters["generated_tokens"])
    assert ledger.cache_hits == 0


@pytest.mark.parametrize("name", PROMPT_OPTIMIZERS)
def test_the_ledger_of_a_foreign_step_counts_the_calls_of_its_metric(name: str) -> None:
    engine = proposing_engine(careful)
    calls: list[int] = []

    def metric(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> float:
        calls.append(gold.number)
        return float(parity_match(gold, pred))

    optimizer = foreign(name, plain_lm(engine))
    attribute = "metric_fn" if name == "GEPA" else "metric"
    if name != "LabeledFewShot":
        setattr(optimizer, attribute, metric)
    result = run_with(optimizer, parity_program(engine), OVERRIDES.get(name), valset=TRAIN)
    assert result.ledger.metric_calls == len(calls)
    assert bool(calls) == (name != "LabeledFewShot")
    assert getattr(optimizer, attribute, metric) is metric


def test_an_optimizer_that_raises_has_its_own_metric_again() -> None:
    class Raises(Teleprompter):
        def __init__(self) -> None:
            self.metric = parity_match

        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            raise OSError(self.metric(TRAIN[0], TRAIN[0]))

    optimizer = Raises()
    with pytest.raises(OSError, match="True"):
        run_with(optimizer, parity_program(parity_engine(careful)))
    assert optimizer.metric is parity_match


class Recorder(Teleprompter):
    """Notes what it was given."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)
        self.seen: list[dict[str, Any]] = []

    def compile(self, student: dspy.Module, *, trainset: Any, valset: Any = None, seed: int = 0) -> dspy.Module:
        self.seen.append({"trainset": trainset, "valset": valset, "seed": seed, **vars(self)})
        return student


def test_settings_go_to_compile_where_it_takes_them_and_else_to_an_attribute_that_is_none() -> None:
    optimizer = Recorder(num_threads=None, max_errors=7)
    program = parity_program(parity_engine(careful))
    run_with(optimizer, program)
    (seen,) = optimizer.seen
    assert (seen["seed"], seen["num_threads"], seen["max_errors"]) == (3, 4, 7)
    assert optimizer.num_threads is None


def test_the_users_own_arguments_win() -> None:
    optimizer = Recorder()
    given = {"trainset": TRAIN[:2], "seed": 9}
    run_with(optimizer, parity_program(parity_engine(careful)), given, valset=TRAIN)
    (seen,) = optimizer.seen
    assert (seen["trainset"], seen["valset"], seen["seed"]) == (TRAIN[:2], TRAIN, 9)


def test_arguments_that_are_none_are_left_to_the_optimizers_own_defaults() -> None:
    assert accepted_arguments(Recorder(), {"trainset": TRAIN, "valset": None, "nope": 1}) == {"trainset": TRAIN}


def test_an_optimizer_that_takes_any_keyword_is_given_what_dspy_gives() -> None:
    class Any_(Teleprompter):  # noqa: N801
        def compile(self, student: dspy.Module, **arguments: Any) -> dspy.Module:
            student.seen = sorted(arguments)
            return student

    result = run_with(Any_(), parity_program(parity_engine(careful)), valset=TRAIN)
    assert result.program.seen == ["trainset", "valset"]


def test_settings_are_lent_where_an_attribute_is_none_and_taken_back() -> None:
    class Defaults(Teleprompter):
        max_errors: int | None = None

    optimizer = Defaults()
    optimizer.seed, optimizer.num_threads = None, 2
    with lent(optimizer, RunSettings(num_threads=8, max_errors=3, seed=5)):
        assert (optimizer.seed, optimizer.num_threads, optimizer.max_errors) == (5, 2, 3)
    assert vars(optimizer) == {"seed": None, "num_threads": 2}


def test_settings_are_taken_back_when_the_optimizer_raises() -> None:
    class Raises(Teleprompter):
        seed = None

        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            raise OSError(f"seed {self.seed}")

    optimizer = Raises()
    with pytest.raises(OSError, match="seed 3"):
        run_with(optimizer, parity_program(parity_engine(careful)))
    assert vars(optimizer) == {}


def test_a_setting_that_the_optimizer_changed_itself_stays() -> None:
    optimizer = Recorder(seed=None)
    with lent(optimizer, RunSettings(seed=5)):
        optimizer.seed = 6
    assert optimizer.seed == 6


def test_the_users_own_optimizer_runs_and_keeps_what_it_notes() -> None:
    class Notes(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            self.received = trainset
            return student

    optimizer = Notes()
    run_with(optimizer, parity_program(parity_engine(careful)))
    assert optimizer.received is TRAIN


def test_a_step_inside_a_step_of_the_same_optimizer_is_lent_what_the_outer_one_has() -> None:
    class Nested(Teleprompter):
        def __init__(self) -> None:
            self.num_threads: int | None = None
            self.seen: list[int | None] = []

        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            self.seen.append(self.num_threads)
            if len(self.seen) == 1:
                run_with(self, student, num_threads=9)
                self.seen.append(self.num_threads)
            return student

    optimizer = Nested()
    run_with(optimizer, parity_program(parity_engine(careful)))
    assert (optimizer.seen, optimizer.num_threads) == ([4, 4, 4], None)


def test_a_teacher_among_the_users_own_arguments_is_passed_as_it_is_and_keeps_its_lm() -> None:
    student, teacher = parity_engine(careful), parity_engine(lambda *_: True, base_name="big")
    teaching = parity_program(teacher)
    seen: list[Any] = []

    class Bootstraps(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any, teacher: Any = None) -> dspy.Module:
            seen.append(teacher)
            return dspy.BootstrapFewShot(metric=parity_match).compile(student, teacher=teacher, trainset=trainset)

    run_with(Bootstraps(), parity_program(student), {"teacher": teaching})
    assert seen == [teaching]
    assert len(teacher.requests) > 0
    assert student.requests == []
    assert "reset" not in teaching.__dict__


def test_an_optimizer_gets_a_program_that_is_not_compiled_and_may_change_it() -> None:
    class Changes(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            assert student._compiled is False
            student.demos = list(trainset)
            return student

    program = parity_program(parity_engine(careful))
    program._compiled = True
    result = run_with(Changes(), program)
    assert (len(result.program.demos), program.demos) == (16, [])


def test_an_optimizer_that_returns_no_module_is_an_error() -> None:
    class Nothing(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> Any:
            return None

    with pytest.raises(ProgramError, match="returned NoneType where"):
        run_with(Nothing(), parity_program(parity_engine(careful)))


def test_lms_that_an_optimizer_dropped_are_put_back_and_those_it_set_stay() -> None:
    engine = parity_engine(careful)

    class Drops(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            student.lm = None
            return student

    program = parity_program(engine)
    assert run_with(Drops(), program).program.lm is program.lm


def test_resets_inside_clear_prompts_and_keep_the_lm_of_copies_too() -> None:
    program = parity_program(parity_engine(careful))
    program.demos = numbers(2)
    keep_lms(program)
    for duplicate in (program.reset_copy(), program.deepcopy().reset_copy(), copy.deepcopy(program).reset_copy()):
        assert duplicate.demos == []
        assert duplicate.lm.model == program.lm.model
        assert duplicate.lm.engine is program.lm.engine
    assert len(program.demos) == 2


def test_a_reset_of_a_copy_leaves_the_original_alone() -> None:
    program = parity_program(parity_engine(careful))
    program.demos = numbers(2)
    keep_lms(program)
    duplicate = copy.deepcopy(program)
    duplicate.reset()
    assert (len(program.demos), duplicate.demos) == (2, [])


def test_an_engine_shared_by_two_predictors_is_counted_once() -> None:
    from fakes import two_step_engine, two_step_program

    engine = two_step_engine(careful)
    ledger = run("LabeledFewShot", two_step_program(engine)).ledger
    assert ledger.lm_calls == 0


@pytest.mark.parametrize("step", [BootstrapFewShotRS, LoRAFinetune])
def test_wrappers_of_a_compile_may_use_the_usual_names_for_their_own_arguments(step: Any) -> None:
    assert not {"original", "wrapped", "instance", "args", "kwargs", "func", "fn"} & set(
        inspect.signature(step.compile).parameters
    )


def test_a_setting_that_cannot_be_written_is_left_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Teleprompter):
        seed: int | None = None

    class ReadOnly(Teleprompter):
        @property
        def seed(self) -> None:
            return None

    class Slotted(Teleprompter):
        __slots__ = ("seed",)

    slotted = Slotted()
    slotted.seed = None
    for optimizer, lent_seed in ((Frozen(), None), (ReadOnly(), None), (slotted, 5)):
        with lent(optimizer, RunSettings(seed=5)):
            assert optimizer.seed == lent_seed
        assert optimizer.seed is None
