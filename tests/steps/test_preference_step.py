"""The preference step makes pairs of what single calls answered, and trains adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from fakes import (
    TwoSteps,
    api_lm,
    field_of,
    number_of,
    numbers,
    outputs_of,
    parity_match,
    plain_lm,
    reply,
    right,
    two_step_program,
)
from fakes import wrong as wrong_parity

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget, LoRAFinetune, PreferenceFinetune
from bettertogether.errors import ConfigError, DataError, NoTrainingDataError, NotTrainableError
from bettertogether.records import Blame, WeightDetails
from bettertogether.steps.pairs import RAISED
from bettertogether.steps.rows import Row, read_rows
from bettertogether.testing import FakeEngine, FakeRequest


def answer(request: FakeRequest) -> str:
    """The remark is "bad 0" at temperature 0, and else one of six, of which half are good; only then is the parity
    right, whatever its temperature. What it was taught to remark it remarks at temperature 0."""
    number = number_of(request)
    if request.learned is not None and not request.temperature:
        return request.learned
    if "remark" in outputs_of(request):
        draw = (request.seed or 0) % 6 if request.temperature else 0
        return reply(request, remark=f"{'good' if draw % 2 else 'bad'} {draw}")
    return reply(request, parity=right(number) if "good" in field_of(request, "remark") else wrong_parity(number))


def step(**options: Any) -> PreferenceFinetune:
    return PreferenceFinetune(parity_match, **({"validation_share": 0.0, "num_samples": 6} | options))


def details_of(optimizer: Any) -> WeightDetails:
    assert isinstance(optimizer.last.details, WeightDetails)
    return optimizer.last.details


def texts(rows: Sequence[Any], name: str) -> set[tuple[str, str]]:
    """Of each pair, the first words of a field in its answers."""

    def text(answer: str) -> str:
        return answer.partition(f"[[ ## {name} ## ]]\n")[2].split(" ")[0]

    return {(text(row.completion), text(row.rejected)) for row in rows}


def test_where_one_module_is_at_fault_it_takes_the_blame_all_pairs_are_its_and_its_lm_alone_is_tuned() -> None:
    engine = FakeEngine(answer)
    student, optimizer = two_step_program(engine), step(multitask=False)
    compiled = optimizer.compile(student, trainset=numbers(8))
    details = details_of(optimizer)
    assert details.blame == {"remark": Blame(8, 8, 8), "decide": Blame(8, 8, 0)}
    assert details.data_card.kept_by_predictor == {"remark": 16}
    assert details.data_card.pairs == 16
    assert [texts(rows, "remark") for rows in engine.trainings] == [{("good", "bad")}]
    assert compiled.decide.lm is student.decide.lm
    assert compiled.remark.lm.model.startswith("local/fake@r1-")
    assert [compiled(number=number).parity for number in range(8)] == [right(number) for number in range(8)]


def test_the_answers_of_a_pair_have_one_prompt_the_one_that_the_program_sends() -> None:
    engine = FakeEngine(answer)
    student = two_step_program(engine)
    student.remark.demos = [dspy.Example(number=50, remark="good 9")]
    step().compile(student, trainset=numbers(2))
    sent = {repr(request.messages) for request in engine.requests if "remark" in outputs_of(request)}
    assert {repr(row.messages) for row in engine.trainings[0]} == sent
    assert all("good 9" in repr(row.messages) and not row.forms for row in engine.trainings[0])


def test_a_run_that_passed_gives_pairs_with_the_new_answers_that_fail() -> None:
    def good_at_first(request: FakeRequest) -> str:
        if "remark" in outputs_of(request) and not request.temperature:
            return reply(request, remark="good 7")
        return answer(request)

    engine = FakeEngine(good_at_first)
    optimizer = step()
    optimizer.compile(two_step_program(engine), trainset=numbers(3))
    assert texts(engine.trainings[0], "remark") == {("good", "bad")}
    assert details_of(optimizer).blame == {}


@pytest.mark.parametrize("where", ["program", "metric"])
def test_an_answer_whose_run_raised_is_in_no_pair_and_is_counted(where: str) -> None:
    class Searching(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            remark = self.remark(number=number).remark
            if where == "program" and "bad 0" in remark:
                raise TimeoutError("no answer from the search")
            return dspy.Prediction(remark=remark, parity=self.decide(number=number, remark=remark).parity)

    def judged(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        if where == "metric" and "bad 0" in prediction.remark:
            raise ConnectionError("no judge")
        return parity_match(example, prediction)

    program = Searching()
    program.set_lm(plain_lm(FakeEngine(answer)))
    optimizer = PreferenceFinetune(judged, validation_share=0.0, num_samples=6, frozen=["decide"], max_errors=100)
    collected = optimizer.collect(program, trainset=numbers(8))
    assert not any("bad 0" in f"{row.completion} {row.rejected}" for row in collected.rows)
    assert texts(collected.rows, "remark") == {("good", "bad")}
    # The first answer to each remark is "bad 0".
    assert collected.card.dropped_by_reason[RAISED] >= 8


def test_an_answer_that_can_not_be_read_is_the_rejected_one_of_a_pair_as_it_was_written_to_the_same_prompt() -> None:
    def unreadable_at_times(request: FakeRequest) -> str:
        text = answer(request)
        if "remark" not in outputs_of(request) or "good" in text:
            return text
        # DSPy asks once more in JSON, which is another prompt.
        return "nothing in JSON" if request.schema or "JSON object" in request.user else "no remark"

    engine = FakeEngine(unreadable_at_times)
    optimizer = step()
    optimizer.compile(two_step_program(engine), trainset=numbers(3))
    (rows,) = engine.trainings
    assert {row.rejected for row in rows} == {"no remark"}
    assert texts(rows, "remark") == {("good", "")}
    assert all("JSON" not in repr(row.messages) for row in rows)
    assert details_of(optimizer).blame == {"remark": Blame(3, 3, 3)}


def test_an_answer_that_could_not_be_read_is_not_preferred_where_the_program_got_by_without_it() -> None:
    class Careful(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            try:
                remark = self.remark(number=number).remark
            except AdapterParseError:
                remark = "good"
            return self.decide(number=number, remark=remark)

    def unreadable_at_times(request: FakeRequest) -> str:
        text = answer(request)
        return text if "bad" not in text or not request.temperature else "no remark"

    program = Careful()
    program.set_lm(plain_lm(FakeEngine(unreadable_at_times)))
    assert texts(step().collect(program, trainset=numbers(3)).rows, "remark") == {("good", "bad")}


def test_where_a_predictor_is_called_twice_both_calls_have_pairs() -> None:
    class Twice(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            said = [self.remark(number=number + more).remark for more in (0, 100)]
            return self.decide(number=number, remark=" ".join(said))

    program = Twice()
    program.set_lm(plain_lm(FakeEngine(answer)))
    rows = step().collect(program, trainset=numbers(1)).rows
    assert len({row.prompt for row in rows}) == len(rows) == 2


def test_pairs_are_distinct_and_bounded_by_example_and_predictor() -> None:
    engine = FakeEngine(answer)
    optimizer = step(max_pairs_per_example=1, num_samples=12)
    optimizer.compile(two_step_program(engine), trainset=numbers(2))
    assert len(engine.trainings[0]) == 2
    step(max_pairs_per_example=50, num_samples=12).compile(two_step_program(engine), trainset=numbers(2))
    pairs = [(repr(row.messages), row.completion, row.rejected) for row in engine.trainings[1]]
    assert len(set(pairs)) == len(pairs) <= 2 * 3
    dropped = details_of(optimizer).data_card.dropped_by_reason
    assert dropped["over max_pairs_per_example"] == len(pairs) - 2


def test_an_answer_that_passes_and_fails_is_of_no_pair() -> None:
    class Flaky:
        calls = 0

        def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
            self.calls += 1
            return self.calls % 2 == 0

    def alike(request: FakeRequest) -> str:
        return reply(request, **{name: "1" for name in outputs_of(request)})

    optimizer = PreferenceFinetune(Flaky(), num_threads=1)
    with pytest.raises(NoTrainingDataError, match=r"1 x decide: the same answer passed and failed"):
        optimizer.compile(two_step_program(FakeEngine(alike)), trainset=numbers(1))


def test_a_frozen_predictor_takes_its_blame_and_gives_no_pairs() -> None:
    optimizer = step(frozen=["remark"])
    with pytest.raises(NoTrainingDataError, match="no answer of the call passed"):
        optimizer.compile(two_step_program(FakeEngine(answer)), trainset=numbers(3))
    collected = step(frozen=["decide"]).collect(two_step_program(FakeEngine(answer)), trainset=numbers(3))
    assert collected.blame["decide"].repaired == 0


@pytest.mark.parametrize(("score", "passed", "do"), [(0.0, 0, "Three things to try"), (1.0, 15, "Nothing is left")])
def test_a_metric_that_gives_all_runs_the_same_score_is_an_error_that_says_so(
    score: float, passed: int, do: str
) -> None:
    engine = FakeEngine(answer)
    optimizer = PreferenceFinetune(lambda example, prediction, trace=None: score, num_samples=2)
    message = (
        rf"No pairs: 15 runs on 3 examples, {passed} passed\. The metric gave all of them the score {score:g}\..*{do}"
    )
    with pytest.raises(NoTrainingDataError, match=message):
        optimizer.compile(two_step_program(engine), trainset=numbers(3))
    assert engine.trainings == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_pairs_per_example": 0}, "max_pairs_per_example=0"),
        ({"metric": None}, "metric=None"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceFinetune(**({"metric": parity_match} | options))


def test_an_lm_that_can_not_be_trained_is_an_error_before_any_work() -> None:
    program = two_step_program(FakeEngine(answer))
    program.set_lm(api_lm(answer))
    optimizer = BetterTogether(parity_match, r=step())
    with pytest.raises(NotTrainableError, match="local_lm"):
        optimizer.compile(program, trainset=numbers(8), strategy="r")
    assert program.remark.lm.engine.fake.requests == []


def test_a_teacher_that_no_step_asks_is_told() -> None:
    teacher, student = two_step_program(FakeEngine(answer)), two_step_program(FakeEngine(answer))
    given: dict[str, Any] = {"trainset": numbers(2), "valset": numbers(2, start=4), "teacher": teacher}
    optimizer = BetterTogether(parity_match, r=step(), w=LoRAFinetune(parity_match, num_samples=0, rescue=False))
    report = optimizer.compile(student, strategy="r", progress=False, **given).report
    assert "The teacher is not asked: the steps ['r'] learn from the student's own answers alone" in report.warnings[1]
    assert teacher.remark.lm.engine.requests == []
    report = optimizer.compile(student, strategy="w", progress=False, **given).report
    assert "The teacher is not asked" not in "".join(report.warnings)


def test_pairs_that_are_collected_alone_are_not_of_a_teacher_either() -> None:
    teacher, student = two_step_program(FakeEngine(answer)), two_step_program(FakeEngine(answer))
    rows = step().collect(student, trainset=numbers(2), teacher=teacher).rows
    assert texts(rows, "remark") == {("good", "bad")}
    assert teacher.remark.lm.engine.requests == []


def test_a_preference_step_goes_on_with_the_weights_and_prompts_of_the_steps_before(tmp_path: Path) -> None:
    engine = FakeEngine(answer)
    w = LoRAFinetune(parity_match, num_samples=0, rescue=False, branches=2, max_traces_per_example=1)

    def compiled() -> dspy.Module:
        optimizer = BetterTogether(
            parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=1, rescue=False), w=w, r=step(num_samples=3)
        )
        return optimizer.compile(
            two_step_program(engine),
            trainset=numbers(6, start=20),
            valset=numbers(4),
            strategy="p -> w -> r -> p",
            run_dir=tmp_path,
            progress=False,
        )

    report = compiled().report
    assert [(record.name, record.status) for record in report.rounds] == [
        ("student", "complete"),
        ("p", "complete"),
        ("p -> w", "complete"),
        ("p -> w -> r", "complete"),
        ("p -> w -> r -> p", "complete"),
    ]
    before, after = (record.models or {} for record in report.rounds[2:4])
    assert [set(models.values()) for models in (before, after)] == [{before["remark"]}, {after["remark"]}]
    assert before["remark"].startswith("local/fake@r1-")
    assert after["remark"].startswith("local/fake@r2-")
    asked = len(engine.requests)
    assert compiled().report.to_dict()["rounds"] == report.to_dict()["rounds"]
    assert len(engine.requests) == asked


def test_the_pairs_file_reads_back_as_what_was_trained_on() -> None:
    engine = FakeEngine(answer)
    optimizer = step()
    optimizer.compile(two_step_program(engine), trainset=numbers(4))
    file = Path(next(iter(details_of(optimizer).adapters.values())).rows)
    assert tuple(row.training_row for row in read_rows(file)) == engine.trainings[0]
    step().compile(two_step_program(engine), trainset=[], rows=file)
    assert engine.trainings[1] == engine.trainings[0]


@pytest.mark.parametrize("kind", [LoRAFinetune, PreferenceFinetune])
def test_rows_of_the_other_kind_are_refused(kind: Any) -> None:
    rejected = "b" if kind is LoRAFinetune else None
    rows = [Row(({"role": "user", "content": "q"},), "a", "remark", 0, rejected=rejected)]
    with pytest.raises(DataError, match="PreferenceFinetune learns pairs, LoRAFinetune rows"):
        kind(parity_match).compile(two_step_program(FakeEngine(answer)), trainset=[], rows=rows)


def test_a_run_takes_what_was_estimated_and_the_report_says_what_became_of_pairs_of_the_valset() -> None:
    engine = FakeEngine(answer)
    optimizer = BetterTogether(parity_match, r=PreferenceFinetune(parity_match, num_samples=6))
    given: dict[str, Any] = {"trainset": numbers(8, start=20), "valset": numbers(5), "strategy": "r"}
    said = optimizer.estimate(two_step_program(engine), **given).rounds[1]
    report = optimizer.compile(two_step_program(engine), progress=False, **given).report
    for name in ("lm_calls", "prompt_tokens", "trained_tokens"):
        least, taken, most = (getattr(each, name) for each in (said.low, report.rounds[1].ledger, said.high))
        assert least <= taken <= most, name
    text = "r: 16 pairs; held-out loss of pairs 2.00 -> 1.00; of their chosen answers, per token, 2.00 -> 1.00"
    assert text in " ".join(str(report).split())
    details = report.rounds[1].details
    assert isinstance(details, WeightDetails)
    assert details.data_card.pairs == len(engine.trainings[-1]) == 16


def test_two_lms_are_each_trained_on_the_pairs_of_their_predictors() -> None:
    first, second = FakeEngine(answer), FakeEngine(answer, base_name="other")
    program = two_step_program(first)
    program.decide.lm = plain_lm(second)
    compiled = step().compile(program, trainset=numbers(4))
    assert (len(first.trainings), len(second.trainings)) == (1, 0)
    assert compiled.decide.lm is program.decide.lm


def test_a_budget_that_ends_among_the_new_answers_gives_the_best_round_so_far_and_a_larger_one_goes_on(
    tmp_path: Path,
) -> None:
    def compiled(**options: Any) -> dspy.Module:
        optimizer = BetterTogether(parity_match, r=step())
        given: dict[str, Any] = {"trainset": numbers(4, start=20), "valset": numbers(4), "strategy": "r"}
        program = two_step_program(FakeEngine(answer))
        return optimizer.compile(program, run_dir=tmp_path, progress=False, **given, **options)

    cut = compiled(budget=Budget(metric_calls=20))
    assert [(record.name, record.status) for record in cut.report.rounds] == [("student", "complete"), ("r", "skipped")]
    assert [record.status for record in compiled().report.rounds] == ["complete", "complete"]
