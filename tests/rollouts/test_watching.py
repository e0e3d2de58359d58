"""Calls in a program's own threads, loops and copies are seen, counted and become rows."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from fakes import number_of, numbers, parity_engine, parity_match, reply, right
from watched import ALWAYS, One, Pooled, over, prompts, rows_of, runs_of

from bettertogether.errors import NoTrainingDataError
from bettertogether.rollouts.rescue import HINT
from bettertogether.rollouts.rollout import Attempt
from bettertogether.rollouts.runner import Runner
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest


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


def remarking_engine() -> FakeEngine:
    def answer(request: FakeRequest) -> str:
        remarks = "`remark`" in request.system
        return reply(request, **({"remark": "r"} if remarks else {"parity": right(number_of(request))}))

    return FakeEngine(answer)


class Keeps(One):
    """Makes a predictor at first use."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, dspy.Predict] = {}

    def forward(self, number: int) -> dspy.Prediction:
        if "remark" not in self.made:
            self.made["remark"] = dspy.Predict("number: int -> remark")
            self.made["remark"].lm = self.p.lm
        self.made["remark"](number=number)
        return self.p(number=number)


def test_a_predictor_made_in_forward_is_a_counted_stranger() -> None:
    class Makes(One):
        def forward(self, number: int) -> dspy.Prediction:
            new = dspy.Predict("number: int -> remark")
            new.lm = self.p.lm
            new(number=number)
            return self.p(number=number)

    program = over(Makes(), remarking_engine())
    run = Runner(program).run(numbers(1)[0])
    assert ([call.predictor for call in run.calls], run.strangers) == (["p"], 1)
    optimizer = LoRAFinetune(parity_match, num_samples=0, rescue=False)
    card = optimizer.collect(program, trainset=numbers(3)).card
    assert card.dropped_by_reason == {"call of a predictor that is none of the program's": 3}
    assert card.warnings[0] == (
        "3 calls were of predictors that are none of the program's, such as one that forward makes: nothing is learned "
        "from them, and no step changes them. Make them in __init__, as attributes."
    )


def test_a_predictor_that_a_run_made_and_kept_is_a_stranger_to_the_copies_of_other_runs() -> None:
    runner = Runner(over(Keeps(), remarking_engine()))
    for _ in range(2):
        run = runner.run(numbers(1)[0])
        assert ([call.predictor for call in run.calls], run.strangers) == (["p"], 1)
        runner._spare.clear()


@pytest.mark.parametrize("leads", [True, False])
def test_a_predictor_that_a_run_made_and_kept_is_given_no_hint(leads: bool) -> None:
    engine = remarking_engine()
    runner = Runner(over(Keeps(), engine))
    label = {"parity" if leads else "total": "odd"}
    for attempt in (Attempt("sample", 1), Attempt("rescue", 1, narrow=label, leads=leads), Attempt("sample", 2)):
        runner.run(numbers(1)[0], attempt)
    remarks = [request.system for request in engine.requests if "`remark`" in request.system]
    assert [HINT in system for system in remarks] == [False, False, False]


def test_a_program_of_strangers_alone_has_no_rows_and_the_error_says_why() -> None:
    class Makes(One):
        def forward(self, number: int) -> dspy.Prediction:
            new = dspy.Predict("number: int -> parity: str")
            new.lm = self.p.lm
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(new, number=number).result()

    with pytest.raises(NoTrainingDataError, match=r"3 of the runs that passed made no call that was seen: .*threads"):
        rows_of(over(Makes(), ALWAYS), 3)
