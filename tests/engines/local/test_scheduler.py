"""The scheduler joins requests to batches, ends answers and outlives a full memory, over a decoder without a model."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from fake_decoder import EOS, FakeDecoder, OutOfMemory, job, run
from fakes import wait_for

from bettertogether.engines.answers import SamplingOptions, TokenScore
from bettertogether.engines.local.decoder import BatchRow, Decision
from bettertogether.engines.local.job import Job
from bettertogether.engines.local.scheduler import Scheduler
from bettertogether.engines.local.text_stream import TextStream
from bettertogether.errors import EngineClosedError, UnknownAdapterError


def test_an_answer_ends_at_the_end_token_which_is_not_part_of_it(scheduler: Scheduler) -> None:
    answer = run(scheduler, job(3))[0]
    assert (answer.text, answer.finish_reason, answer.generated_tokens) == ("dcb", "stop", 3)


def test_an_answer_ends_at_its_limit_within_forced_tokens_too(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    answer = run(scheduler, job(9, limit=4))[0]
    assert (answer.text, answer.finish_reason, answer.generated_tokens) == ("jihg", "length", 4)
    decoder.step = lambda rows: [Decision((3, 2, 1), ended=bool(row.output_ids)) for row in rows]  # type: ignore
    cut, whole = run(scheduler, job(9, limit=5), job(9, limit=6))
    assert (cut.text, cut.finish_reason, whole.text, whole.finish_reason) == ("dcbdc", "length", "dcbdcb", "stop")


def test_an_answer_ends_before_a_stop_text(scheduler: Scheduler) -> None:
    answer = run(scheduler, job(9, stop=("gf",)))[0]
    assert (answer.text, answer.finish_reason, answer.cut) == ("jih", "stop", True)


def test_scores_are_of_the_answers_tokens(scheduler: Scheduler) -> None:
    answer = run(scheduler, job(2, logprobs=0))[0]
    assert [score.token_id for score in answer.scores] == [2, 1]


def test_requests_are_decoded_together(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    jobs = [job(4) for _ in range(5)]
    with scheduler.exclusive():
        for one in jobs:
            scheduler.submit(one)
    assert [one.future.result(timeout=10).text for one in jobs] == ["edcb"] * 5
    assert decoder.batches == [5] * 5


def test_finished_requests_leave_and_new_ones_join(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    answers = run(scheduler, *[job(1 + place % 3) for place in range(20)])
    assert [answer.generated_tokens for answer in answers] == [1 + place % 3 for place in range(20)]
    assert max(decoder.batches) == 8
    assert not decoder.held


def test_a_stop_text_before_an_unfinished_character_at_the_limit_ends_the_answer(scheduler: Scheduler) -> None:
    row = BatchRow([9], 1, sampling=SamplingOptions(stop=("x",)))
    answer = run(scheduler, Job(row, TextStream(lambda token_ids: "ax\ufffd" if token_ids else "", ("x",))))[0]
    assert (answer.text, answer.finish_reason, answer.cut) == ("a", "stop", True)


def test_text_is_given_as_it_comes(scheduler: Scheduler) -> None:
    pieces: list[str] = []
    one = job(3)
    one.sink = lambda text, scores: pieces.append(text)
    run(scheduler, one)
    assert "".join(pieces) == "dcb"


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    scheduler: Scheduler, decoder: FakeDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    decoder.largest = 2
    answers = run(scheduler, *[job(3) for _ in range(8)])
    assert [answer.text for answer in answers] == ["dcb"] * 8
    assert max(decoder.batches) == 2
    assert "halved to 4" in caplog.text


@pytest.mark.parametrize("cause", ["out of memory", "postponed"])
def test_requests_that_have_to_wait_again_keep_their_order(
    scheduler: Scheduler, decoder: FakeDecoder, cause: str
) -> None:
    asked: list[list[int]] = []
    admit, step = decoder.admit, decoder.step

    def noted(rows: Sequence[BatchRow]) -> list[BatchRow]:
        asked.append([row.prompt_ids[0] for row in rows])
        return admit(rows)

    def refused(rows: Sequence[BatchRow]) -> list[Decision]:
        decoder.step = step  # type: ignore[method-assign]
        if cause == "out of memory":
            raise OutOfMemory
        return [Decision(postponed=True)] * len(rows)

    decoder.admit, decoder.step = noted, refused  # type: ignore[method-assign]
    with scheduler.exclusive():
        jobs = [job(count) for count in (4, 5, 6, 7)]
        for one in jobs:
            scheduler.submit(one)
    for one in jobs:
        one.future.result(timeout=10)
    assert asked[:2] == [[4, 5, 6, 7], [4, 5] if cause == "out of memory" else [4, 5, 6, 7]]


def test_the_batch_grows_again_when_it_was_empty(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    decoder.largest = 4
    run(scheduler, *[job(2) for _ in range(8)])
    decoder.largest = 100
    for _ in range(3):
        run(scheduler, job(1))
    decoder.batches.clear()
    decoder.gate.clear()
    jobs = [job(1) for _ in range(8)]
    for one in jobs:
        scheduler.submit(one)
    time.sleep(0.05)
    decoder.gate.set()
    assert [one.future.result(timeout=10).text for one in jobs] == ["b"] * 8
    assert max(decoder.batches) == 8


def test_a_single_request_that_runs_out_of_memory_fails_with_that_error(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    decoder.largest = 0
    with pytest.raises(OutOfMemory):
        run(scheduler, job(3))
    decoder.largest = 1
    assert run(scheduler, job(1))[0].text == "b"


def test_a_failed_step_fails_its_requests_with_the_error_and_no_others(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    broken = ZeroDivisionError("broken")
    decoder.fails = lambda rows: broken if any(row.prompt_ids == [7] for row in rows) else None
    scheduler.submit(bad := job(7))
    with pytest.raises(ZeroDivisionError) as caught:
        bad.future.result(timeout=10)
    assert caught.value is broken
    assert run(scheduler, job(2))[0].text == "cb"


def test_a_failed_admission_leaves_running_requests_alone(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    admit = decoder.admit

    def refuse(rows: Sequence[BatchRow]) -> list[BatchRow]:
        if any(row.prompt_ids == [7] for row in rows):
            raise ValueError("not this one")
        return admit(rows)

    decoder.admit = refuse  # type: ignore[method-assign]
    decoder.gate.clear()
    scheduler.submit(good := job(5))
    while not decoder.held:
        time.sleep(0.001)
    scheduler.submit(bad := job(7))
    decoder.gate.set()
    with pytest.raises(ValueError, match="not this one"):
        bad.future.result(timeout=10)
    assert good.future.result(timeout=10).text == "fedcb"


def test_a_model_that_can_not_be_loaded_fails_the_requests_and_is_tried_again(decoder: FakeDecoder) -> None:
    tries: list[int] = []

    def make() -> FakeDecoder:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("no weights")
        return decoder

    made = Scheduler(
        make,
        eos_ids=frozenset({EOS}),
        max_batch_size=8,
        out_of_memory=lambda error: False,
        check_adapter=lambda name: None,
    )
    with pytest.raises(OSError, match="no weights"):
        run(made, job(1))
    assert run(made, job(1))[0].text == "b"
    made.close()


def test_a_cancelled_request_leaves_the_batch(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    decoder.gate.clear()
    scheduler.submit(gone := job(90))
    scheduler.submit(stays := job(5))
    while not decoder.held:
        time.sleep(0.001)
    scheduler.submit(never := job(7))
    assert gone.future.cancel()
    assert never.future.cancel()
    seen: set[BatchRow] = set()
    decoder.fails = seen.update
    decoder.gate.set()
    assert stays.future.result(timeout=10).text == "fedcb"
    assert decoder.batches[-1] == 1
    assert never.row not in seen


def test_requests_whose_adapter_is_removed_fail_alone_whether_they_run_or_wait(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    gone = UnknownAdapterError("gone")

    def check(name: str) -> None:
        if name == "gone":
            raise gone

    decoder.gate.clear()
    jobs = [job(4) for _ in range(12)]
    for place, one in enumerate(jobs):
        one.row.adapter = {0: "gone", 1: "kept", 11: "gone"}.get(place, "")
        scheduler.submit(one)
        assert wait_for(lambda: bool(decoder.held))
    scheduler._check_adapter = check
    decoder.gate.set()
    assert [jobs[place].future.exception(timeout=10) for place in (0, 11)] == [gone, gone]
    assert [one.future.result(timeout=10).text for one in jobs[1:11]] == ["edcb"] * 10
    assert (decoder.batches[:2], scheduler.limit, decoder.resets) == ([1, 8], 8, 0)
    assert not decoder.held


def test_closing_fails_what_is_pending_and_refuses_what_comes(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    decoder.gate.clear()
    scheduler.submit(pending := job(90))
    while not decoder.held:
        time.sleep(0.001)
    threading.Timer(0.05, decoder.gate.set).start()
    scheduler.close()
    with pytest.raises(EngineClosedError, match="before this request was answered"):
        pending.future.result(timeout=10)
    with pytest.raises(EngineClosedError, match="closed"):
        scheduler.submit(job(1))


def test_counters_add_up(scheduler: Scheduler) -> None:
    run(scheduler, job(2), job(3))
    counters = scheduler.counters()
    assert (counters["requests"], counters["prompt_tokens"], counters["generated_tokens"]) == (2, 2, 5)
    assert counters["batches"] == counters["forward_passes"]


def _submit_in_child(scheduler: Scheduler, queue: Any) -> None:
    try:
        scheduler.submit(job(1))
    except EngineClosedError as error:
        queue.put(str(error))


def test_after_a_fork_the_error_says_so(scheduler: Scheduler) -> None:
    run(scheduler, job(1))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_submit_in_child, args=(scheduler, queue))
    child.start()
    assert "another process" in queue.get(timeout=10)
    child.join()


def test_what_a_sink_raises_fails_its_own_request_and_no_other(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    decoder.gate.clear()
    jobs = [job(5) for _ in range(3)]
    gone = RuntimeError("Event loop is closed")

    def sink(text: str, scores: Sequence[TokenScore]) -> None:
        raise gone

    jobs[1].sink = sink
    for one in jobs:
        scheduler.submit(one)
    decoder.gate.set()
    assert jobs[1].future.exception(timeout=10) is gone
    assert [jobs[place].future.result(timeout=10).text for place in (0, 2)] == ["fedcb"] * 2
    assert not decoder.held


def test_what_a_sink_raises_at_the_last_piece_fails_its_own_request(scheduler: Scheduler) -> None:
    one = job(3, stop=("bb",))
    pieces: list[str] = []

    def sink(text: str, scores: Sequence[TokenScore]) -> None:
        pieces.append(text)
        if text == "b":
            raise ValueError("the last")

    one.sink = sink
    scheduler.submit(one)
    with pytest.raises(ValueError, match="the last"):
        one.future.result(timeout=10)
    assert "".join(pieces) == "dcb"
    assert run(scheduler, job(2))[0].text == "cb"


def test_tokens_that_can_not_be_read_fail_their_own_request(scheduler: Scheduler) -> None:
    def broken(token_ids: Sequence[int]) -> str:
        raise UnicodeError("no text")

    bad = Job(BatchRow([4], 100, sampling=SamplingOptions(stop=("x",))), TextStream(broken, ("x",)))
    late = Job(BatchRow([4], 100), TextStream(broken))
    good = job(4)
    for one in (bad, good, late):
        scheduler.submit(one)
    assert good.future.result(timeout=10).text == "edcb"
    for one in (bad, late):
        with pytest.raises(UnicodeError, match="no text"):
            one.future.result(timeout=10)


def test_a_decision_that_is_an_error_ends_its_row_alone(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    broken, step = ArithmeticError("not a number"), decoder.step

    def some(rows: Sequence[BatchRow]) -> list[Decision]:
        return [
            Decision(error=broken) if row.prompt_ids == [7] else decision
            for row, decision in zip(rows, step(rows), strict=True)
        ]

    decoder.step = some  # type: ignore[method-assign]
    jobs = [job(3), job(7), job(2)]
    for one in jobs:
        scheduler.submit(one)
    assert [jobs[place].future.result(timeout=10).text for place in (0, 2)] == ["dcb", "cb"]
    assert jobs[1].future.exception(timeout=10) is broken


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_a_pass_that_fails_for_one_request_answers_the_others(
    scheduler: Scheduler, decoder: FakeDecoder, bad: int
) -> None:
    decoder.fails = lambda rows: IndexError("out of range") if any(row.prompt_ids == [9] for row in rows) else None
    decoder.gate.clear()
    jobs = [job(9 if place == bad else 4) for place in range(8)]
    for one in jobs:
        scheduler.submit(one)
    decoder.gate.set()
    for place, one in enumerate(jobs):
        if place == bad:
            with pytest.raises(IndexError, match="out of range"):
                one.future.result(timeout=10)
        else:
            assert one.future.result(timeout=10).text == "edcb"
    assert not decoder.held
    assert scheduler.limit == 8


def test_a_large_request_that_comes_in_waits_where_memory_does_not_suffice_for_two(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    admit = decoder.admit

    def full(rows: Sequence[BatchRow]) -> list[BatchRow]:
        if decoder.held and any(row.prompt_ids == [7] for row in rows):
            raise OutOfMemory
        return admit(rows)

    decoder.admit = full  # type: ignore[method-assign]
    decoder.gate.clear()
    scheduler.submit(small := job(5))
    while not decoder.held:
        time.sleep(0.001)
    scheduler.submit(large := job(7))
    decoder.gate.set()
    assert small.future.result(timeout=10).text == "fedcb"
    assert large.future.result(timeout=10).text == "hgfedcb"


def test_a_worker_that_ended_fails_its_requests_and_is_started_again(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    decoder.fails = lambda rows: SystemExit(3)
    scheduler.submit(lost := job(3))
    assert isinstance(lost.future.exception(timeout=10), SystemExit)
    decoder.fails = lambda rows: None
    decoder.held.clear()
    assert run(scheduler, job(2))[0].text == "cb"


def test_a_reset_that_fails_ends_no_more_than_the_requests_at_hand(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    reset = decoder.reset

    def broken() -> None:
        reset()
        raise ZeroDivisionError("reset")

    decoder.fails = lambda rows: ValueError("step")
    decoder.reset = broken  # type: ignore[method-assign]
    scheduler.submit(lost := job(3))
    assert isinstance(lost.future.exception(timeout=10), ZeroDivisionError)
    decoder.fails, decoder.reset = lambda rows: None, reset  # type: ignore[method-assign]
    assert run(scheduler, job(2))[0].text == "cb"


def test_a_request_that_was_cancelled_while_its_pass_failed_is_no_trouble(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    decoder.gate.clear()
    scheduler.submit(gone := job(3))
    while not decoder.held:
        time.sleep(0.001)
    assert gone.future.cancel()
    decoder.fails = lambda rows: ValueError("step")
    decoder.gate.set()
    time.sleep(0.02)
    decoder.fails = lambda rows: None
    assert run(scheduler, job(2))[0].text == "cb"
