"""The gate of the server: those of one key are inside together, and whoever needs to be alone has a turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fakes import wait_for

from bettertogether.engines.vllm.gate import Gate


def overlaps(keys: list[Hashable]) -> list[set[Hashable]]:
    """Which keys were inside at the same time, seen by each of several threads that enter and linger."""
    gate, inside, seen, lock = Gate(), list[Hashable](), list[set[Hashable]](), threading.Lock()

    def enter(key: Hashable) -> None:
        with gate.together(key):
            with lock:
                inside.append(key)
                seen.append(set(inside))
            time.sleep(0.02)
            with lock:
                inside.remove(key)

    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(enter, keys))
    return seen


def test_those_of_one_key_are_inside_together() -> None:
    gate, both = Gate(), threading.Barrier(2, timeout=5)

    def enter() -> None:
        with gate.together("a"):
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(enter), pool.submit(enter)]:
            done.result()


def test_those_of_different_keys_are_not() -> None:
    assert all(len(keys) == 1 for keys in overlaps(["a", "b"] * 6))


def test_whoever_wants_to_be_alone_waits_for_those_inside_and_keeps_others_out() -> None:
    gate, steps = Gate(), []

    def train() -> None:
        with gate.alone():
            steps.append("training")
            time.sleep(0.05)
            steps.append("trained")

    with ThreadPoolExecutor(2) as pool:
        with gate.together():
            training = pool.submit(train)
            time.sleep(0.05)
            steps.append("answered")
        while "training" not in steps:
            time.sleep(0.001)
        with gate.together():
            steps.append("answered again")
        training.result()
    assert steps == ["answered", "training", "trained", "answered again"]


def test_an_error_inside_lets_others_in() -> None:
    gate = Gate()
    try:
        with gate.alone():
            raise ValueError
    except ValueError:
        pass
    with gate.together("a"):
        assert gate.inside == 1


def test_whoever_waits_to_be_alone_comes_before_those_who_come_later() -> None:
    gate, order = Gate(), []

    def enter(name: str) -> None:
        with gate.alone() if name == "training" else gate.together("base"):
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with gate.together("base"):
            entered = [pool.submit(enter, "training")]
            wait_for(lambda: len(gate._waiting) == 1)
            entered += [pool.submit(enter, "base"), pool.submit(enter, "base")]
            wait_for(lambda: len(gate._waiting) == 3)
            assert order == []
        for done in entered:
            done.result()
    assert order == ["training", "base", "base"]


def test_whoever_gives_up_waiting_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def interrupted(self: threading.Condition, predicate: Any) -> None:
        raise KeyboardInterrupt

    with gate.together("a"):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), gate.alone():
                pass
        with gate.together("a"):
            assert gate.inside == 2
