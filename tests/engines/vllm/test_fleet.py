"""Which server a request goes to: by its key, within the bound on loads, past those that are gone."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from dspy.lm15 import TransportError

from bettertogether.engines.vllm.fleet import Fleet, _rest_s
from bettertogether.engines.vllm.member import Member
from bettertogether.engines.vllm.server import VLLMServer

KEYS = [f"predictor {number}" for number in range(300)]


def fleet_of(*urls: str) -> Fleet:
    no_client: Any = None
    options: Any = {"api_key": None, "command": ["vllm"], "options": {}, "startup_timeout_s": 1.0}
    servers = [VLLMServer("some/model", "some/model", url=url, **options) for url in urls]
    return Fleet([Member(server, no_client, 1) for server in servers], "some/model", 600.0)


def homes(fleet: Fleet) -> dict[str, str]:
    return {key: fleet.order(key)[0].server.url for key in KEYS}


def test_the_keys_are_spread_over_the_servers_in_the_same_way_everywhere() -> None:
    counts = Counter(homes(fleet_of("http://a", "http://b", "http://c")).values())
    assert counts == {"http://a": 95, "http://b": 100, "http://c": 105}


def test_a_server_more_takes_its_share_of_the_keys_and_moves_no_others() -> None:
    before, after = homes(fleet_of("http://a", "http://b")), homes(fleet_of("http://b", "http://c", "http://a"))
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {"http://c"}
    assert len(moved) == Counter(after.values())["http://c"]


def taken(fleet: Fleet, count: int, key: str = "k") -> list[int]:
    """How many requests of one key each server has in flight, in the key's order."""
    for _ in range(count):
        fleet._take(key, ())
    return [member.in_flight for member in fleet.order(key)]


def test_requests_of_one_key_stay_together_until_their_server_has_its_share_times_the_bound() -> None:
    loads = [taken(fleet_of("http://a", "http://b", "http://c"), count) for count in (1, 3, 10, 64)]
    assert loads == [[1, 0, 0], [2, 1, 0], [5, 4, 1], [27, 27, 10]]


def test_a_request_of_another_key_goes_where_there_is_room() -> None:
    fleet = fleet_of("http://a", "http://b")
    first, second = fleet.order("k")
    first.in_flight, second.in_flight = 9, 0
    assert fleet._take("k", ()) is second


def test_many_requests_that_find_a_server_gone_leave_it_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    fleet = fleet_of("http://a", "http://b")
    home, other = fleet.order("k")
    for _ in range(10):
        fleet._left_out(home, TransportError("gone"), {})
    assert (home.failures, home.rests_until) == (1, 101.0)
    assert [fleet._take("k", ()) for _ in range(3)] == [other] * 3


def test_a_server_that_is_gone_is_tried_by_one_request_at_a_time_with_longer_and_longer_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    fleet = fleet_of("http://a", "http://b")
    home, other = fleet.order("k")
    fleet._left_out(home, TransportError("gone"), {})
    now[0] = 101.0
    assert [fleet._take("k", ()) for _ in range(3)] == [home, other, other]
    assert home.rests_until == 103.0
    fleet._in_service(home)
    assert fleet._take("k", ()) is home
    assert [_rest_s(failures) for failures in (1, 2, 3, 6, 7, 2000)] == [1, 2, 4, 32, 60, 60]


def test_when_all_are_gone_each_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = fleet_of("http://a", "http://b")
    gone: dict[Member, Exception] = {}
    for each in fleet.members:
        fleet._left_out(each, TransportError("gone"), {})
    tried = []
    while (member := fleet._take("k", gone)) is not None:
        tried.append(member)
        gone[member] = TransportError("gone")
    assert sorted(member.server.url for member in tried) == ["http://a", "http://b"]
