"""Items are worked on by threads that share nothing but DSPy's settings, and results keep their order."""

from __future__ import annotations

import _thread
import asyncio
import threading
import time
from typing import Any

import dspy
import pytest
from fakes import parity_engine, parity_program

from bettertogether.errors import BudgetExceeded
from bettertogether.rollouts.parallel import parallel_map, thread_count


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 * (3 - item))
        return item * 10

    assert parallel_map(slow_first, [0, 1, 2], num_threads=3) == [0, 10, 20]


def test_on_result_is_called_once_an_item_in_the_calling_thread() -> None:
    seen: list[tuple[int, int, int]] = []
    parallel_map(
        lambda item: item + 1,
        [5, 6, 7],
        num_threads=2,
        on_result=lambda index, result: seen.append((index, result, threading.get_ident())),
    )
    assert sorted(seen) == [(i, 6 + i, threading.get_ident()) for i in range(3)]


def test_no_items_give_no_results() -> None:
    assert parallel_map(str, [], num_threads=4) == []


def test_no_more_than_num_threads_run_at_once() -> None:
    lock, three, running, most = threading.Lock(), threading.Barrier(3), 0, 0

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        three.wait(60)
        with lock:
            running -= 1

    parallel_map(work, range(12), num_threads=3)
    assert most == 3


def test_dspy_settings_reach_the_threads() -> None:
    with dspy.context(max_errors=77):
        assert parallel_map(lambda _: dspy.settings.max_errors, [1, 2], num_threads=2) == [77, 77]


def test_a_call_by_asyncify_waits_for_none_of_another_thread() -> None:
    every = threading.Barrier(12)

    def work(_: int) -> int:
        return asyncio.run(asyncio.wait_for(dspy.asyncify(every.wait)(10), 10))

    assert sorted(parallel_map(work, range(12), num_threads=12)) == list(range(12))


@pytest.mark.parametrize(("given", "used"), [(8, 32), (1000, 1000), (1, 1)])
def test_calls_by_asyncify_have_room_for_sixteen_in_each_thread_where_the_user_sets_no_bound(
    given: int, used: int
) -> None:
    with dspy.context(async_max_workers=given):
        assert parallel_map(lambda _: dspy.settings.async_max_workers, [1, 2], num_threads=2) == [used, used]


def test_a_context_set_in_one_item_does_not_reach_another() -> None:
    def work(item: int) -> int:
        with dspy.context(max_errors=item):
            time.sleep(0.01)
            return int(dspy.settings.max_errors)

    assert parallel_map(work, [1, 2, 3, 4], num_threads=4) == [1, 2, 3, 4]


def test_the_first_exception_is_raised_and_what_has_not_started_never_runs() -> None:
    started: list[int] = []

    def work(item: int) -> None:
        started.append(item)
        if item == 0:
            raise ValueError("item 0")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="item 0"):
        parallel_map(work, range(50), num_threads=2)
    time.sleep(0.1)
    assert len(started) < 10


def test_what_is_under_way_when_a_budget_ends_is_told_too() -> None:
    together, told = threading.Barrier(4), list[int]()

    def work(item: int) -> int:
        if item < 4:
            together.wait(60)
            time.sleep(0.05 * item)
        return item

    def note(index: int, result: int) -> None:
        told.append(result)
        raise BudgetExceeded(f"used up at {result}")

    with pytest.raises(BudgetExceeded, match="used up at"):
        parallel_map(work, range(50), num_threads=4, on_result=note)
    # A thread that was done before the first result was told may have begun with another one.
    assert sorted(told)[:4] == [0, 1, 2, 3]


def test_an_interrupt_is_raised_at_once_although_items_are_still_running() -> None:
    release = threading.Event()
    threading.Timer(0.1, _thread.interrupt_main).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        parallel_map(lambda _: release.wait(30), range(4), num_threads=2)
    assert time.monotonic() - started < 20
    release.set()


def test_num_threads_asked_for_wins() -> None:
    assert thread_count(parity_program(parity_engine(lambda *_: True, concurrency=32)), 3) == 3


def test_threads_default_to_what_the_engine_likes_to_have_in_flight() -> None:
    with dspy.context(num_threads=4):
        assert thread_count(parity_program(parity_engine(lambda *_: True, concurrency=32)), None) == 32


def test_without_a_local_engine_threads_are_dspys() -> None:
    with dspy.context(num_threads=5):
        assert thread_count(dspy.Predict("q -> a"), None) == 5


class Items(list[int]):
    """Items that count how many of them were taken."""

    taken = 0

    def __getitem__(self, index: Any) -> Any:
        self.taken += 1
        return super().__getitem__(index)


def test_items_are_taken_as_threads_get_to_them() -> None:
    items, both = Items(range(100)), threading.Barrier(2)

    def work(item: int) -> int:
        both.wait(60)
        taken = items.taken
        both.wait(60)
        return taken

    assert parallel_map(work, items, num_threads=2) == [2 * (item // 2) + 2 for item in items]
