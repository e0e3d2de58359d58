"""Whatever LM a program asks, its answers are part of what a run costs: each once, those of a cache nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import dspy
import pytest
from dspy.clients.typesafe import TypeSafe
from fakes import PaidLM, Parity, numbers, parity_engine, parity_match, plain_lm, right
from paid_runs import PRICE, report_within
from watched import ALWAYS, One

from bettertogether import LoRAFinetune
from bettertogether.errors import ConfigError
from bettertogether.records import Ledger
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.testing import FakeEngine


class Asks(One):
    """Asks a paid LM, then its predictor, which has an LM of this machine."""

    def __init__(self, ask: Callable[[Any, int], Any], big: Any) -> None:
        super().__init__()
        self.p.set_lm(plain_lm(ALWAYS))
        self.ask, self.big = ask, big

    def forward(self, number: int) -> Any:
        self.ask(self, number)
        return self.p(number=number)


def owning(lm: Any) -> dspy.Predict:
    predictor = dspy.Predict(Parity)
    predictor.lm = lm
    return predictor


def directly(program: Asks, number: int) -> None:
    program.big(messages=[{"role": "user", "content": f"[[ ## number ## ]]\n{number}"}])


def in_a_context(program: Asks, number: int) -> None:
    with dspy.context(lm=program.big):
        dspy.Predict(Parity)(number=number)


def at_the_call(program: Asks, number: int) -> None:
    program.p(number=number, lm=program.big)


def awaited(program: Asks, number: int) -> None:
    asyncio.run(program.p.acall(number=number, lm=program.big))


def in_parallel(program: Asks, number: int) -> None:
    made = owning(program.big)
    dspy.Parallel(num_threads=1, disable_progress_bar=True)([(made, dspy.Example(number=number).with_inputs("number"))])


def in_a_thread(program: Asks, number: int) -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(copy_context().run, directly, program, number).result()


def by_our_evaluate(program: Asks, number: int) -> None:
    made = owning(program.big)
    evaluate(made, numbers(1, number), parity_match, num_threads=1, progress=False)


WAYS = [directly, in_a_context, at_the_call, awaited, in_parallel, in_a_thread, by_our_evaluate]


class Best(dspy.Module):
    """Has its answer judged by a paid LM."""

    def __init__(self, judge: Any) -> None:
        super().__init__()

        def reward(inputs: Any, prediction: Any) -> float:
            return float(judge(number=inputs["number"]).parity == prediction.parity)

        self.best = dspy.BestOfN(dspy.Predict(Parity), N=2, reward_fn=reward, threshold=1.0)
        self.set_lm(plain_lm(ALWAYS))

    def forward(self, number: int) -> Any:
        return self.best(number=number)


def ledger_of(program: dspy.Module) -> Ledger:
    # The progress bars of several dspy.Parallel at once get into each other's way.
    return evaluate(program, numbers(4), parity_match, num_threads=1, progress=False).ledger


@pytest.mark.parametrize("ask", WAYS)
def test_an_lm_that_is_no_predictors_own_is_paid_once_an_answer(ask: Any) -> None:
    ledger = ledger_of(Asks(ask, PaidLM(PRICE)))
    assert (ledger.lm_calls, ledger.cache_hits, ledger.cost) == (8, 0, 4 * PRICE)
    assert ledger_of(Asks(ask, PaidLM(None))).cost is None


def test_the_judge_of_best_of_n_is_paid() -> None:
    judge = owning(PaidLM(PRICE))
    assert ledger_of(Best(judge)).cost == 4 * PRICE


def test_a_program_that_a_metric_evaluates_is_paid() -> None:
    judge = owning(PaidLM(PRICE))

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return evaluate(judge, [example], parity_match, num_threads=1, progress=False).mean

    ledger = evaluate(owning(plain_lm(ALWAYS)), numbers(4), metric, num_threads=1, progress=False).ledger
    assert (ledger.lm_calls, ledger.cache_hits, ledger.cost) == (8, 0, 4 * PRICE)


class Decisions(TypeSafe):
    """TypeSafe without its client."""

    def __call__(self, state: Any, questions: Any) -> Any:
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return self._finish(
            {"state": state, "questions": questions}, {"model": "d", "usage": usage, "answers": {}}, False
        )


def test_the_price_of_a_typesafe_model_is_not_known() -> None:
    ledger = ledger_of(Asks(lambda program, _: program.big({}, {}), Decisions(cache=False)))
    assert (ledger.lm_calls, ledger.cost) == (8, None)


def test_a_call_that_fails_between_several_answers_leaves_the_cost_of_others_known() -> None:
    class Fails(PaidLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            dspy.settings.usage_tracker.add_usage(self.model, {"prompt_tokens": 10})
            raise RuntimeError("503")

    def ask(program: Asks, number: int) -> None:
        directly(program, number)
        with suppress(Exception):
            program.p(number=number, lm=Fails(PRICE))

    assert ledger_of(Asks(ask, PaidLM(PRICE))).cost == 4 * PRICE


def two_steps_adapter(price: float | None) -> tuple[dspy.Predict, dspy.Adapter]:
    """A predictor that writes what the paid LM makes an answer of."""
    program = dspy.Predict(Parity)
    program.set_lm(plain_lm(FakeEngine(lambda r: r.learned or "[[ ## number ## ]]\n" + r.user.split()[-1])))
    return program, dspy.TwoStepAdapter(PaidLM(price))


def test_the_lm_that_reads_answers_for_an_adapter_is_paid() -> None:
    program, adapter = two_steps_adapter(PRICE)
    with dspy.context(adapter=adapter):
        assert ledger_of(program).cost == 4 * PRICE


def test_rows_ask_no_lm_to_read_their_answers() -> None:
    program, adapter = two_steps_adapter(PRICE)
    with dspy.context(adapter=adapter):
        collected = LoRAFinetune(parity_match, num_samples=0, rescue=False).collect(program, trainset=numbers(4))
    assert collected.ledger.cost == 4 * PRICE
    assert sorted(row.completion for row in collected.rows) == sorted(f"parity: {right(n)}" for n in range(4))
    assert len(adapter.extraction_model.history) == 4


def test_a_cached_answer_costs_nothing() -> None:
    big = plain_lm(parity_engine(lambda *_: True), cache=True)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        first, again = (ledger_of(Asks(in_a_context, big)) for _ in range(2))
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    assert (first.lm_calls, first.cache_hits) == (8, 0)
    assert (again.lm_calls, again.cache_hits, again.cost) == (8, 4, 0)


@pytest.mark.parametrize("off", [{"disable_history": True}, {"max_history_size": 0}])
def test_a_cost_that_dspys_histories_would_tell_is_not_known_without_them(off: dict[str, Any]) -> None:
    with dspy.context(**off):
        assert ledger_of(Asks(directly, PaidLM(PRICE))).cost is None
        # Predictors' own LMs need none.
        assert ledger_of(Asks(lambda *_: None, None)).cost == 0
        assert ledger_of(owning(PaidLM(PRICE))).cost == 4 * PRICE


def test_a_module_of_the_program_keeps_no_history_of_a_run() -> None:
    lengths = []

    def ask(program: Asks, number: int) -> None:
        lengths.append(len(program.history))
        directly(program, number)
        lengths.append(len(program.history))

    ledger_of(Asks(ask, PaidLM(PRICE)))
    assert lengths == [0, 1] * 4


def test_a_budget_bounds_what_any_lm_of_the_program_is_paid() -> None:
    big = PaidLM(PRICE)
    report = report_within(PRICE * 11, Asks(directly, big), parity_match)
    assert [record.status for record in report.rounds] == ["complete", "skipped"]
    # What was under way when it ended is paid for, too.
    assert report.ledger.cost == PRICE * len(big.history) >= PRICE * 11


def test_a_budget_of_dollars_is_refused_where_the_price_of_any_lm_is_not_known() -> None:
    with pytest.raises(ConfigError, match="price DSPy does not know"):
        report_within(1, Asks(directly, PaidLM(None)), parity_match)
