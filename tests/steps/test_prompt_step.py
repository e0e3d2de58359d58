"""The prompt step keeps the demo set that scores best on examples it was not bootstrapped from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import dspy
import pytest
from fakes import (
    Parity,
    learner,
    models,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    prompt_details,
    two_step_engine,
    two_step_program,
)

from bettertogether.callbacks import Callback, CandidateEvent, listening
from bettertogether.errors import ConfigError, DataError, ProgramError, TooManyErrors
from bettertogether.records import PromptDetails
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.steps.prompt_capture import render_prompt
from bettertogether.steps.prompt_step import BootstrapFewShotRS
from bettertogether.steps.step import StepContext
from bettertogether.testing import FakeEngine, FakeRequest


def needs_even_demo(request: FakeRequest, number: int) -> bool:
    """Knows a third of the numbers, and all of them when a demo shows an even number."""
    return number % 3 == 0 or any("\neven" in m["content"] for m in request.messages if m["role"] == "assistant")


def step(**options: Any) -> BootstrapFewShotRS:
    return BootstrapFewShotRS(parity_match, **{"num_samples": 0, "rescue": False, **options})


def names(compiled: dspy.Module) -> list[str]:
    return [candidate["name"] for candidate in compiled.candidate_programs]


def test_the_best_demo_set_is_kept(learning_engine: FakeEngine) -> None:
    program = parity_program(learning_engine)
    compiled = step().compile(program, trainset=numbers(60))
    assert len(compiled.demos) > 0
    assert program.demos == []
    best, *others = compiled.candidate_programs
    assert best["score"] == max(candidate["score"] for candidate in [*others, best]) > 0.6


def test_traces_are_bootstrapped_once_and_every_candidate_scored_once() -> None:
    engine = parity_engine(learner)
    optimizer = step(train_size=10, val_size=12, race=False, num_candidates=4)
    optimizer.compile(parity_program(engine), trainset=numbers(60))
    made = len(prompt_details(optimizer.last).candidates)
    assert made == 1 + 1 + 4  # current (which is zero-shot), labels, four demo sets
    assert len(engine.requests) == 10 + 12 * made
    assert optimizer.ledger.metric_calls == len(engine.requests)
    assert Counter(request.demos > 0 for request in engine.requests) == {False: 10 + 12, True: 12 * 5}


def test_the_examples_bootstrapped_from_are_not_scored_on() -> None:
    engine = parity_engine(lambda *_: False)
    step(train_size=10, val_size=20, max_labeled_demos=0, num_candidates=0).compile(
        parity_program(engine), trainset=numbers(30)
    )
    assert len({request.user for request in engine.requests}) == 30


@pytest.mark.parametrize(
    ("options", "count", "valset", "sizes"),
    [
        ({}, 40, 0, (12, 28)),
        ({}, 1000, 0, (100, 250)),
        ({"train_size": 15, "val_size": 35}, 50, 0, (15, 35)),
        ({"train_size": 15}, 50, 0, (15, 35)),
        ({"val_size": 10}, 50, 0, (15, 10)),
        ({"train_size": 99}, 10, 0, (9, 1)),
        ({}, 2, 0, (1, 1)),
        ({"train_size": 15, "val_size": 6}, 50, 12, (15, 6)),
    ],
)
def test_examples_are_split_without_overlap(
    options: dict[str, int], count: int, valset: int, sizes: tuple[int, int]
) -> None:
    train, validation = step(**options).split(numbers(count), numbers(valset, start=1000), seed=0)
    assert (len(train), len(validation)) == sizes
    assert not {e.number for e in train} & {e.number for e in validation}


def test_examples_that_ask_the_same_give_demos_or_scores_and_not_both() -> None:
    train, validation = step().split([*numbers(40), *numbers(40)], None, seed=0)
    assert (len(train), len(validation)) == (24, 56)
    assert not {e.number for e in train} & {e.number for e in validation}


def test_the_paper_takes_100_and_250_examples_one_run_each_and_no_race() -> None:
    optimizer = BootstrapFewShotRS.paper(parity_match)
    assert (optimizer.train_size, optimizer.val_size, optimizer.race) == (100, 250, False)
    assert (optimizer.sampling.num_samples, optimizer.sampling.rescue) == (0, False)
    assert (optimizer.num_candidates, optimizer.max_bootstrapped_demos, optimizer.max_labeled_demos) == (6, 3, 3)


def test_paper_options_may_be_overridden() -> None:
    optimizer = BootstrapFewShotRS.paper(parity_match, train_size=15, val_size=35, num_candidates=2)
    assert (optimizer.train_size, optimizer.val_size, optimizer.num_candidates) == (15, 35, 2)


def test_both_parts_of_the_split_have_the_trainsets_labels() -> None:
    train, validation = step().split(sorted(numbers(40), key=lambda e: e.parity), None, seed=0)
    assert Counter(e.parity for e in train) == {"even": 6, "odd": 6}
    assert Counter(e.parity for e in validation) == {"even": 14, "odd": 14}


def test_with_a_valset_candidates_are_scored_on_it_and_demos_come_from_the_trainset() -> None:
    engine = parity_engine(learner)
    optimizer = step()
    compiled = optimizer.compile(parity_program(engine), trainset=numbers(12), valset=numbers(12, start=100))
    assert prompt_details(optimizer.last).validation_examples == 12
    assert prompt_details(optimizer.last).traces.examples == 12
    assert {demo.number for demo in compiled.demos} <= set(range(12))


def test_the_current_prompts_are_a_candidate_and_win_when_they_are_best() -> None:
    engine = parity_engine(lambda request, number: "SECRET" in request.system or number % 3 == 0)
    program = parity_program(engine)
    program.signature = program.signature.with_instructions("SECRET")
    compiled = step().compile(program, trainset=numbers(40), restart_from=parity_program(engine))
    assert compiled.candidate_programs[0]["name"] == "current"
    assert compiled.signature.instructions == "SECRET"


def test_a_restart_starts_from_the_original_prompts() -> None:
    engine = parity_engine(lambda request, number: "WORSE" not in request.system and learner(request, number))
    program, original = parity_program(engine), parity_program(engine)
    program.signature = program.signature.with_instructions("WORSE")
    compiled = step().compile(program, trainset=numbers(40), restart_from=original)
    assert compiled.signature.instructions == original.signature.instructions
    assert compiled.demos


def test_without_restart_demos_are_added_to_the_current_instructions() -> None:
    engine = parity_engine(lambda request, number: learner(request, number))
    program, original = parity_program(engine), parity_program(engine)
    program.signature = program.signature.with_instructions("MINE")
    compiled = step(restart=False).compile(program, trainset=numbers(40), restart_from=original)
    assert compiled.signature.instructions == "MINE"
    assert compiled.demos


def test_a_program_with_demos_has_zero_shot_and_current_as_candidates() -> None:
    program = parity_program(parity_engine(learner))
    program.demos = numbers(2, start=80)
    compiled = step().compile(program, trainset=numbers(40))
    assert {"current", "zero-shot", "labels"} <= set(names(compiled))


def test_a_zero_shot_program_is_one_candidate_not_two() -> None:
    compiled = step().compile(parity_program(parity_engine(learner)), trainset=numbers(40))
    assert "zero-shot" not in names(compiled)


def test_no_labelled_demos_are_shown_when_none_are_asked_for() -> None:
    compiled = step(max_labeled_demos=0).compile(parity_program(parity_engine(learner)), trainset=numbers(40))
    assert "labels" not in names(compiled)
    assert all(demo.get("augmented") for each in compiled.candidate_programs for demo in each["program"].demos)


def test_no_bootstrapped_demos_are_shown_when_none_are_asked_for() -> None:
    compiled = step(max_bootstrapped_demos=0).compile(parity_program(parity_engine(learner)), trainset=numbers(40))
    assert not any(demo.get("augmented") for each in compiled.candidate_programs for demo in each["program"].demos)


def test_a_race_saves_calls_and_finds_the_same_winner_on_separable_data() -> None:
    chosen, calls = [], []
    for race in (True, False):
        engine = parity_engine(needs_even_demo)
        optimizer = step(race=race, train_size=10, num_candidates=8, max_bootstrapped_demos=1, max_labeled_demos=0)
        compiled = optimizer.compile(parity_program(engine), trainset=numbers(200))
        chosen.append([demo.number for demo in compiled.demos])
        calls.append(len(engine.requests))
        race_result = prompt_details(optimizer.last).race
        assert race_result.calls_made + 10 == len(engine.requests)
        assert (race_result.calls_saved > 0) is race
    assert chosen[0] == chosen[1]
    assert calls[0] < 0.7 * calls[1]


def test_scores_of_the_first_slice_are_not_made_again() -> None:
    engine = parity_engine(learner)
    optimizer = step(train_size=10, val_size=50)
    optimizer.compile(parity_program(engine), trainset=numbers(60))
    prompts = Counter(str(request.messages) for request in engine.requests)
    assert max(prompts.values()) == 1


def test_demos_of_several_predictors_come_from_the_same_trace() -> None:
    engine = two_step_engine(learner)
    compiled = step(max_labeled_demos=0).compile(two_step_program(engine), trainset=numbers(60))
    assert compiled.remark.demos
    assert [d.number for d in compiled.remark.demos] == [d.number for d in compiled.decide.demos]
    assert [d.remark for d in compiled.remark.demos] == [d.remark for d in compiled.decide.demos]


def test_demos_that_do_not_fit_the_context_are_dropped_by_token_count() -> None:
    engine = parity_engine(learner)
    program = parity_program(engine)
    engine.max_length = len(engine.prompt_tokens(render_prompt(program, engine, {"number": 0}, numbers(1)))) + 256
    optimizer = step()
    compiled = optimizer.compile(program, trainset=numbers(40))
    assert max(len(candidate["program"].demos) for candidate in compiled.candidate_programs) == 1
    assert prompt_details(optimizer.last).dropped_demos["self"] > 0


def test_the_programs_own_lm_answers_whatever_dspy_settings_lm_is() -> None:
    engine, other = parity_engine(learner), parity_engine(lambda *_: True, base_name="other")
    program = two_step_program(two := two_step_engine(learner))
    with dspy.context(lm=plain_lm(other)):
        step().compile(parity_program(engine), trainset=numbers(40))
        step().compile(program, trainset=numbers(20))
    assert other.requests == []
    assert models(engine.requests) == models(two.requests) == {"local/fake"}


def test_a_teacher_makes_the_demos_and_the_student_is_scored() -> None:
    student, teacher = parity_engine(learner), parity_engine(lambda *_: True, base_name="big")
    optimizer = step(train_size=10, val_size=12)
    optimizer.compile(parity_program(student), trainset=numbers(22), teacher=parity_program(teacher))
    assert len(teacher.requests) == 10
    assert len(student.requests) == prompt_details(optimizer.last).race.calls_made
    assert prompt_details(optimizer.last).traces.solved == 10


def test_an_example_that_failed_is_tried_again_for_a_demo() -> None:
    engine = parity_engine(lambda request, number: request.temperature > 0)
    optimizer = BootstrapFewShotRS(parity_match, num_samples=2, rescue=False, train_size=4, val_size=4)
    optimizer.compile(parity_program(engine), trainset=numbers(8))
    assert prompt_details(optimizer.last).traces.solved == 4
    assert step(max_bootstrapped_demos=4).sampling.enough == 8


def test_a_step_that_solves_nothing_returns_the_current_prompts() -> None:
    compiled = step(max_labeled_demos=0).compile(parity_program(parity_engine(lambda *_: False)), trainset=numbers(20))
    assert names(compiled) == ["current"]
    assert compiled.demos == []


def test_the_step_gain_is_the_rise_of_the_validation_score() -> None:
    optimizer = step(train_size=10, val_size=12, race=False)
    optimizer.compile(parity_program(parity_engine(lambda request, _: request.demos > 0)), trainset=numbers(30))
    assert optimizer.step_gain == 1.0


def test_a_rise_on_a_valset_is_no_evidence_besides_the_score_there() -> None:
    optimizer = step(race=False)
    program = parity_program(parity_engine(lambda request, _: request.demos > 0))
    optimizer.compile(program, trainset=numbers(30), valset=numbers(12, start=30))
    assert optimizer.step_gain is None


def test_of_equal_candidates_the_one_with_fewer_demos_wins() -> None:
    compiled = step().compile(parity_program(parity_engine(lambda *_: True)), trainset=numbers(40))
    assert compiled.demos == []
    assert compiled.candidate_programs[0]["name"] == "current"


def knows_but_one_demo(request: FakeRequest, number: int) -> bool:
    return request.demos != 1


@pytest.mark.parametrize(("demos", "left"), [(0, ["current"]), (2, ["current", "zero-shot"])])
def test_where_the_prompts_given_solve_all_only_those_with_fewer_demos_are_tried(demos: int, left: list[str]) -> None:
    """On a valset, where all of it is known of them; what is chosen is what a full race chooses."""
    raced, scored = step(), step(race=False)
    for optimizer in (raced, scored):
        program = parity_program(parity_engine(knows_but_one_demo))
        program.demos = numbers(demos, start=80)
        optimizer.compile(program, trainset=numbers(30), valset=numbers(40, start=100))
    details = prompt_details(raced.last)
    assert [candidate.name for candidate in details.candidates] == left
    assert details.chosen == prompt_details(scored.last).chosen == ("zero-shot" if demos else "current")
    assert len(prompt_details(scored.last).candidates) > len(left)


def test_with_a_threshold_a_score_of_one_may_be_exceeded() -> None:
    optimizer = step(threshold=1.0)
    program = parity_program(parity_engine(lambda *_: True))
    optimizer.compile(program, trainset=numbers(30), valset=numbers(40, start=100))
    assert len(prompt_details(optimizer.last).candidates) > 1


def test_the_same_seed_gives_the_same_program_and_another_seed_another() -> None:
    def demos(seed: int) -> list[int]:
        compiled = step().compile(parity_program(parity_engine(learner)), trainset=numbers(30), seed=seed)
        return [demo.number for demo in compiled.demos]

    assert demos(1) == demos(1) != demos(2)


def test_the_result_does_not_depend_on_timing() -> None:
    def details(factor: float) -> PromptDetails:
        engine = parity_engine(learner, delay_s=lambda r: factor * (hash((r.user, factor)) % 5) / 2000)
        optimizer = step(val_size=20)
        optimizer.compile(parity_program(engine), trainset=numbers(40), num_threads=4)
        return prompt_details(optimizer.last)

    assert details(0.0) == details(1.0) == details(2.0)


def test_runs_of_the_store_are_used_again() -> None:
    engine, store = parity_engine(learner), RolloutStore()
    step().compile(parity_program(engine), trainset=numbers(40), store=store)
    made = len(engine.requests)
    step().compile(parity_program(engine), trainset=numbers(40), store=store)
    assert len(engine.requests) == made


class Watch(Callback):
    def __init__(self) -> None:
        self.events: list[CandidateEvent] = []

    def on_candidate(self, event: CandidateEvent) -> None:
        self.events.append(event)


def test_a_candidate_event_is_sent_for_every_score() -> None:
    watch = Watch()
    optimizer = step(race=False)
    with listening([watch]):
        optimizer.compile(parity_program(parity_engine(learner)), trainset=numbers(40))
    candidates = prompt_details(optimizer.last).candidates
    assert [event["number"] for event in watch.events] == list(range(1, len(candidates) + 1))
    assert max(event["score"] for event in watch.events) == watch.events[-1]["best_score"]


def test_in_a_race_the_last_event_of_a_candidate_has_the_mean_of_all_its_scores() -> None:
    watch = Watch()
    optimizer = step(race=True)
    with listening([watch]):
        optimizer.compile(parity_program(parity_engine(learner)), trainset=numbers(60))
    candidates = prompt_details(optimizer.last).candidates
    last = {event["number"]: event["score"] for event in watch.events}
    assert len(watch.events) > len(candidates)
    assert [last[number] for number in range(1, len(candidates) + 1)] == pytest.approx([c.score for c in candidates])
    whole = [each.score for each in candidates if each.score is not None and not each.stopped]
    assert watch.events[-1]["best_score"] == pytest.approx(max(whole))


def test_a_metric_that_gives_less_than_failing_does_is_refused() -> None:
    optimizer = BootstrapFewShotRS(lambda e, p, trace=None: -0.25)
    with pytest.raises(ConfigError, match=r"The metric gave -0\.25, and an example that fails scores 0"):
        optimizer.compile(parity_program(parity_engine(learner)), trainset=numbers(20))


def test_too_many_errors_in_the_metric_end_the_step() -> None:
    optimizer = BootstrapFewShotRS(lambda e, p, trace=None: 1 / 0, max_errors=2)
    with pytest.raises(TooManyErrors, match="ZeroDivisionError"):
        optimizer.compile(parity_program(parity_engine(learner)), trainset=numbers(20))


def test_an_empty_trainset_and_one_example_without_a_valset_are_errors() -> None:
    program = parity_program(parity_engine(learner))
    with pytest.raises(DataError, match="trainset cannot be empty"):
        step().compile(program, trainset=[])
    with pytest.raises(DataError, match=r"one example, .* give two or more that differ, or a valset"):
        step().compile(program, trainset=numbers(1))


def test_a_program_without_an_lm_is_an_error() -> None:
    with pytest.raises(ProgramError, match="must have a language model set"):
        step().compile(dspy.Predict("number -> parity"), trainset=numbers(4))


@pytest.mark.parametrize(
    "option", ["num_candidates", "max_bootstrapped_demos", "max_labeled_demos", "train_size", "val_size"]
)
def test_counts_are_checked(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}=-1 is not allowed"):
        step(**{option: -1})


def test_it_works_as_any_dspy_teleprompter_does() -> None:
    assert isinstance(step(), dspy.teleprompt.Teleprompter)
    assert step().compile(parity_program(parity_engine(learner)), trainset=numbers(40))._compiled is True


def test_a_program_whose_calls_are_not_seen_gets_a_warning_that_says_why_it_has_no_demos() -> None:
    class Strangers(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = dspy.Predict("question -> answer")

        def forward(self, number: int) -> dspy.Prediction:
            stranger = dspy.Predict(Parity)
            stranger.lm = self.unused.lm
            return stranger(number=number)

    program = Strangers()
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    step = BootstrapFewShotRS(parity_match, num_candidates=1, max_labeled_demos=0)
    step.compile(program, trainset=numbers(10))
    warnings = [warning for warning in step.warnings if warning.startswith("bootstrap demos: no demo comes")]
    assert len(warnings) == 1
    assert "3 of the runs that passed made no call that was seen" in warnings[0]
    assert "Keep predictors as attributes" in warnings[0]


@pytest.mark.parametrize(
    ("train", "valset", "is_tuned", "options", "chooses_on_it"),
    [
        (40, 40, False, {}, True),
        (36, 12, False, {}, True),
        (36, 4, False, {}, False),
        (36, 4, True, {}, True),
        (19, 1, False, {}, True),
        (349, 200, False, {}, True),
        (350, 200, False, {}, False),
        (350, 200, True, {}, True),
        (50, 50, False, {"train_size": 15, "val_size": 35}, False),
    ],
)
def test_in_a_strategy_it_chooses_on_the_valset_but_where_that_is_small_or_the_trainset_has_enough_for_both(
    train: int, valset: int, is_tuned: bool, options: dict[str, int], chooses_on_it: bool
) -> None:
    context = StepContext(numbers(train), numbers(valset, start=1000))
    assert bool(step(**options).sparing(context, is_tuned=is_tuned).valset) is chooses_on_it
