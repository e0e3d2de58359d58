"""One program on one example: every call is attributed to its predictor, and every token is counted."""

from __future__ import annotations

import asyncio
import copy
import time
from typing import Any

import dspy
import pydantic
import pytest
from dspy.lm15 import AuthError, TransportError
from dspy.utils.exceptions import LMTransportError
from fakes import ONE, TwoSteps, api_lm, numbers, parity_program, plain_lm, reply, two_step_program, with_lm

from bettertogether.errors import PromptTooLongError
from bettertogether.records import Ledger
from bettertogether.rollouts.rollout import Attempt, Call, stable_seed
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine, FakeRequest


def echo_engine() -> FakeEngine:
    """Answers every output field `x` with "<x> of <first input value>"."""

    def answer(request: FakeRequest) -> str:
        names = request.system.split("Your output fields are:")[1].split("All interactions")[0]
        fields = [line.split("`")[1] for line in names.splitlines() if line.startswith(("1.", "2.")) and "`" in line]
        value = request.user.split(" ## ]]\n")[1].split("\n")[0]
        return reply(request, **{name: f"{name} of {value}" for name in fields})

    return FakeEngine(answer)


def names(program: dspy.Module, **inputs: Any) -> list[str]:
    """Which predictor made each call."""
    program.set_lm(plain_lm(echo_engine()))
    run = Runner(program).run(dspy.Example(**inputs).with_inputs(*inputs))
    assert run.error is None
    return [call.predictor for call in run.calls]


class Base(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("q -> a")
        self.second = dspy.Predict("q -> a")


def test_a_call_has_its_predictor_inputs_and_outputs(engine: FakeEngine) -> None:
    run = Runner(two_step_program(engine)).run(ONE)
    assert run.calls == (
        Call("remark", {"number": 1}, {"remark": "1 ends in 1"}),
        Call("decide", {"number": 1, "remark": "1 ends in 1"}, {"parity": "odd"}),
    )


class Customer(pydantic.BaseModel):
    orders: list[str] = []
    name: str = "none given"


def test_what_a_program_changes_of_its_inputs_changes_no_example() -> None:
    class Grows(Base):
        def forward(self, turns: list[str], customer: Customer) -> dspy.Prediction:
            turns.append("one more")
            customer.orders.append("one more")
            return dspy.Prediction(turns=len(turns), orders=len(customer.orders), given=customer.model_fields_set)

    example = dspy.Example(turns=["one"], customer=Customer(orders=["one"])).with_inputs("turns", "customer")
    runs = [Runner(Grows()).run(example) for _ in range(2)]
    assert [dict(run.prediction) for run in runs] == [{"turns": 2, "orders": 2, "given": {"orders"}}] * 2
    assert (example.turns, example.customer) == (["one"], Customer(orders=["one"]))


def test_a_loop_gives_every_call_to_its_predictor() -> None:
    class Loop(Base):
        def forward(self, q: str) -> dspy.Prediction:
            for _ in range(3):
                q = self.second(q=q).a
            return self.first(q=q)

    assert names(Loop(), q="x") == ["second", "second", "second", "first"]


def test_a_predictor_called_fifty_times_has_fifty_calls() -> None:
    class Fifty(Base):
        def forward(self, q: str) -> dspy.Prediction:
            return [self.first(q=f"{q}{i}") for i in range(50)][-1]

    assert names(Fifty(), q="x") == ["first"] * 50


def test_all_calls_are_seen_however_few_the_user_lets_dspy_keep(engine: FakeEngine) -> None:
    with dspy.context(max_trace_size=0):
        run = Runner(two_step_program(engine)).run(ONE)
    assert [call.predictor for call in run.calls] == ["remark", "decide"]


def test_a_skipped_predictor_has_no_calls() -> None:
    class Skip(Base):
        def forward(self, q: str) -> dspy.Prediction:
            return self.second(q=q)

    assert names(Skip(), q="x") == ["second"]


def test_calls_in_another_order_than_the_predictors_are_theirs() -> None:
    class Backwards(Base):
        def forward(self, q: str) -> dspy.Prediction:
            return self.first(q=self.second(q=q).a)

    assert names(Backwards(), q="x") == ["second", "first"]


def test_predictors_of_nested_modules_and_lists_have_their_paths() -> None:
    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [dspy.ChainOfThought("q -> a"), dspy.Predict("q -> a")]
            self.named = {"last": dspy.Predict("q -> a")}

        def forward(self, q: str) -> dspy.Prediction:
            return self.named["last"](q=self.steps[1](q=self.steps[0](q=q).a).a)

    assert names(Outer(), q="x") == ["steps[0].predict", "steps[1]", "named['last']"]


def test_calls_made_in_dspy_parallel_are_attributed_in_an_order_that_timing_does_not_change() -> None:
    class Fan(Base):
        def forward(self, q: str) -> dspy.Prediction:
            pairs = [(self.second, {"q": f"{q}{i}"}) for i in range(4)] + [(self.first, {"q": q})]
            dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
            return self.first(q="end")

    orders = set()
    for delays in ([0.03, 0.0, 0.02, 0.01, 0.0], [0.0, 0.02, 0.01, 0.03, 0.02]):
        remaining = iter(delays)
        engine = echo_engine()
        engine.delay_s = lambda _, remaining=remaining: next(remaining, 0.0)
        program = Fan()
        program.set_lm(plain_lm(engine))
        run = Runner(program).run(dspy.Example(q="x").with_inputs("q"))
        orders.add(tuple((call.predictor, call.inputs["q"]) for call in run.calls))
    expected = (("first", "x"), *(("second", f"x{i}") for i in range(4)), ("first", "end"))
    assert orders == {expected}


def test_tokens_used_in_dspy_parallel_are_counted() -> None:
    class Fan(Base):
        def forward(self, q: str) -> dspy.Prediction:
            pairs = [(self.second, {"q": f"{q}{i}"}) for i in range(3)]
            return dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)[0]

    program = Fan()
    program.set_lm(plain_lm(echo_engine()))
    ledger = Runner(program).run(dspy.Example(q="x").with_inputs("q")).ledger
    assert (ledger.lm_calls, ledger.cache_hits) == (3, 0)
    assert ledger.generated_tokens > 0


def test_a_program_with_aforward_alone_is_run() -> None:
    class Async(Base):
        async def aforward(self, q: str) -> dspy.Prediction:
            return await self.second.acall(q=(await self.first.acall(q=q)).a)

    assert names(Async(), q="x") == ["first", "second"]


def test_a_program_with_a_call_of_its_own_alone_is_run() -> None:
    class Called(Base):
        def __call__(self, q: str) -> dspy.Prediction:
            return self.second(q=self.first(q=q).a)

    assert names(Called(), q="x") == ["first", "second"]


def test_a_program_without_forward_fails_with_what_to_define() -> None:
    class Nothing(Base):
        pass

    run = Runner(Nothing()).run(ONE)
    assert run.failure == "program error"
    assert str(run.error) == "'Nothing' object has no attribute 'forward'"


def test_deep_copies_of_predictors_made_in_forward_are_told_apart() -> None:
    class Copies(Base):
        def forward(self, q: str) -> dspy.Prediction:
            return copy.deepcopy(self.first)(q=copy.deepcopy(self.second)(q=q).a)

    assert names(Copies(), q="x") == ["second", "first"]


def test_a_new_predictor_of_the_same_signature_belongs_to_the_one_that_has_it() -> None:
    class New(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.other = dspy.Predict("q -> a"), dspy.Predict("q -> b")

        def forward(self, q: str) -> dspy.Prediction:
            again = dspy.Predict(self.p.signature)
            again.lm = self.p.lm
            return again(q=q)

    assert names(New(), q="x") == ["p"]


def test_deep_copies_of_one_predictor_in_a_list_are_told_apart_by_object() -> None:
    class Same(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            first = dspy.Predict("q -> a")
            self.steps = [first, copy.deepcopy(first)]

        def forward(self, q: str) -> dspy.Prediction:
            return self.steps[0](q=self.steps[1](q=q).a)

    assert names(Same(), q="x") == ["steps[1]", "steps[0]"]


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a deep copy"])
def test_calls_of_a_frozen_sub_module_belong_to_nobody(copied: bool) -> None:
    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.own = Base(), dspy.Predict("q -> a")
            self.frozen._compiled = True

        def forward(self, q: str) -> dspy.Prediction:
            inner = copy.deepcopy(self.frozen.first) if copied else self.frozen.first
            return self.own(q=inner(q=q).a)

    program = Outer()
    program.frozen.first.lm = plain_lm(echo_engine())
    assert names(program, q="x") == ["own"]


def react_answer(request: FakeRequest) -> str:
    if "next_tool_name" not in request.system:
        return reply(request, reasoning="I looked.", answer="blue")
    looked = "observation_0" in request.user
    tool, arguments = ("finish", {}) if looked else ("look", {"thing": "sky"})
    return reply(request, next_thought="Look.", next_tool_name=tool, next_tool_args=arguments)


def react() -> dspy.ReAct:
    def look(thing: str) -> str:
        """Look at it."""
        return f"the {thing} is blue"

    return dspy.ReAct("question -> answer", tools=[look])


def test_react_with_a_tool_gives_the_steps_to_react_and_the_answer_to_extract() -> None:
    program = react()
    program.set_lm(plain_lm(FakeEngine(react_answer)))
    run = Runner(program).run(dspy.Example(question="sky?").with_inputs("question"))
    assert [call.predictor for call in run.calls] == ["react", "react", "extract.predict"]
    first = {"next_thought": "Look.", "next_tool_name": "look", "next_tool_args": {"thing": "sky"}}
    assert run.calls[0].outputs == first
    assert "the sky is blue" in run.calls[1].inputs["trajectory"]


def test_react_shortens_a_history_that_is_too_long_for_the_model() -> None:
    def answer(request: FakeRequest) -> str:
        if "observation_1" in request.user and "observation_0" in request.user:
            raise PromptTooLongError("too long")
        if "next_tool_name" in request.system:
            finish = "observation_1" in request.user
            return reply(
                request,
                next_thought="",
                next_tool_name="finish" if finish else "look",
                next_tool_args={} if finish else {"thing": "sky"},
            )
        return reply(request, reasoning="", answer="blue")

    program = react()
    program.set_lm(plain_lm(FakeEngine(answer)))
    run = Runner(program).run(dspy.Example(question="sky?").with_inputs("question"))
    assert run.prediction.answer == "blue"


def test_an_unparseable_answer_is_a_parse_failure() -> None:
    run = Runner(parity_program(FakeEngine(lambda _: "no"))).run(ONE)
    assert (run.failure, run.calls) == ("parse failure", ())


def test_a_raise_in_the_program_is_a_program_error_with_the_calls_made_before(engine: FakeEngine) -> None:
    class Broken(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            self.remark(number=number)
            raise KeyError("nope")

    program = Broken()
    program.set_lm(plain_lm(engine))
    run = Runner(program).run(ONE)
    assert (run.failure, repr(run.error)) == ("program error", "KeyError('nope')")
    assert [call.predictor for call in run.calls] == ["remark"]


@pytest.mark.parametrize("error", [SystemExit(2), asyncio.CancelledError()], ids=repr)
def test_a_program_that_exits_or_is_cancelled_has_failed_on_one_example(error: BaseException) -> None:
    class Exits(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            raise error

    run = Runner(Exits()).run(ONE)
    assert (run.failure, run.error) == ("program error", error)


def test_a_timeout_is_a_timeout() -> None:
    class Slow(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            raise TimeoutError("60 s")

    assert Runner(Slow()).run(ONE).failure == "timeout"


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(TimeoutError("no bytes"), "timeout"), (ConnectionResetError("gone"), "program error")],
    ids=repr,
)
def test_a_read_that_an_api_lm_gave_up_on_is_a_timeout(cause: Exception, kind: str) -> None:
    def breaks_off(request: FakeRequest) -> str:
        raise TransportError("read failed") from cause

    run = Runner(with_lm(api_lm(breaks_off, num_retries=0))).run(ONE)
    assert (type(run.error), run.failure) == (LMTransportError, kind)


def test_an_error_that_comes_from_itself_has_a_kind() -> None:
    def breaks_off(request: FakeRequest) -> str:
        error = TransportError("read failed")
        raise error from error

    assert Runner(with_lm(api_lm(breaks_off, num_retries=0))).run(ONE).failure == "program error"


@pytest.mark.parametrize("by", ["program", "lm"])
def test_a_timeout_that_a_program_got_over_is_not_what_failed(by: str) -> None:
    def refuses(request: FakeRequest) -> str:
        raise AuthError("no")

    other = {"lm": with_lm(api_lm(refuses, num_retries=0))}

    class Recovers(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            try:
                raise TimeoutError("60 s")
            except TimeoutError:
                return other[by](number=number)

    assert Runner(Recovers()).run(ONE).failure == "program error"


def test_a_prompt_that_does_not_fit_is_a_failure_of_its_own_kind() -> None:
    def refuse(request: FakeRequest) -> str:
        raise PromptTooLongError("9 tokens, 8 fit")

    assert Runner(parity_program(FakeEngine(refuse))).run(ONE).failure == "prompt too long"


def test_the_ledger_counts_calls_and_tokens(engine: FakeEngine) -> None:
    ledger = Runner(two_step_program(engine)).run(ONE).ledger
    prompts = sum(len(engine.prompt_tokens(request.messages)) for request in engine.requests)
    assert (ledger.program_calls, ledger.lm_calls, ledger.cache_hits, ledger.metric_calls) == (1, 2, 0, 0)
    assert ledger.prompt_tokens == prompts
    assert ledger.generated_tokens > 10


def test_an_answer_from_dspys_cache_is_a_cache_hit_without_tokens(engine: FakeEngine) -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        program = two_step_program(engine, cache=True)
        Runner(program).run(ONE)
        ledger = Runner(program).run(ONE).ledger
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    assert ledger == Ledger(program_calls=1, lm_calls=2, cache_hits=2)


def test_a_second_format_tried_after_a_parse_failure_is_a_call(engine: FakeEngine) -> None:
    second_only = FakeEngine(lambda request: "no" if request.schema is None else {"parity": "odd"})
    ledger = Runner(parity_program(second_only)).run(ONE).ledger
    assert (ledger.lm_calls, ledger.cache_hits) == (2, 0)


def test_usage_reaches_a_tracker_outside_and_the_prediction(engine: FakeEngine) -> None:
    with dspy.context(track_usage=True), dspy.track_usage() as tracker:
        run = Runner(two_step_program(engine)).run(ONE)
    assert tracker.get_total_tokens()["local/fake"]["prompt_tokens"] == run.ledger.prompt_tokens
    assert run.prediction.get_lm_usage() == tracker.get_total_tokens()


def test_runs_leave_no_prompts_in_dspys_histories(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    Runner(program).run(ONE)
    assert (program.history, program.remark.history, program.remark.lm.history) == ([], [], [])


def test_a_long_history_does_not_slow_runs_down(engine: FakeEngine) -> None:
    def seconds(program: Any) -> float:
        runner = Runner(program)
        started = time.process_time()
        for example in numbers(50):
            runner.run(example)
        return time.process_time() - started

    fresh, used = two_step_program(engine), two_step_program(engine)
    used.history = [{"messages": [{"content": str(i)}]} for i in range(20_000)]
    assert seconds(used) < 3 * seconds(fresh)


def test_a_run_keeps_the_inputs_and_outputs_of_a_call_once(engine: FakeEngine) -> None:
    run = Runner(two_step_program(engine)).run(ONE)
    for call, answer in zip(run.calls, run.answers, strict=True):
        assert call.inputs is answer.inputs is answer.filled
        assert call.outputs is answer.prediction._store


def test_runs_of_many_threads_do_not_mix_their_traces(engine: FakeEngine) -> None:
    from bettertogether.rollouts.parallel import parallel_map

    engine.delay_s = lambda request: 0.001 * (stable_seed(request.user) % 5)
    runner = Runner(two_step_program(engine))
    started = time.monotonic()
    runs = parallel_map(lambda example: runner.run(example, Attempt("sample", 1, 1.0)), numbers(40), num_threads=8)
    assert time.monotonic() - started < 5
    assert [[call.inputs["number"] for call in run.calls] for run in runs] == [[n, n] for n in range(40)]
