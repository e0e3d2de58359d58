"""Every call of a program's predictors is seen, in whatever copy of them and however it is made."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import dspy
import pytest
from fakes import CutEngine, Parity, numbers, parity_engine, plain_lm
from tries import call_rows

from bettertogether.rollouts.rollout import Attempt, Call
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


class One(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity)


def over(program: dspy.Module, engine: FakeEngine | None = None) -> Any:
    program.set_lm(plain_lm(engine or parity_engine(lambda *_: True)))
    return program


def test_a_predictors_forward_called_directly_is_seen_with_its_demos_and_whether_it_was_cut() -> None:
    class Direct(One):
        def forward(self, number: int) -> Any:
            return self.p.forward(number=number, demos=numbers(1, start=5))

    engine = CutEngine(lambda request: "[[ ## parity ## ]]\neven")
    (call,) = Runner(over(Direct(), engine)).run(numbers(1)[0]).calls
    assert (call.demos, call.cut) == (tuple(numbers(1, start=5)), True)


def test_a_shallow_copy_that_forward_makes_is_seen_with_what_it_was_given() -> None:
    class Shallow(One):
        def forward(self, number: int) -> Any:
            predictor = copy.copy(self.p)
            predictor.demos = numbers(1, start=5)
            return predictor(number=number)

    engine = parity_engine(lambda *_: True)
    (call,) = Runner(over(Shallow(), engine)).run(numbers(1)[0]).calls
    assert (call.predictor, call.demos) == ("p", tuple(numbers(1, start=5)))
    assert engine.requests[0].demos == 1


def test_a_part_that_forward_pickles_is_of_its_own_class_elsewhere() -> None:
    sent = []

    class Sending(One):
        def forward(self, number: int) -> Any:
            bare = copy.copy(self.p)
            bare.lm = None
            sent.append(pickle.dumps(bare))
            received = pickle.loads(sent[0])
            received.lm = self.p.lm
            return received(number=number)

    run = Runner(over(Sending())).run(numbers(1)[0])
    assert run.prediction.parity == "even"
    assert b"_WatchedPredictor" not in sent[0]


def test_a_class_of_programs_goes_with_its_last_user_and_what_it_closes_over() -> None:
    class Index(list[int]):
        pass

    def used() -> weakref.ref[Index]:
        index = Index([0])

        class Retrieving(One):
            def forward(self, number: int) -> Any:
                return self.p(number=index[number])

        assert Runner(over(Retrieving())).run(numbers(1)[0]).prediction.parity == "even"
        return weakref.ref(index)

    kept = used()
    gc.collect()
    assert kept() is None


def test_the_modules_of_one_class_are_watched_as_one_class() -> None:
    class Answering(One):
        def forward(self, number: int) -> Any:
            return self.p(number=number)

    program = over(Answering())
    for runner in [Runner(program) for _ in range(3)]:
        runner.run(numbers(1)[0])
    assert len(Answering.__subclasses__()) == 1


def test_a_run_turns_on_no_callback_of_dspy() -> None:
    seen = []

    class Looking(One):
        def forward(self, number: int) -> Any:
            seen.append((dspy.settings.callbacks, self.callbacks, self.p.callbacks))
            return self.p(number=number)

    Runner(over(Looking())).run(numbers(1)[0])
    assert seen == [([], [], [])]


def test_rollouts_that_a_sampled_run_asks_for_by_config_have_seeds_of_their_own() -> None:
    class Several(One):
        def forward(self, number: int) -> Any:
            return [self.p(number=number, config={"rollout_id": i}) for i in range(3)][-1]

    seeds = []
    for _ in range(2):
        engine = parity_engine(lambda *_: True)
        Runner(over(Several(), engine)).run(numbers(1)[0], Attempt("sample", 1, 1.0))
        seeds.append([request.seed for request in engine.requests])
    assert len(set(seeds[0])) == 3
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize(("cache", "distinct"), [(False, 3), (True, 1)])
def test_a_run_that_asks_the_same_again_has_an_answer_of_its_own_where_no_cache_repeats_one(
    cache: bool, distinct: int
) -> None:
    class Voting(One):
        def forward(self, number: int) -> Any:
            return [self.p(number=number) for _ in range(3)][-1]

    seeds = []
    for _ in range(2):
        engine = parity_engine(lambda *_: True)
        program = over(Voting(), engine)
        program.p.lm.cache = cache
        Runner(program).run(numbers(1)[0], Attempt("sample", 1, 1.0))
        seeds.append([request.seed for request in engine.requests])
    assert len(set(seeds[0])) == distinct
    assert seeds[0] == seeds[1]


class Seeded(One):
    """Votes by answers with seeds of their own."""

    def forward(self, number: int) -> Any:
        return [self.p(number=number, config={"temperature": 0.7, "seed": seed}) for seed in (7, 8)][-1]


def test_how_a_call_says_that_it_is_drawn_is_kept_where_the_run_is_as_the_program_is() -> None:
    engine = parity_engine(lambda *_: True)
    Runner(over(Seeded(), engine)).run(numbers(1)[0], Attempt())
    assert [(request.temperature, request.seed) for request in engine.requests] == [(0.7, 7), (0.7, 8)]


def test_tries_are_drawn_whatever_a_call_says_of_it_each_of_its_seeds_anew() -> None:
    engine = parity_engine(lambda *_: True)
    runner = Runner(over(Seeded(), engine))
    for number, temperature in enumerate((0.3, 0.6), 1):
        runner.run(numbers(1)[0], Attempt("sample", number, temperature))
    assert [request.temperature for request in engine.requests] == [0.3, 0.3, 0.6, 0.6]
    assert len({request.seed for request in engine.requests}) == 4


def test_an_lm_that_a_run_changed_is_as_it_was_in_the_next() -> None:
    class Warming(One):
        def forward(self, number: int) -> Any:
            self.p.lm.kwargs["temperature"] = 0.5 + self.p.lm.kwargs["temperature"]
            return self.p(number=number)

    engine = parity_engine(lambda *_: True)
    program = over(Warming(), engine)
    program.p.lm.kwargs["temperature"] = 0.0
    runner = Runner(program)
    for example in numbers(2):
        runner.run(example)
    assert [request.temperature for request in engine.requests] == [0.5, 0.5]


def test_a_row_under_the_two_step_adapter_is_the_prompt_of_its_first_step_and_an_answer_that_it_reads_back() -> None:
    main = FakeEngine(lambda _: "It is even.")
    reader = FakeEngine(lambda _: "[[ ## parity ## ]]\neven\n\n[[ ## completed ## ]]")
    with dspy.context(adapter=dspy.TwoStepAdapter(plain_lm(reader))):
        program = over(dspy.Predict(Parity), main)
        (call,) = Runner(program).run(numbers(1)[0]).calls
        (row,) = call_rows(program, main, call)
    assert call == Call("self", {"number": 0}, {"parity": "even"})
    assert (row.messages, row.completion) == (main.requests[0].messages, "parity: even")
