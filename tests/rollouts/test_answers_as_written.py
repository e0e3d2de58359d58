"""Cut answers are no rows, and an answer is learned as the LM wrote it where an adapter can't write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dspy
import pytest
from fakes import CutEngine, field_of, number_of, numbers, parity_match, parity_program, reply, right
from tries import call_rows
from watched import ALWAYS, rows_of

from bettertogether.errors import NoTrainingDataError
from bettertogether.rollouts.metrics import Verdict
from bettertogether.rollouts.responses import is_cut
from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.runner import Runner
from bettertogether.rollouts.traces import ExamplePass, Trace, collect_traces
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.demo_sets import demos_of
from bettertogether.steps.rows_from_traces import Runs, rows_from_traces
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine


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
        next(call_rows(program, engine, bare))


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
    none = collect_traces(program, [], ExamplePass(parity_match))
    runs = Runs(numbers(1), replace(none, traces=(trace,), examples=1))
    optimizer = LoRAFinetune(parity_match)
    with pytest.raises(NoTrainingDataError, match="1 x cut at max_tokens"):
        rows_from_traces(program, runs, optimizer.trainable(program), optimizer.rows)
