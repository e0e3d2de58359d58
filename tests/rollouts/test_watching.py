"""Calls in a program's own threads, loops and copies are seen, counted and become rows."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from fakes import (
    CutEngine,
    Parity,
    TwoSteps,
    field_of,
    number_of,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    reply,
    right,
    two_step_engine,
)

from bettertogether.errors import NoTrainingDataError
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.rollout import Attempt, Call, Rollout
from bettertogether.rollouts.runner import Runner
from bettertogether.rollouts.traces import ExamplePass, Sampling, Trace, collect_traces
from bettertogether.rollouts.watching import is_cut
from bettertogether.steps.demo_sets import demos_of
from bettertogether.steps.rows import Row
from bettertogether.steps.rows_from_traces import rows_from_traces, rows_of_call
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest

ALWAYS = parity_engine(lambda *_: True)


def over(program: dspy.Module, engine: FakeEngine) -> Any:
    program.set_lm(plain_lm(engine))
    return program


def runs_of(program: dspy.Module, count: int, num_threads: int = 4) -> list[Rollout]:
    runner = Runner(program)
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(runner.run, numbers(count)))


def rows_of(program: dspy.Module, count: int, **options: Any) -> tuple[Row, ...]:
    optimizer = LoRAFinetune(parity_match, **{"num_samples": 0, "rescue": False, "balance": False, **options})
    return optimizer.collect(program, trainset=numbers(count)).rows


def prompts(engine: FakeEngine) -> set[str]:
    return {repr(request.messages) for request in engine.requests}


class One(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity)


class Pooled(One):
    """Calls its predictor in threads of its own, for this number and the next."""

    def forward(self, number: int) -> dspy.Prediction:
        with ThreadPoolExecutor(2) as pool:
            first, _ = pool.map(lambda n: self.p(number=n), [number, number + 1])
            return first


def test_calls_in_a_programs_own_threads_are_its_examples_even_side_by_side() -> None:
    engine = parity_engine(lambda *_: True, delay_s=lambda request: 0.002 * (number_of(request) % 3))
    runs = runs_of(over(Pooled(), engine), 12)
    assert [sorted(call.inputs["number"] for call in run.calls) for run in runs] == [[n, n + 1] for n in range(12)]
    assert {call.predictor for run in runs for call in run.calls} == {"p"}


def test_calls_in_a_programs_own_threads_are_counted() -> None:
    ledger = Runner(over(Pooled(), ALWAYS)).run(numbers(1)[0]).ledger
    assert (ledger.lm_calls, ledger.cache_hits) == (2, 0)
    assert ledger.generated_tokens > 0


def test_calls_in_a_programs_own_threads_are_rows() -> None:
    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(Pooled(), engine), 4)
    assert [row.completion.split("\n")[1] for row in rows] == [right(n) for e in range(4) for n in (e, e + 1)]
    assert {repr(row.messages) for row in rows} == prompts(engine)


def test_a_thread_that_a_program_starts_itself_is_seen_too() -> None:
    class Threaded(One):
        def forward(self, number: int) -> dspy.Prediction:
            answers: list[Any] = []
            thread = threading.Thread(target=lambda: answers.append(self.p(number=number)))
            thread.start()
            thread.join()
            return answers[0]

    assert [call.inputs for call in Runner(over(Threaded(), ALWAYS)).run(numbers(1)[0]).calls] == [{"number": 0}]


def test_a_thread_keeps_the_settings_that_dspy_gives_it() -> None:
    seen: list[Any] = []

    class Threaded(One):
        def forward(self, number: int) -> dspy.Prediction:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: seen.append(dspy.settings.adapter)).result()
                return pool.submit(self.p, number=number).result()

    engine = parity_engine(lambda *_: True)
    with dspy.context(adapter=dspy.XMLAdapter()):
        run = Runner(over(Threaded(), engine)).run(numbers(1)[0])
    assert seen == [None]
    assert "[[ ## number ## ]]" in engine.requests[0].user
    assert type(run.calls[0].adapter) is dspy.ChatAdapter


def test_a_row_of_a_call_in_a_thread_has_the_threads_adapter() -> None:
    engine = parity_engine(lambda *_: True)
    with dspy.context(adapter=dspy.XMLAdapter()):
        rows = rows_of(over(Pooled(), engine), 2)
    assert {repr(row.messages) for row in rows} == prompts(engine)
    assert all(row.completion.startswith("[[ ## parity ## ]]") for row in rows)


def test_a_call_after_its_run_is_left_alone() -> None:
    started: list[threading.Thread] = []
    release = threading.Event()

    class Leaves(One):
        def forward(self, number: int) -> dspy.Prediction:
            started.append(threading.Thread(target=lambda: (release.wait(5), self.p(number=number))))
            started[-1].start()
            return dspy.Prediction(parity=right(number))

    run = Runner(over(Leaves(), ALWAYS)).run(numbers(1)[0])
    release.set()
    started[0].join()
    assert (run.calls, run.error) == ((), None)


class Best(dspy.Module):
    """`dspy.BestOfN` or `dspy.Refine` around a predictor or a program of its own."""

    def __init__(self, kind: Any, inner: dspy.Module, count: int = 3) -> None:
        super().__init__()
        self.inner = inner
        self.best = kind(module=inner, N=count, reward_fn=even_reward, threshold=1.0)

    def forward(self, number: int) -> dspy.Prediction:
        return self.best(number=number)


def even_reward(arguments: dict[str, Any], prediction: Any) -> float:
    return float(prediction.parity == "even")


def even_at(attempt: int) -> Callable[[FakeRequest], str]:
    """Says even from this call of the parity predictor on, counted for each number."""
    counts: dict[int, int] = {}

    def answer(request: FakeRequest) -> str:
        if "advice" in request.system:
            return reply(request, discussion="d", advice={"self": "think"})
        number = number_of(request)
        if "`parity`" not in request.system:
            return reply(request, remark=f"try {counts.get(number, 0)}")
        counts[number] = counts.get(number, 0) + 1
        return reply(request, parity="even" if counts[number] > attempt else "odd")

    return answer


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_of_several_attempts_the_chosen_ones_calls_are_the_programs(kind: Any, attempt: int) -> None:
    program = over(Best(kind, TwoSteps()), FakeEngine(even_at(attempt)))
    with dspy.context(lm=program.inner.decide.lm):
        run = Runner(program).run(numbers(1)[0])
    remark = f"try {attempt}"
    assert run.calls == (
        Call("inner.remark", {"number": 0}, {"remark": remark}),
        Call("inner.decide", {"number": 0, "remark": remark}, {"parity": "even"}),
    )
    assert run.strangers == 0, "the advice that a Refine asks for is its own"


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_a_row_of_the_chosen_attempt_has_a_prompt_that_is_sent_and_no_advice(kind: Any) -> None:
    engine = FakeEngine(even_at(1))
    program = over(Best(kind, dspy.Predict(Parity)), engine)
    with dspy.context(lm=program.inner.lm):
        rows = rows_of(program, 1)
    assert [row.completion for row in rows] == ["[[ ## parity ## ]]\neven\n\n[[ ## completed ## ]]\n"]
    assert {repr(row.messages) for row in rows} <= prompts(engine)
    assert "hint_" not in repr(rows)


def test_several_attempts_of_a_program_with_two_predictors_can_be_sampled() -> None:
    program = over(Best(dspy.BestOfN, TwoSteps()), FakeEngine(even_at(0)))
    run = Runner(program).run(numbers(1)[0], Attempt("sample", 1, 1.0))
    assert (run.error, len(run.calls)) == (None, 2)


def test_each_of_several_attempts_is_sampled_with_a_seed_of_its_own_and_a_second_run_with_the_same() -> None:
    def seeds() -> list[int | None]:
        engine = FakeEngine(even_at(9))
        Runner(over(Best(dspy.BestOfN, dspy.Predict(Parity)), engine)).run(numbers(1)[0], Attempt("sample", 1, 1.0))
        return [request.seed for request in engine.requests]

    assert len(set(seeds())) == 3
    assert seeds() == seeds()


def test_several_attempts_of_a_program_with_threads_keep_the_chosen_ones_calls() -> None:
    program = over(Best(dspy.BestOfN, Pooled()), FakeEngine(even_at(1)))
    run = Runner(program).run(numbers(1)[0])
    assert [call.outputs["parity"] for call in run.calls if call.inputs["number"] == 0] == ["even"]


def test_deep_copies_of_predictors_that_are_copies_of_each_other_are_told_apart() -> None:
    class Same(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            first = dspy.Predict(Parity)
            self.steps = [first, copy.deepcopy(first)]

        def forward(self, number: int) -> dspy.Prediction:
            copy.deepcopy(self.steps[1])(number=number)
            return copy.deepcopy(self.steps[0])(number=number)

    run = Runner(over(Same(), ALWAYS)).run(numbers(1)[0])
    assert [call.predictor for call in run.calls] == ["steps[1]", "steps[0]"]


def test_a_metric_sees_the_programs_own_predictors_in_every_attempt() -> None:
    program = over(One(), ALWAYS)
    program.forward = program.p
    run = Runner(Best(dspy.BestOfN, program.p)).run(numbers(1)[0], Attempt("sample", 1, 1.0))
    assert [entry[0] for entry in run.raw_trace] == [program.p]


@pytest.mark.parametrize("change", ["extend", "+=", "insert", "clear"])
def test_a_program_may_change_its_trace(change: str) -> None:
    class Changes(One):
        def forward(self, number: int) -> dspy.Prediction:
            with dspy.context(trace=[]):
                answer = self.p(number=number)
                calls = list(dspy.settings.trace)
            trace = dspy.settings.trace
            if change == "extend":
                trace.extend(calls)
            elif change == "+=":
                trace += calls
            elif change == "insert":
                trace.insert(0, calls[0])
            else:
                trace.clear()
            return answer

    run = Runner(over(Changes(), ALWAYS)).run(numbers(1)[0])
    assert (run.error, len(run.calls)) == (None, 0 if change == "clear" else 1)


def test_multi_chain_comparison_has_its_call() -> None:
    class Compare(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compare = dspy.MultiChainComparison("number: int -> parity", M=2)

        def forward(self, number: int) -> dspy.Prediction:
            tries = [{"reasoning": "r", "parity": p} for p in ("even", "odd")]
            return self.compare(tries, number=number)

    engine = FakeEngine(lambda request: reply(request, rationale="r", parity="even"))
    run = Runner(over(Compare(), engine)).run(numbers(1)[0])
    assert [(call.predictor, call.outputs["parity"]) for call in run.calls] == [("compare.predict", "even")]


def test_asyncified_and_syncified_programs_have_their_calls() -> None:
    class Async(One):
        async def aforward(self, number: int) -> dspy.Prediction:
            return await dspy.asyncify(self.p)(number=number)

    for program in (Async(), dspy.syncify(Async()), dspy.syncify(Async(), in_place=False)):
        run = Runner(over(program, ALWAYS)).run(numbers(1)[0])
        assert [call.inputs for call in run.calls] == [{"number": 0}], run.error


def test_calls_gathered_in_an_async_program_are_in_an_order_that_timing_does_not_change() -> None:
    class Gather(One):
        async def aforward(self, number: int) -> dspy.Prediction:
            async def ask(n: int, wait: float) -> Any:
                await asyncio.sleep(wait)
                return await self.p.acall(number=n)

            waits = [0.02, 0.0, 0.01] if number else [0.0, 0.02, 0.01]
            return (await asyncio.gather(*map(ask, range(3), waits)))[0]

    orders = [[c.inputs["number"] for c in Runner(over(Gather(), ALWAYS)).run(e).calls] for e in numbers(2)]
    assert orders == [[0, 1, 2], [0, 1, 2]]


class Bounded(One):
    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Semaphore(2)

    async def aforward(self, number: int) -> dspy.Prediction:
        async with self.gate:
            await asyncio.sleep(0.002)
            return await self.p.acall(number=number)


@pytest.mark.parametrize("made", [Bounded, lambda: dspy.syncify(Bounded())], ids=["async", "syncified"])
def test_runs_of_an_async_program_share_its_semaphore(made: Any) -> None:
    runs = runs_of(over(made(), ALWAYS), 12, num_threads=6)
    assert [run.prediction.parity for run in runs] == [right(n) for n in range(12)]
    assert [len(run.calls) for run in runs] == [1] * 12


def test_a_program_may_look_up_its_last_answer_in_the_history_of_its_lm() -> None:
    class LooksUp(One):
        def forward(self, number: int) -> dspy.Prediction:
            self.p(number=number)
            return dspy.Prediction(prompt=self.p.lm.history[-1]["messages"][-1]["content"])

    for number, run in enumerate(runs_of(over(LooksUp(), ALWAYS), 12, num_threads=6)):
        assert f"[[ ## number ## ]]\n{number}\n" in run.prediction.prompt


def test_a_predictor_made_in_forward_is_a_counted_stranger() -> None:
    class Makes(One):
        def forward(self, number: int) -> dspy.Prediction:
            new = dspy.Predict("number: int -> remark")
            new.lm = self.p.lm
            new(number=number)
            return self.p(number=number)

    def answer(request: FakeRequest) -> str:
        number = number_of(request)
        return reply(request, **({"remark": "r"} if "`remark`" in request.system else {"parity": right(number)}))

    program = over(Makes(), FakeEngine(answer))
    run = Runner(program).run(numbers(1)[0])
    assert ([call.predictor for call in run.calls], run.strangers) == (["p"], 1)
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False)
    card = optimizer.collect(program, trainset=numbers(3)).card
    assert card.dropped_by_reason == {"call of a predictor that is none of the program's": 3}
    assert card.warnings[0] == (
        "3 calls were of predictors that are none of the program's, such as one that forward makes: nothing is learned "
        "from them, and no step changes them. Make them in __init__, as attributes."
    )


def test_a_program_of_strangers_alone_has_no_rows_and_the_error_says_why() -> None:
    class Makes(One):
        def forward(self, number: int) -> dspy.Prediction:
            new = dspy.Predict("number: int -> parity: str")
            new.lm = self.p.lm
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(new, number=number).result()

    with pytest.raises(NoTrainingDataError, match=r"3 of the runs that passed made no call that was seen: .*threads"):
        rows_of(over(Makes(), ALWAYS), 3)


DEMOS = numbers(2, start=100)
OTHER = Parity.with_instructions("Even or odd? Say it.")


class CallTime(One):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, number: int) -> dspy.Prediction:
        return self.p(number=number, **self.given)


GIVEN: dict[str, dict[str, Any]] = {
    "demos": {"demos": DEMOS},
    "signature": {"signature": OTHER},
    "text": {"signature": "number: int -> parity: str"},
    "config": {"config": {"temperature": 0.5}},
    "all": {"demos": DEMOS, "signature": OTHER, "config": {"max_tokens": 9}},
}


@pytest.mark.parametrize("given", list(GIVEN))
@pytest.mark.parametrize("train_prompt", ["vanilla", "optimized", "mixed"])
def test_what_a_call_is_given_is_in_its_rows(adapter: dspy.Adapter, given: str, train_prompt: Any) -> None:
    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(CallTime(**GIVEN[given]), engine), 3, train_prompt=train_prompt)
    assert len(rows) == 3
    assert {repr(row.messages) for row in rows} == prompts(engine)


def test_the_tuned_program_sends_the_prompts_that_it_was_trained_on() -> None:
    engine = parity_engine(lambda *_: True)
    program = over(CallTime(**GIVEN["all"]), engine)
    program.p.demos = numbers(1, start=50)
    tuned = LoRAFinetune(parity_match, num_samples=0).compile(program, trainset=numbers(4))
    engine.requests.clear()
    for example in numbers(4):
        tuned(**example.inputs())
    assert all(request.learned is not None for request in engine.requests)


@pytest.mark.parametrize("name", ["demos", "signature"])
def test_what_forward_puts_on_a_predictor_is_in_its_rows(name: str) -> None:
    class Sets(One):
        def forward(self, number: int) -> dspy.Prediction:
            setattr(self.p, name, GIVEN[name][name])
            return self.p(number=number)

    engine = parity_engine(lambda *_: True)
    program = over(Sets(), engine)
    rows = rows_of(program, 3)
    assert {repr(row.messages) for row in rows} == prompts(engine)
    assert (program.p.demos, program.p.signature) == ([], Parity)


def test_an_adapter_that_forward_takes_is_that_of_its_rows() -> None:
    class Takes(One):
        def forward(self, number: int) -> dspy.Prediction:
            with dspy.context(adapter=dspy.JSONAdapter()):
                return self.p(number=number)

    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(Takes(), engine), 3)
    assert {repr(row.messages) for row in rows} == prompts(engine)
    assert rows[0].completion == '{\n  "parity": "even"\n}'


def test_a_call_whose_demos_show_its_own_inputs_is_dropped_and_counted() -> None:
    program = over(CallTime(demos=numbers(2)), parity_engine(lambda *_: True))
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False)
    collected = optimizer.collect(program, trainset=numbers(5))
    assert [row.example for row in collected.rows] == [2, 3, 4]
    assert collected.card.dropped_by_reason == {"the demos that the call was given show its own inputs": 2}


def test_a_call_given_another_lm_is_dropped_and_counted() -> None:
    other = parity_engine(lambda *_: True, base_name="other")

    class Mixed(TwoSteps):
        def forward(self, number: int) -> dspy.Prediction:
            remark = self.remark(number=number).remark
            return self.decide(number=number, remark=remark, lm=plain_lm(other))

    program = over(Mixed(), two_step_engine(lambda *_: True))
    collected = LoRAFinetune(parity_match, num_samples=0, rescue=False).collect(program, trainset=numbers(4))
    assert {row.predictor for row in collected.rows} == {"remark"}
    assert collected.card.dropped_by_reason == {"made with another LM than the predictor's": 4}


def test_a_call_given_its_own_lm_with_other_options_is_a_row() -> None:
    class Hot(One):
        def forward(self, number: int) -> dspy.Prediction:
            return self.p(number=number, lm=self.p.lm.copy(temperature=0.7))

    assert len(rows_of(over(Hot(), parity_engine(lambda *_: True)), 3)) == 3


def test_a_rescued_call_whose_own_signature_shows_the_hint_is_dropped() -> None:
    class Rewrites(One):
        def forward(self, number: int) -> dspy.Prediction:
            signature = self.p.signature
            return self.p(number=number, signature=signature.with_instructions(signature.instructions + " Now!"))

    program = over(Rewrites(), parity_engine(lambda request, _: "is known" in request.system))
    with pytest.raises(NoTrainingDataError, match="2 x its own signature shows the hint"):
        rows_of(program, 2, rescue=True)


def test_inputs_are_those_of_the_call_though_the_program_changes_them_later() -> None:
    class Talk(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict("history: dspy.History, notes: list[str], number: int -> parity: str")

        def forward(self, number: int) -> dspy.Prediction:
            history, notes = dspy.History(messages=[]), ["one"]
            for _ in range(2):
                answer = self.p(history=history, notes=notes, number=number)
                history.messages.append({"number": number, "notes": list(notes), "parity": answer.parity})
                notes.append(answer.parity)
            return answer

    engine = parity_engine(lambda *_: True)
    rows = rows_of(over(Talk(), engine), 2)
    assert len(rows) == 4
    assert {repr(row.messages) for row in rows} == prompts(engine)


def test_outputs_are_what_the_lm_said_though_the_program_tidies_them_up() -> None:
    class Tidy(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = dspy.Predict("number: int -> parity: str, why: list[str]")

        def forward(self, number: int) -> dspy.Prediction:
            answer = self.p(number=number)
            answer.parity = answer.parity.lower()
            answer.why.append("tidied")
            return answer

    program = over(Tidy(), FakeEngine(lambda r: reply(r, parity=right(number_of(r)).upper(), why=["x"])))
    (call,) = Runner(program).run(numbers(1)[0]).calls
    assert call.outputs == {"parity": "EVEN", "why": ["x"]}


def test_inputs_that_are_no_fields_of_the_predictor_are_not_the_calls() -> None:
    example = dspy.Example(number=1, parity="odd", extra="x").with_inputs("number", "parity", "extra")
    (call,) = Runner(parity_program(ALWAYS)).run(example).calls
    assert call == Call("self", {"number": 1}, {"parity": "odd"})


def cut_engine() -> FakeEngine:
    return CutEngine(lambda request: reply(request, parity=right(number_of(request))))


def test_a_cut_answer_is_no_row_and_is_counted() -> None:
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False, balance=False)
    collected = optimizer.collect(parity_program(cut_engine()), trainset=numbers(6))
    assert [row.example for row in collected.rows] == [1, 2, 4, 5]
    assert collected.card.dropped_by_reason == {"cut at max_tokens": 2}


def test_a_cut_answer_is_no_demo() -> None:
    traces = collect_traces(
        parity_program(cut_engine()), numbers(3), ExamplePass(parity_match), sampling=Sampling(0, rescue=False)
    )
    assert [list(demos_of(trace)) for trace in traces.traces] == [[], ["self"], ["self"]]


def test_a_cut_answer_is_known_from_dspys_cache_too() -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        program = parity_program(cut_engine(), cache=True)
        cut = [[call.cut for call in Runner(program).run(numbers(1)[0]).calls] for _ in range(2)]
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    assert cut == [[True], [True]]


@pytest.mark.parametrize(
    ("response", "cut"),
    [
        ({"choices": [{"finish_reason": "length"}]}, True),
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}, False),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, True),
        ({"status": "completed", "incomplete_details": None}, False),
        ((), False),
        (None, False),
    ],
)
def test_a_cut_answer_is_known_in_every_form_of_response(response: Any, cut: bool) -> None:
    assert is_cut(response) is cut


class Short(dspy.Adapter):
    """Can format a prompt and parse an answer, which is all that DSPy needs."""

    def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        turns = [{"role": "system", "content": signature.instructions}]
        for demo in demos:
            turns += [
                {"role": "user", "content": str(demo["number"])},
                {"role": "assistant", "content": f"<{demo['parity']}>"},
            ]
        return [*turns, {"role": "user", "content": str(inputs["number"])}]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return {"parity": completion.strip("<> ")}


def test_the_answer_of_an_adapter_that_can_only_read_is_what_the_lm_wrote() -> None:
    engine = FakeEngine(lambda request: f"<{right(int(request.user))}>")
    with dspy.context(adapter=Short()):
        rows = rows_of(parity_program(engine), 2)
    assert [(row.completion, row.messages[-1]["content"]) for row in rows] == [("<even>", "0"), ("<odd>", "1")]


def test_without_the_lms_text_such_an_adapter_is_a_reason_that_names_it() -> None:
    program, engine = parity_program(ALWAYS), ALWAYS
    bare = Call("self", {"number": 1}, {"parity": "odd"})
    with dspy.context(adapter=Short()), pytest.raises(ValueError, match="Short can't write an answer: define its"):
        rows_of_call(program, engine, bare, "vanilla", example=0)


class Loud(dspy.ChatAdapter):
    """Reads another format than the one that its parent writes."""

    def format_field_structure(self, signature: Any) -> str:
        return "Answer with `PARITY!` alone."

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return {"parity": completion.strip("!\n ").lower()}


def test_an_adapter_that_reads_another_format_than_it_writes_learns_what_the_lm_wrote() -> None:
    engine = FakeEngine(lambda request: f"{right(int(field_of(request, 'number'))).upper()}!")
    with dspy.context(adapter=Loud()):
        rows = rows_of(parity_program(engine), 2)
    assert [row.completion for row in rows] == ["EVEN!", "ODD!"]


def test_an_answer_in_the_adapters_own_format_is_a_row_as_the_adapter_writes_it() -> None:
    engine = FakeEngine(lambda r: f"Well.\n[[ ## parity ## ]]\n{right(number_of(r))}\n[[ ## completed ## ]]")
    (row,) = rows_of(parity_program(engine), 1)
    assert row.completion == "[[ ## parity ## ]]\neven\n\n[[ ## completed ## ]]\n"


def test_a_trace_of_cut_answers_alone_says_so() -> None:
    engine = FakeEngine(lambda request: reply(request, parity=right(number_of(request))))
    program = parity_program(engine)
    call = Call("self", {"number": 0}, {"parity": "even"}, cut=True)
    trace = Trace(0, numbers(1)[0], None, (call,), Verdict(1.0, True), "student")
    traces = collect_traces(program, [], ExamplePass(parity_match))
    optimizer = LoRAFinetune(parity_match)
    with pytest.raises(NoTrainingDataError, match="1 x cut at max_tokens"):
        rows_from_traces(
            program, numbers(1), type(traces)((trace,), traces.ledger, 1), optimizer.trainable(program), optimizer.rows
        )
