"""Which calls of which traces become rows, and why the others do not."""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import (
    CutEngine,
    TwoSteps,
    api_lm,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    placeless,
    plain_lm,
    predictor_over,
    reply,
    right,
    two_step_engine,
    two_step_program,
)

from bettertogether.errors import ConfigError, NoTrainingDataError
from bettertogether.records import Ledger
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.traces import Trace, TraceSet
from bettertogether.steps.left_out import more_rows
from bettertogether.steps.preference_step import PreferenceFinetune
from bettertogether.steps.rows import read_rows
from bettertogether.steps.rows_from_traces import RowOptions
from bettertogether.steps.training_step import TrainingStep
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


def collector(metric: Any = parity_match, **options: Any) -> LoRAFinetune:
    """One run an example and everything else off, but for what is given."""
    off: dict[str, Any] = {"num_samples": 0, "rescue": False, "balance": False}
    return LoRAFinetune(metric, **(off | options))


def even_only(_: FakeRequest, number: int) -> bool:
    return number % 2 == 0


def test_the_calls_of_passing_traces_become_rows_and_nothing_is_trained() -> None:
    engine = parity_engine(lambda _, number: number < 4)
    collected = collector().collect(parity_program(engine), trainset=numbers(6))
    assert [(row.example, row.predictor, row.label, row.source) for row in collected.rows] == [
        (i, "self", right(i), "student") for i in range(4)
    ]
    assert engine.trainings == []
    assert collected.ledger.metric_calls == len(engine.requests) == 6


def test_the_card_counts_what_was_dropped_by_reason() -> None:
    engine = parity_engine(lambda _, number: number < 4)
    card = collector().collect(parity_program(engine), trainset=numbers(6)).card
    assert card.dropped_by_reason == {"score below threshold": 2}
    assert (card.examples, card.examples_covered) == (6, 4)


@pytest.mark.parametrize("step", [collector(), PreferenceFinetune(parity_match, num_samples=1)])
def test_where_most_answers_were_cut_the_error_says_to_let_them_be_longer(step: TrainingStep) -> None:
    engine = CutEngine(lambda request: reply(request, parity=right(number_of(request))))
    with pytest.raises(NoTrainingDataError, match=r"Most answers were cut: give the LM a larger max_tokens first\."):
        step.compile(parity_program(engine), trainset=numbers(9)[::3])


@pytest.mark.parametrize(
    ("whole", "balance", "advice"),
    [
        (2, True, "Most answers were cut: give the LM a larger max_tokens first."),
        (2, False, "Most answers were cut: give the LM a larger max_tokens first. Try balance=True."),
        (3, False, "Try balance=True."),
        (3, True, "Give more examples."),
    ],
)
def test_longer_answers_are_advised_where_more_than_half_were_cut(whole: int, balance: bool, advice: str) -> None:
    def trace(index: int, cut: bool) -> Trace:
        call = Call("self", {}, {}, cut=cut)
        return Trace(index, numbers(1)[0], None, (call,), Verdict(1.0, passed=True), "student")

    traces = tuple(trace(index, cut=index >= whole) for index in range(whole + 3))
    assert more_rows(TraceSet(traces, Ledger(), len(traces)), Counter(), balance=balance) == advice


def test_every_predictor_of_a_passing_trace_gives_a_row() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    card = collector().collect(program, trainset=numbers(5)).card
    assert card.kept_by_predictor == {"remark": 5, "decide": 5}


def test_the_text_that_all_prompts_begin_with_is_kept_once() -> None:
    one, other = collector().collect(parity_program(parity_engine(lambda *_: True)), trainset=numbers(2)).rows
    assert one.messages[0]["content"] is other.messages[0]["content"]


def test_equal_calls_of_one_trace_give_one_row() -> None:
    class Twice(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            self.remark(number=number)
            return super().forward(number)

    program = Twice()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    assert collector().collect(program, trainset=numbers(2)).card.kept_by_predictor == {"remark": 2, "decide": 2}


def test_a_call_gives_a_row_of_each_of_its_prompts() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    program.demos = numbers(2, start=50)
    rows = collector(train_prompt="mixed").collect(program, trainset=numbers(2)).rows
    assert [len(row.messages) for row in rows] == [2, 6, 2, 6]


def test_a_call_that_cannot_be_written_is_dropped_by_its_predictor_and_the_others_stay() -> None:
    def answer(request: FakeRequest) -> str:
        remark = "`parity`" not in request.system
        return reply(request, remark="long " * 500) if remark else reply(request, parity=right(0))

    engine = FakeEngine(answer)
    solved = collector(lambda *_: True)
    card = solved.collect(two_step_program(engine), trainset=numbers(1)).card
    assert card.kept_by_predictor == {"remark": 1, "decide": 1}
    engine.max_length = card.prompt_tokens["min"] + card.completion_tokens["max"]
    card = solved.collect(two_step_program(engine), trainset=numbers(1)).card
    assert card.kept_by_predictor == {"remark": 1}
    assert card.dropped_by_predictor == {"decide": 1}
    engine.max_length = 400
    with pytest.raises(NoTrainingDataError, match="longer than the model's context of 400 tokens"):
        solved.collect(two_step_program(engine), trainset=numbers(1))


def test_calls_of_a_frozen_predictor_give_no_rows() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    card = collector(frozen=["remark"]).collect(program, trainset=numbers(3)).card
    assert card.kept_by_predictor == {"decide": 3}


def test_calls_of_an_api_lm_give_no_rows() -> None:
    program = two_step_program(two_step_engine(lambda *_: True))
    program.remark.lm = api_lm(lambda request: reply(request, remark="hm"))
    card = collector().collect(program, trainset=numbers(3)).card
    assert card.kept_by_predictor == {"decide": 3}


def test_a_teacher_gives_the_answers_and_the_student_the_prompt() -> None:
    student, teacher = parity_engine(lambda *_: False), parity_engine(lambda *_: True, base_name="big")
    teaching = parity_program(teacher)
    teaching.signature = teaching.signature.with_instructions("TEACHER")
    teaching.demos = numbers(2, start=50)
    collected = collector().collect(parity_program(student), trainset=numbers(3), teacher=teaching)
    assert [row.source for row in collected.rows] == ["teacher"] * 3
    assert all("TEACHER" not in row.messages[0]["content"] and len(row.messages) == 2 for row in collected.rows)
    assert student.requests == []


def test_traces_of_several_teachers_are_capped_by_example() -> None:
    def teacher(remark: str) -> dspy.Module:
        def answer(request: FakeRequest) -> str:
            if "`parity`" not in request.system:
                return reply(request, remark=remark)
            return reply(request, parity=right(int(request.user.split("\n")[1])))

        return two_step_program(FakeEngine(answer, base_name=remark))

    student = two_step_program(two_step_engine(lambda *_: False))
    teachers = [teacher("a"), teacher("b"), teacher("c")]
    collected = collector(max_traces_per_example=2).collect(student, trainset=numbers(4), teacher=teachers)
    assert collected.card.kept_by_predictor == {"remark": 8, "decide": 8}


def test_sampling_covers_more_examples() -> None:
    sampled = parity_engine(lambda request, number: number % 2 == 0 or request.temperature > 0)
    covered = [
        collector(num_samples=n).collect(parity_program(sampled), trainset=numbers(10)).card.examples_covered
        for n in (0, 1)
    ]
    assert covered == [5, 10]


def test_rescue_covers_the_label_that_the_student_never_answers() -> None:
    engine = parity_engine(lambda request, number: number % 2 == 0 or "is known" in request.system)
    without = collector().collect(parity_program(engine), trainset=numbers(10)).card
    rescued = collector(rescue=True).collect(parity_program(engine), trainset=numbers(10)).card
    assert without.kept_by_label == {"even": 5}
    assert rescued.kept_by_label == {"even": 5, "odd": 5}
    assert rescued.kept_by_source == {"student": 5, "rescue": 5}


def test_no_row_shows_the_hint_of_a_rescue(adapter: dspy.Adapter) -> None:
    engine = parity_engine(lambda request, number: "is known" in request.system)
    options = collector(rescue=True, train_prompt="mixed", max_rescue_share=1.0)
    collected = options.collect(parity_program(engine), trainset=numbers(4))
    assert [row.source for row in collected.rows] == ["rescue"] * 4
    for row in collected.rows:
        text = "".join(message["content"] for message in row.messages) + row.completion
        assert "is known" not in text
        assert "const" not in text
        # The prompt allows both answers again, as it will at inference.
        assert "even" in row.messages[0]["content"]
        assert "odd" in row.messages[0]["content"]


def test_a_rescued_answer_that_talks_about_its_hint_is_dropped() -> None:
    def answer(request: FakeRequest) -> str:
        hinted = "is known" in request.system
        reasoning = "As the right final result is known, odd." if hinted else "Hm."
        return reply(request, reasoning=reasoning, parity="odd" if hinted else "even")

    program = dspy.ChainOfThought("number: int -> parity: str")
    program.set_lm(plain_lm(FakeEngine(answer)))
    collected = collector(rescue=True).collect(program, trainset=numbers(2))
    assert collected.card.dropped_by_reason == {"score below threshold": 1, "answer talks about the hint": 1}
    assert [row.source for row in collected.rows] == ["student"]


def test_rescued_rows_are_at_most_their_share() -> None:
    engine = parity_engine(lambda request, number: number < 4 or "is known" in request.system)
    collected = collector(rescue=True, max_rescue_share=0.5).collect(parity_program(engine), trainset=numbers(20))
    assert collected.card.kept_by_source == {"student": 4, "rescue": 4}


def test_rescued_rows_that_are_left_out_are_counted() -> None:
    engine = parity_engine(lambda request, number: number < 4 or "is known" in request.system)
    collected = collector(rescue=True, max_rescue_share=0.5).collect(parity_program(engine), trainset=numbers(20))
    assert collected.card.dropped_by_reason["over max_rescue_share"] == 12


def skewed_engine() -> FakeEngine:
    """Solves all even numbers and every sixth odd one."""
    return parity_engine(lambda _, number: number % 2 == 0 or number % 12 == 1)


def test_rescued_rows_are_left_out_evenly_by_label() -> None:
    engine = parity_engine(lambda request, number: number < 4 or "is known" in request.system)
    sorted_by_label = sorted(numbers(40), key=lambda example: example.parity)
    collected = collector(rescue=True, max_rescue_share=0.8).collect(parity_program(engine), trainset=sorted_by_label)
    assert Counter(row.label for row in collected.rows if row.source == "rescue") == {"even": 8, "odd": 8}


def test_a_student_without_a_passing_run_of_its_own_learns_from_rescued_ones() -> None:
    engine = parity_engine(lambda request, number: "is known" in request.system)
    card = collector(rescue=True).collect(parity_program(engine), trainset=numbers(4)).card
    assert card.kept_by_source == {"rescue": 4}
    assert card.kept_by_label == {"even": 2, "odd": 2}


def test_a_share_of_rescued_rows_below_one_leaves_none_where_there_are_no_others() -> None:
    engine = parity_engine(lambda request, number: "is known" in request.system)
    with pytest.raises(NoTrainingDataError, match=r"3 x over max_rescue_share.*max_rescue_share=1\.0"):
        collector(rescue=True, max_rescue_share=0.8).collect(parity_program(engine), trainset=numbers(3))


def test_balance_gives_rows_the_trainsets_shares_of_labels() -> None:
    program = parity_program(skewed_engine())
    plain = collector().collect(program, trainset=numbers(48)).card.kept_by_label
    balanced = collector(balance=True).collect(program, trainset=numbers(48)).card
    assert plain == {"even": 24, "odd": 4}
    assert balanced.kept_by_label == {"even": 12, "odd": 12}
    assert balanced.dropped_by_reason["left out by balance"] == 12


def test_balance_keeps_the_skew_of_a_skewed_trainset() -> None:
    skewed = [example for example in numbers(40) if example.number % 2 == 0 or example.number % 8 == 1]
    counts = Counter(example.parity for example in skewed)
    engine = parity_engine(lambda *_: True)
    card = collector(balance=True).collect(parity_program(engine), trainset=skewed).card
    assert card.kept_by_label == dict(counts) == {"even": 20, "odd": 5}


def test_a_label_without_rows_is_a_warning() -> None:
    card = collector().collect(parity_program(parity_engine(even_only)), trainset=numbers(8)).card
    assert any("No row has the label ['odd']" in warning for warning in card.warnings)


def test_a_dominant_label_is_a_warning_that_says_what_to_do() -> None:
    card = collector().collect(parity_program(skewed_engine()), trainset=numbers(48)).card
    (warning,) = card.warnings
    assert warning == (
        "24 of 28 rows have the label 'even': training on them teaches that answer. Try num_samples=8, rescue=True, "
        "balance=True."
    )


def test_what_is_done_already_is_not_advised() -> None:
    engine = parity_engine(lambda _, number: number % 2 == 0)
    card = (
        collector(num_samples=8, rescue=True, balance=True, threshold=0.5)
        .collect(parity_program(engine), trainset=numbers(8))
        .card
    )
    assert card.warnings[-1].endswith("training on them teaches that answer. Give more examples.")


def test_a_label_that_dominates_the_trainset_as_well_is_no_warning() -> None:
    skewed = [example for example in numbers(80) if example.number % 2 == 0 or example.number % 16 == 1]
    unlabelled = [dspy.Example(number=number).with_inputs("number") for number in range(100, 108)]
    card = collector().collect(parity_program(parity_engine(lambda *_: True)), trainset=[*skewed, *unlabelled]).card
    assert card.warnings == ()


def no_rows(step: LoRAFinetune, **options: Any) -> str:
    with pytest.raises(NoTrainingDataError) as caught:
        step.collect(parity_program(parity_engine(lambda *_: False)), trainset=numbers(3), **options)
    return str(caught.value)


def test_no_rows_is_an_error_with_the_counts_and_things_to_try() -> None:
    assert no_rows(collector()) == (
        "No training rows: 3 runs on 3 examples, 0 passed. Dropped: 3 x score below threshold. Things to try: run a "
        "prompt step first (strategy 'p -> w'); let failing examples be tried again (num_samples=8, rescue=True); give "
        "a teacher program; give a lower threshold; take a larger model."
    )


def test_what_was_done_already_is_not_said_to_be_tried() -> None:
    engine = parity_engine(lambda *_: False)
    told = no_rows(
        collector(num_samples=8, rescue=True), teacher=parity_program(engine), earlier=[parity_program(engine)]
    )
    assert told.partition(" Things to try: ")[2] == "give a lower threshold; take a larger model."
    assert "tried again (num_samples=8, rescue=True)" in no_rows(collector(branches=8))


def test_where_most_runs_raised_the_cause_is_what_to_mend() -> None:
    def broken(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        raise KeyError("answer")

    assert placeless(no_rows(collector(broken))) == (
        "No training rows: 3 runs on 3 examples, 0 passed. Dropped: 3 x metric error: KeyError: 'answer'. Mend the "
        "metric."
    )


def test_where_the_adapter_can_t_read_what_it_writes_another_one_is_to_be_tried() -> None:
    signature = dspy.Signature("number: int -> size: Size", custom_types={"Size": Size})
    engine = FakeEngine(lambda request: "no" if request.schema is None else {"size": Size.LARGE.value})
    step = collector(lambda example, prediction, trace=None: prediction.size == Size.LARGE)
    with pytest.raises(NoTrainingDataError, match=r"; answer in JSON \(dspy\.configure\(adapter="):
        step.collect(predictor_over(engine, signature), trainset=numbers(3))
    with dspy.context(adapter=dspy.JSONAdapter()):
        assert len(step.collect(predictor_over(engine, signature), trainset=numbers(3)).rows) == 3


def test_passing_runs_that_call_no_trainable_predictor_are_no_rows() -> None:
    class Constant(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            return dspy.Prediction(parity=right(number))

    program = Constant()
    program.set_lm(plain_lm(two_step_engine(lambda *_: True)))
    with pytest.raises(NoTrainingDataError, match=r"3 passed\. Dropped: no calls to learn from"):
        collector().collect(program, trainset=numbers(3))


def test_collected_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    collected = collector().collect(parity_program(parity_engine(even_only)), trainset=numbers(8))
    assert tuple(read_rows(collected.write(tmp_path / "rows.jsonl"))) == collected.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_prompt": "best"}, "train_prompt='best'"),
        ({"max_rescue_share": 1.5}, "give a number from 0 to 1"),
        ({"max_traces_per_example": 0}, "give 1 or more"),
    ],
)
def test_row_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowOptions(**options)
