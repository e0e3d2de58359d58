"""What `dspy.BetterTogether` takes, raises and gives, this one takes, raises and gives."""

from __future__ import annotations

import inspect
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import (
    careful,
    learner,
    models,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    proposing_engine,
)
from foreign_optimizers import OVERRIDES, PROMPT_OPTIMIZERS, foreign

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.errors import StrategyError
from bettertogether.programs.program import prompts_state
from bettertogether.testing import FakeEngine

TRAIN, VAL = numbers(16), numbers(10, start=20)


class Notes(Teleprompter):
    """Notes what `compile` was given; returns the student with this instruction."""

    def __init__(self, instructions: str = "Noted.") -> None:
        self.instructions = instructions
        self.seen: list[dict[str, Any]] = []

    def compile(
        self, student: dspy.Module, *, trainset: Any, teacher: Any = None, valset: Any = None, extra: Any = None
    ) -> dspy.Module:
        self.seen.append({"trainset": trainset, "teacher": teacher, "valset": valset, "extra": extra})
        student.signature = student.signature.with_instructions(self.instructions)
        return student


def upstream(**optimizers: Teleprompter) -> dspy.BetterTogether:
    return dspy.BetterTogether(metric=parity_match, **optimizers)


def ours(**optimizers: Teleprompter) -> BetterTogether:
    return BetterTogether(metric=parity_match, **optimizers)


def test_every_argument_of_dspys_compile_is_one_of_ours_with_the_same_default() -> None:
    theirs = inspect.signature(dspy.BetterTogether.compile).parameters
    own = inspect.signature(BetterTogether.compile).parameters
    for name, parameter in theirs.items():
        assert own[name].kind is parameter.kind, name
        assert own[name].default == parameter.default, name
    assert list(own)[: len(theirs)] == list(theirs)


def test_it_is_a_teleprompter_with_a_metric_and_named_optimizers() -> None:
    optimizer = BetterTogether(parity_match)
    assert isinstance(optimizer, Teleprompter)
    assert {key: type(value) for key, value in optimizer.optimizers.items()} == {
        "p": BootstrapFewShotRS,
        "w": LoRAFinetune,
    }
    assert optimizer.metric is parity_match


def calls_that_fail() -> dict[str, Any]:
    """What to call on an optimizer, by what is wrong with it."""
    good = {"trainset": TRAIN, "valset": VAL, "strategy": "p"}

    def compile_with(**changes: Any) -> Any:
        student = changes.pop("student", None) or parity_program(parity_engine(learner))
        return lambda make: make(p=Notes()).compile(student, **(good | changes))

    compiled = parity_program(parity_engine(learner))
    compiled._compiled = True
    return {
        "empty trainset": compile_with(trainset=[]),
        "negative ratio": compile_with(valset_ratio=-0.5),
        "ratio of one": compile_with(valset_ratio=1),
        "empty strategy": compile_with(strategy=""),
        "blank strategy": compile_with(strategy="  "),
        "unknown step": compile_with(strategy="p -> q"),
        "student without an LM": compile_with(student=dspy.Predict("number -> parity")),
        "compiled student": compile_with(student=compiled),
        "unknown key of compile args": compile_with(optimizer_compile_args={"q": {}}),
        "student in compile args": compile_with(optimizer_compile_args={"p": {"student": 1}}),
        "unknown argument in compile args": compile_with(optimizer_compile_args={"p": {"nope": 1, "also": 2}}),
        "no teleprompter": lambda make: make(p="a prompt"),
        "a teacher for GEPA": lambda make: make(p=gepa()).compile(
            parity_program(parity_engine(learner)),
            teacher=parity_program(parity_engine(learner)),
            optimizer_compile_args={"p": {}},
            **good,
        ),
    }


def gepa() -> dspy.GEPA:
    lm = plain_lm(parity_engine(learner))
    return dspy.GEPA(metric=lambda gold, pred, trace, name, sub_trace: 1.0, max_metric_calls=5, reflection_lm=lm)


@pytest.mark.parametrize("what", list(calls_that_fail()))
def test_errors_say_what_dspys_say(what: str) -> None:
    call = calls_that_fail()[what]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(upstream)
    with pytest.raises(type(theirs.value)) as own:
        call(ours)
    phrase = str(theirs.value).split(". ")[0].split(" Assign ")[0].removesuffix(".")
    assert phrase in str(own.value)


def test_a_teacher_for_gepa_is_an_error_before_any_work() -> None:
    engine = parity_engine(learner)
    with pytest.raises(ValueError, match="GEPA does not accept a teacher argument"):
        ours(p=gepa()).compile(
            parity_program(engine), trainset=TRAIN, teacher=parity_program(engine), strategy="p", progress=False
        )
    assert engine.requests == []


def compile_both(make: Any, **arguments: Any) -> tuple[dspy.Module, Notes]:
    notes = Notes()
    program = parity_program(parity_engine(learner))
    options = {"trainset": TRAIN, "valset": VAL, "strategy": "p"} | arguments
    return make(p=notes).compile(program, **options), notes


@pytest.mark.parametrize("make", [upstream, ours])
def test_a_step_is_given_trainset_valset_and_teacher(make: Any) -> None:
    teacher = parity_program(parity_engine(learner))
    _, notes = compile_both(make, teacher=teacher)
    (seen,) = notes.seen
    assert sorted(e.number for e in seen["trainset"]) == list(range(16))
    assert [e.number for e in seen["valset"]] == list(range(20, 30))
    assert seen["teacher"] is not None


def test_a_step_that_empties_its_lists_in_place_takes_nothing_from_later_rounds() -> None:
    class Empties(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any, valset: Any) -> dspy.Module:
            trainset.clear()
            valset.clear()
            return student

    notes = Notes()
    optimizer = BetterTogether(parity_match, e=Empties(), p=notes)
    program = parity_program(parity_engine(learner))
    compiled = optimizer.compile(program, trainset=TRAIN, valset=VAL, strategy="e -> p", progress=False)
    assert [len(record.scores or ()) for record in compiled.report.rounds] == [10, 10, 10]
    assert (len(notes.seen[0]["trainset"]), notes.seen[0]["valset"]) == (16, VAL)


@pytest.mark.parametrize("make", [upstream, ours])
def test_compile_args_win_over_what_the_step_would_be_given(make: Any) -> None:
    _, notes = compile_both(make, optimizer_compile_args={"p": {"trainset": TRAIN[:2], "extra": 7}})
    assert (notes.seen[0]["trainset"], notes.seen[0]["extra"]) == (TRAIN[:2], 7)


@pytest.mark.parametrize("make", [upstream, ours])
def test_without_shuffling_each_step_sees_the_order_given(make: Any) -> None:
    _, notes = compile_both(make, shuffle_trainset_between_steps=False, strategy="p -> p")
    assert [[e.number for e in seen["trainset"]] for seen in notes.seen] == [list(range(16))] * 2


@pytest.mark.parametrize("make", [upstream, ours])
def test_a_share_of_the_trainset_is_held_out_without_a_valset(make: Any) -> None:
    _, notes = compile_both(make, valset=None, valset_ratio=0.25)
    (seen,) = notes.seen
    assert (len(seen["trainset"]), len(seen["valset"])) == (12, 4)


@pytest.mark.parametrize("make", [upstream, ours])
def test_ratio_zero_scores_nothing_and_returns_the_latest(make: Any) -> None:
    compiled, notes = compile_both(make, valset=None, valset_ratio=0)
    assert notes.seen[0]["valset"] is None
    assert [c["score"] for c in compiled.candidate_programs] == [None, None]
    assert compiled.signature.instructions == "Noted."


@pytest.mark.parametrize("make", [upstream, ours])
def test_candidate_programs_have_score_program_and_strategy_best_first(make: Any) -> None:
    engine = parity_engine(lambda request, n: ("Better" in request.system and n % 10 < 8) or n % 10 < 2)
    optimizers = {"a": Notes("Better."), "b": Notes("Worse.")}
    compiled = make(**optimizers).compile(parity_program(engine), trainset=TRAIN, valset=VAL, strategy="a -> b")
    found = [(c["strategy"], c["score"]) for c in compiled.candidate_programs]
    assert found == [("a", 80.0), ("", 20.0), ("a -> b", 20.0)]
    assert all(isinstance(c["program"], dspy.Module) for c in compiled.candidate_programs)
    assert compiled.signature.instructions == "Better."
    assert compiled.flag_compilation_error_occurred is False
    assert compiled._compiled is True


@pytest.mark.parametrize("make", [upstream, ours])
def test_a_failing_step_sets_the_flag_and_the_best_so_far_is_returned(make: Any) -> None:
    class Fails(Teleprompter):
        def compile(self, student: dspy.Module, *, trainset: Any) -> dspy.Module:
            raise OSError("disk gone")

    compiled = make(a=Notes(), b=Fails()).compile(
        parity_program(parity_engine(learner)), trainset=TRAIN, valset=VAL, strategy="a -> b -> a"
    )
    assert compiled.flag_compilation_error_occurred is True
    assert {c["strategy"] for c in compiled.candidate_programs} == {"", "a"}


def test_student_and_teachers_are_unchanged_and_a_second_compile_gives_the_same() -> None:
    engine = parity_engine(learner)
    student, teachers = parity_program(engine), [parity_program(engine), parity_program(engine)]
    before = [(prompts_state(p), p.lm, p._compiled, dict(vars(p))) for p in (student, *teachers)]
    optimizer = BetterTogether(parity_match)
    results = [
        optimizer.compile(student, trainset=numbers(30), teacher=teachers, strategy="p -> w", progress=False)
        for _ in range(2)
    ]
    after = [(prompts_state(p), p.lm, p._compiled, dict(vars(p))) for p in (student, *teachers)]
    for one, other in zip(before, after, strict=True):
        assert one[:3] == other[:3]
        assert one[3].keys() == other[3].keys()
    first, second = results
    assert [c["score"] for c in first.candidate_programs] == [c["score"] for c in second.candidate_programs]
    assert (first.lm.model, prompts_state(first)) == (second.lm.model, prompts_state(second))


@pytest.mark.parametrize("name", [*PROMPT_OPTIMIZERS, "KNNFewShot", "BootstrapFinetune"])
def test_dspys_optimizers_run_as_steps_beside_ours_with_lms_kept(name: str) -> None:
    engine = proposing_engine(careful)
    student = parity_program(engine)
    optimizer = BetterTogether(
        parity_match,
        f=foreign(name, student.lm),
        p=BootstrapFewShotRS(parity_match, num_candidates=1, num_samples=0, rescue=False),
        w=LoRAFinetune(parity_match, num_samples=0, rescue=False),
    )
    # KNNFewShot's result runs on a program of its own, which tuned weights would not reach.
    strategy = "w -> f -> p" if name == "KNNFewShot" else "f -> w -> p"
    compiled = optimizer.compile(
        student,
        trainset=TRAIN,
        valset=VAL,
        strategy=strategy,
        num_threads=4,
        seed=1,
        optimizer_compile_args={"f": OVERRIDES.get(name, {})},
        progress=False,
    )
    assert compiled.report.rounds[-1].error is None
    assert [record.status for record in compiled.report.rounds] == ["complete"] * (len(strategy.split("->")) + 1)
    by_strategy = {record.strategy: record.models["self"] for record in compiled.report.rounds}
    tuned = by_strategy["w"] if name == "KNNFewShot" else by_strategy["f -> w"]
    assert tuned != "local/fake"
    if name != "BootstrapFinetune":
        assert by_strategy[strategy] == tuned
    for candidate in compiled.candidate_programs:
        engine.requests.clear()
        candidate["program"](number=3)
        assert models(engine.requests) == {by_strategy[candidate["strategy"]]}


@pytest.mark.parametrize(
    ("strategy", "refused"), [(["w -> k", "k -> k -> w"], "k -> k -> w"), ("auto", "k -> w")], ids=["list", "auto"]
)
def test_a_weight_step_after_knn_few_shot_is_refused_before_any_call(strategy: Any, refused: str) -> None:
    engine = parity_engine(learner)
    optimizer = BetterTogether(parity_match, k=foreign("KNNFewShot"), w=LoRAFinetune(parity_match))
    with pytest.raises(StrategyError) as caught:
        optimizer.compile(parity_program(engine), trainset=TRAIN, strategy=strategy)
    assert str(caught.value) == (
        f"Strategy {refused!r} has 'w' after 'k': what dspy.KNNFewShot returns runs on a program of its own, which "
        "tuned weights would not reach. Run the weight step before it, as in 'w -> k'."
    )
    assert engine.requests == []


def test_a_callback_of_dspy_keeps_working_during_a_compile() -> None:
    class Counts(dspy.utils.callback.BaseCallback):
        ends = 0

        def on_lm_end(self, *arguments: Any, **keywords: Any) -> None:
            self.ends += 1

    counts, engine = Counts(), parity_engine(learner)
    with dspy.context(callbacks=[counts]):
        ours(p=BootstrapFewShotRS(parity_match)).compile(
            parity_program(engine), trainset=numbers(24), strategy="p", num_threads=1, progress=False
        )
    assert counts.ends == len(engine.requests)


def test_a_program_of_two_lms_one_of_an_api_is_compiled_and_the_api_is_left_alone() -> None:
    from fakes import api_lm, reply, two_step_engine, two_step_program

    engine: FakeEngine = two_step_engine(learner)
    program = two_step_program(engine)
    program.remark.lm = api_lm(lambda request: reply(request, remark="hm"))
    compiled = BetterTogether(parity_match).compile(program, trainset=numbers(24), strategy="p -> w", progress=False)
    assert compiled.report.rounds[-1].status == "complete"
    for candidate in compiled.candidate_programs:
        assert candidate["program"].remark.lm is program.remark.lm
    assert compiled.report.rounds[-1].models["remark"] == "local/api"
    assert compiled.report.rounds[-1].models["decide"].startswith("local/fake@")
