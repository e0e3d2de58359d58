"""One call of a run is answered anew, those before it as they were, and the blame goes to the predictor at fault."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import dspy
import pytest
from fakes import TwoSteps, api_lm, field_of, number_of, numbers, outputs_of, plain_lm, reply, right, wrong

from bettertogether.records import Blame
from bettertogether.rollouts.branches import BranchPoint, blame, branch_runs
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, TraceSet, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.testing import FakeEngine, FakeRequest

BRANCHES = Sampling(num_samples=0, temperature=0.9, rescue=False, branches=4)


def parity_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(example.parity == prediction.parity)


def is_good(request: FakeRequest) -> bool:
    """At temperature 0 never, else every other time."""
    return request.temperature > 0 and (request.seed or 0) % 2 == 0


def remark_at_fault(request: FakeRequest) -> str:
    number = number_of(request)
    if "remark" in outputs_of(request):
        return reply(request, remark="good" if is_good(request) else "bad")
    return reply(request, parity=right(number) if field_of(request, "remark") == "good" else wrong(number))


def decide_at_fault(request: FakeRequest) -> str:
    number = number_of(request)
    if "remark" in outputs_of(request):
        return reply(request, remark=f"sample {request.seed}" if request.temperature else "plain")
    return reply(request, parity=right(number) if is_good(request) else wrong(number))


def traces_of(program: dspy.Module, sampling: Sampling = BRANCHES, examples: int = 3, **settings: Any) -> TraceSet:
    options = ExamplePass(parity_match, settings=RunSettings(**{"num_threads": 1, **settings}))
    return collect_traces(program, numbers(examples), options, sampling=sampling)


def two_steps(engine: FakeEngine, **options: Any) -> TwoSteps:
    program = TwoSteps()
    program.set_lm(plain_lm(engine, **options))
    return program


@pytest.mark.parametrize(("answer", "guilty"), [(remark_at_fault, "remark"), (decide_at_fault, "decide")])
def test_only_the_predictor_at_fault_repairs_failed_runs(answer: Any, guilty: str) -> None:
    traces = traces_of(two_steps(FakeEngine(answer)), examples=8)
    found = blame(traces.branches)
    other = {"remark": "decide", "decide": "remark"}[guilty]
    assert found[other] == Blame(calls=8, failed_runs=8, repaired=0)
    assert found[guilty].repaired == len({t.index for t in traces.passing}) > 5


def test_calls_before_the_one_answered_anew_are_not_made_and_those_after_it_are_the_programs_own() -> None:
    engine = FakeEngine(decide_at_fault)
    traces = traces_of(two_steps(engine), examples=1)
    asked = [("remark" in outputs_of(request), request.temperature) for request in engine.requests]
    run, remark, decide = asked[:2], asked[2:10], asked[10:]
    assert run == [(True, 0.0), (False, 0.0)]
    assert remark == [(True, 0.9), (False, 0.0)] * 4
    assert decide == [(False, 0.9)] * 4
    assert len({request.seed for request in engine.requests[10:]}) == 4
    assert [branch.ledger.lm_calls for branch in traces.branches[1].branches] == [1] * 4


def test_a_call_answered_anew_has_the_inputs_that_it_had_and_the_run_shows_what_came_before() -> None:
    point = traces_of(two_steps(FakeEngine(decide_at_fault)), examples=1).branches[1]
    for branch in point.branches:
        before, anew = branch.calls
        assert (before.outputs, before.text, before.anew) == (
            point.run.calls[0].outputs,
            point.run.calls[0].text,
            False,
        )
        assert (anew.inputs, anew.anew) == (point.call.inputs, True)


def test_the_same_branches_are_found_in_the_store() -> None:
    engine, store = FakeEngine(remark_at_fault), RolloutStore()
    first = traces_of(two_steps(engine), store=store)
    made = len(engine.requests)
    again = traces_of(two_steps(engine), store=store)
    assert len(engine.requests) == made
    assert [trace.prediction for trace in again.traces] == [trace.prediction for trace in first.traces]


def test_threads_change_no_branch() -> None:
    one, many = (traces_of(two_steps(FakeEngine(remark_at_fault)), num_threads=n) for n in (1, 8))
    assert [(t.index, t.attempt, t.calls) for t in many.traces] == [(t.index, t.attempt, t.calls) for t in one.traces]


class Loop(dspy.Module):
    """Asks the same predictor again and again, on what it said before."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns
        self.step = dspy.Predict("number: int, said: str -> said_next: str")

    def forward(self, number: int) -> dspy.Prediction:
        said = ""
        for _ in range(self.turns):
            answer = self.step(number=number, said=said)
            answer.said_next += "!"  # what the program does to an answer is no part of it
            said += answer.said_next
        return dspy.Prediction(parity=right(number) if "good" in said else wrong(number), said=said)


def turn(request: FakeRequest) -> str:
    return reply(request, said_next="good" if request.temperature else "a")


def test_each_turn_of_a_loop_is_answered_anew_on_the_turns_before_it() -> None:
    program = Loop(3)
    program.set_lm(plain_lm(FakeEngine(turn)))
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=1), examples=1).branches
    assert [point.branches[0].prediction.said for point in points] == ["good!a!a!", "a!good!a!", "a!a!good!"]
    in_vain = replace(points[2], branches=(points[2].run,))
    assert blame([points[0], in_vain]) == {"step": Blame(calls=2, failed_runs=1, repaired=1)}


def test_of_a_long_loop_three_turns_are_answered_anew() -> None:
    program = Loop(9)
    program.set_lm(plain_lm(FakeEngine(turn)))
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=1), examples=1).branches
    assert [point.call.place for point in points] == [0, 4, 8]


def test_what_branches_cost_is_known_from_the_runs_before_them() -> None:
    engine = FakeEngine(turn)
    program = Loop(9)
    program.set_lm(plain_lm(engine))
    first = traces_of(program, Sampling(0, rescue=False), examples=2)
    assert len(engine.requests) == 2 * 9
    traces_of(program, BRANCHES, examples=2)
    # Of nine calls, those from the first, fifth and ninth on are made.
    assert len(engine.requests) == 2 * 9 + 2 * 9 + 2 * 4 * (9 + 5 + 1)
    assert branch_runs(first.traces) == pytest.approx({"step": (9 + 5 + 1) / 9})
    parts = branch_runs(traces_of(two_steps(FakeEngine(remark_at_fault)), Sampling(0, rescue=False)).traces)
    assert parts == pytest.approx({"remark": 1.0, "decide": 0.5})


class Sampler(dspy.Module):
    """A frozen sub-module whose LM samples, then a predictor that sees what it said."""

    def __init__(self, lm: dspy.LM) -> None:
        super().__init__()
        self.hidden = TwoSteps()
        self.decide = dspy.Predict("number: int, remark: str -> parity: str")
        self.set_lm(lm)
        self.hidden._compiled = True

    def forward(self, number: int) -> dspy.Prediction:
        return self.decide(number=number, remark=self.hidden.remark(number=number).remark)


def test_calls_of_frozen_sub_modules_whose_lm_samples_are_answered_as_they_were() -> None:
    program = Sampler(plain_lm(FakeEngine(decide_at_fault), temperature=0.7))
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=4, sample_passing=True), examples=1).branches
    assert [point.call.predictor for point in points] == ["decide"]
    assert points[0].call.inputs["remark"].startswith("sample ")
    assert all(branch.calls[0].inputs == points[0].call.inputs for branch in points[0].branches)
    assert not any(branch.strayed for branch in points[0].branches)


class Threads(dspy.Module):
    """Two calls at once, then one on both."""

    def __init__(self) -> None:
        super().__init__()
        self.remark = dspy.Predict("number: int -> remark: str")
        self.decide = dspy.Predict("number: int, remark: str -> parity: str")

    def forward(self, number: int) -> dspy.Prediction:
        said: dict[int, str] = {}

        def ask(place: int) -> None:
            said[place] = self.remark(number=number + 100 * place).remark

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.decide(number=number, remark=f"{said[0]} and {said[1]}")


def test_calls_of_the_programs_own_threads_are_told_apart_by_what_they_ask() -> None:
    program = Threads()
    program.set_lm(plain_lm(FakeEngine(decide_at_fault)))
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=1), examples=1).branches
    sampled = [point.branches[0].calls[2].inputs["remark"].count("sample") for point in points]
    assert [point.call.inputs["number"] for point in points] == [0, 100, 0]
    assert sampled == [1, 1, 0]


class Drifting(TwoSteps):
    """Asks something else each time it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = [0]

    def forward(self, number: int) -> dspy.Prediction:
        self.runs[0] += 1
        self.remark(number=number)
        return self.decide(number=number, remark=f"run {self.runs[0]}")


def test_a_run_that_never_comes_to_its_call_says_nothing_about_it() -> None:
    program = Drifting()
    program.set_lm(plain_lm(FakeEngine(decide_at_fault)))
    traces = traces_of(program, examples=1)
    assert [len(point.answered) for point in traces.branches] == [4, 0]
    assert blame(traces.branches).keys() == {"remark"}
    assert len(traces.traces) == 9


def test_each_predictor_is_answered_by_its_own_lm_be_it_local_or_not() -> None:
    program = two_steps(FakeEngine(remark_at_fault))
    program.decide.lm = api_lm(remark_at_fault)
    found = blame(traces_of(program, examples=6).branches)
    assert (found["remark"].repaired > 3, found["decide"].repaired) == (True, 0)


def test_a_call_whose_answer_can_not_be_read_takes_the_blame_for_the_run_that_it_ended() -> None:
    def answer(request: FakeRequest) -> str:
        number = number_of(request)
        if "remark" in outputs_of(request):
            return reply(request, remark="plain")
        return reply(request, parity=right(number)) if is_good(request) else "no field at all"

    found = blame(traces_of(two_steps(FakeEngine(answer)), examples=4).branches)
    assert found["remark"] == Blame(calls=4, failed_runs=4, repaired=0)
    assert (found["decide"].calls, found["decide"].repaired > 2) == (4, True)


def test_runs_that_passed_are_branched_where_it_is_asked_for_and_take_no_blame() -> None:
    def answer(request: FakeRequest) -> str:
        number = number_of(request)
        if "remark" in outputs_of(request):
            return reply(request, remark="bad" if request.temperature else "good")
        return reply(request, parity=right(number) if field_of(request, "remark") == "good" else wrong(number))

    program = two_steps(FakeEngine(answer))
    assert traces_of(program).branches == ()
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=2, sample_passing=True)).branches
    assert [[branch.passed for branch in point.branches] for point in points] == [[False] * 2, [True] * 2] * 3
    assert blame(points) == {}


def test_several_answers_of_one_call_are_there_again() -> None:
    class Vote(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            self.remark(number=number, config={"n": 2, "temperature": 0.5})
            said = self.remark(number=number, config={"n": 2, "temperature": 0.5}).completions.remark
            return self.decide(number=number, remark=" and ".join(said))

    program = Vote()
    program.set_lm(plain_lm(FakeEngine(decide_at_fault)))
    points: tuple[BranchPoint, ...] = traces_of(program, examples=1).branches
    assert points[2].call.inputs["remark"].count(" and ") == 1
    assert all(branch.calls[2].inputs == points[2].call.inputs for branch in points[2].branches)


def test_calls_that_ask_the_same_are_answered_in_their_order_and_one_alone_is_answered_anew() -> None:
    class Again(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            said = [self.remark(number=number).remark for _ in range(2)]
            return self.decide(number=number, remark=" and ".join(said))

    remarks = iter(["one", "two"])

    def answer(request: FakeRequest) -> str:
        if "remark" in outputs_of(request):
            return reply(request, remark="anew" if request.temperature else next(remarks, "later"))
        return reply(request, parity=wrong(number_of(request)))

    program = Again()
    program.set_lm(plain_lm(FakeEngine(answer)))
    points = traces_of(program, Sampling(0, 0.9, rescue=False, branches=1), examples=1).branches
    asked = [point.branches[0].calls[2].inputs["remark"] for point in points]
    assert asked == ["anew and later", "one and anew", "one and two"]
