"""What a metric asks LMs is part of what a run costs, and no part of the program's run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import dspy
import pytest
from fakes import PaidLM, Parity, learner, numbers, parity_engine, parity_match, parity_program, plain_lm
from paid_runs import PRICE, report_within

from bettertogether.records import Ledger
from bettertogether.rollouts.rollout import RolloutStore
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass, TraceSet, collect_traces
from bettertogether.rollouts.tries import Sampling

Ask = Callable[[dspy.Module, int], str]


def paid_judge(price: float | None = PRICE) -> dspy.Predict:
    judge = dspy.Predict(Parity)
    judge.set_lm(PaidLM(price))
    return judge


def in_turn(judge: dspy.Module, number: int) -> str:
    parity: str = judge(number=number).parity
    return parity


def awaited(judge: dspy.Module, number: int) -> str:
    parity: str = asyncio.run(judge.acall(number=number)).parity
    return parity


def in_parallel(judge: dspy.Module, number: int) -> str:
    asked = dspy.Example(number=number).with_inputs("number")
    parity: str = dspy.Parallel(num_threads=2, disable_progress_bar=True)([(judge, asked)] * 2)[0].parity
    return parity


def in_a_thread(judge: dspy.Module, number: int) -> str:
    with ThreadPoolExecutor() as pool:
        return pool.submit(copy_context().run, in_turn, judge, number).result()


def judged_by(judge: dspy.Module, ask: Ask = in_turn) -> Any:
    return lambda example, prediction, trace=None: ask(judge, example.number) == prediction.parity


def collect(metric: Any, program: dspy.Module | None = None, **settings: Any) -> TraceSet:
    program = program or parity_program(parity_engine(learner))
    options = ExamplePass(metric, settings=RunSettings(**settings))
    return collect_traces(program, numbers(6), options, sampling=Sampling(num_samples=0, rescue=False))


@pytest.mark.parametrize(("ask", "calls"), [(in_turn, 1), (awaited, 1), (in_parallel, 2), (in_a_thread, 1)])
def test_what_a_metric_asks_an_lm_is_in_the_ledger_of_the_trace(ask: Ask, calls: int) -> None:
    plain = collect(parity_match)
    # The progress bars of several dspy.Parallel at once get into each other's way.
    judged = collect(judged_by(paid_judge(), ask), num_threads=1)
    asked = Ledger(lm_calls=calls, prompt_tokens=10 * calls, generated_tokens=2 * calls, cost=PRICE * calls)
    assert [trace.ledger for trace in judged.traces] == [trace.ledger + asked for trace in plain.traces]
    assert [trace.passed for trace in judged.traces] == [trace.passed for trace in plain.traces]


@pytest.mark.parametrize(("ask", "calls"), [(in_turn, 1), (in_parallel, 2)])
def test_dspys_tracker_counts_what_a_metric_asks(ask: Ask, calls: int) -> None:
    with dspy.track_usage() as tracker:
        collect(judged_by(paid_judge(), ask), num_threads=1)
    assert tracker.get_total_tokens()["openai/paid"] == {
        "prompt_tokens": 10 * calls * 6,
        "completion_tokens": 2 * calls * 6,
    }


def test_a_judge_is_no_part_of_the_run_and_stays_as_it_was() -> None:
    judge = paid_judge()
    seen = []

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        seen.append(len(trace))
        return bool(judged_by(judge)(example, prediction))

    traces = collect(metric).traces
    assert [(len(trace.calls), trace.strangers) for trace in traces] == [(1, 0)] * 6
    assert seen == [1] * 6
    assert type(judge) is dspy.Predict
    assert (type(judge.lm), len(judge.lm.history)) == (PaidLM, 6)


def test_a_metric_that_raises_has_paid_its_judge() -> None:
    judge = paid_judge()

    def metric(example: dspy.Example, prediction: Any, trace: Any = None) -> bool:
        in_turn(judge, example.number)
        raise ValueError("no")

    assert collect(metric).ledger.cost == 6 * PRICE


def test_an_answer_to_the_metric_from_dspys_cache_costs_nothing() -> None:
    judge = dspy.Predict(Parity)
    judge.set_lm(plain_lm(parity_engine(learner), cache=True))
    program, store = parity_program(parity_engine(learner)), RolloutStore()
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        first, again = (collect(judged_by(judge), program, store=store).ledger for _ in range(2))
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    assert (first.lm_calls, first.cache_hits) == (12, 0)
    # The runs themselves are known.
    assert again == Ledger(metric_calls=6, lm_calls=6, cache_hits=6)


@pytest.mark.parametrize("off", [{"disable_history": True}, {"max_history_size": 0}])
def test_the_cost_of_a_judge_is_not_known_where_histories_are_off(off: dict[str, Any]) -> None:
    with dspy.context(**off):
        ledger = collect(judged_by(paid_judge())).ledger
    assert (ledger.lm_calls, ledger.cost) == (12, None)


def test_a_budget_bounds_what_the_judge_is_paid() -> None:
    paid: list[None] = []
    judged = judged_by(paid_judge())

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> Any:
        paid.append(None)
        return judged(example, prediction, trace)

    report = report_within(PRICE * 11, parity_program(parity_engine(learner)), metric)
    # What was under way when it ended is paid for, too.
    assert [record.status for record in report.rounds] == ["complete", "skipped"]
    assert report.rounds[0].ledger.cost == PRICE * 8
    assert report.ledger.cost == PRICE * len(paid) >= PRICE * 11
