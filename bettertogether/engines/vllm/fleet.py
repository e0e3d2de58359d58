"""Several servers of one model: which of them answers a request, and which are left out for a while."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import httpx
from dspy.lm15 import ServerError, TransportError

from ...errors import AnswerTimeoutError, ModelError
from ...printable import get_logger
from .api import GONE, check
from .breakable import Breakable
from .member import UNMET, Adapter, Member, Served

logger = get_logger(__name__)

LOAD_BOUND = 1.25
"""How many requests a server may have in flight for its key, in shares of one server."""
FIRST_REST_S = 1.0
LONGEST_REST_S = 60.0


class Fleet:
    """Servers that share the requests, so that those of one prefix meet where it is cached.

    The key of a request puts the servers in an order of its own, by rendezvous hashing (Thaler and Ravishankar, 1998):
    the same in every process, and when a server goes only its own keys move. The first in the order that is in service
    and has less than its share of the requests in flight, times `LOAD_BOUND`, takes the request (consistent hashing
    with bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018).

    A server that is gone is left out for `FIRST_REST_S`, and its requests go to the others at once. Then the next
    request asks it for its models first: where that fails it is left out for twice as long, up to `LONGEST_REST_S`.
    When all are gone, the request fails, and DSPy tries it again (`num_retries` of the LM, with pauses that double):
    this class has no pauses of its own, and asks each server once.

    Args:
        members: The servers.
        base: Name of the base model on each of them.
        timeout_s: For messages: what the client waits for an answer.
    """

    def __init__(self, members: Sequence[Member], base: str, timeout_s: float) -> None:
        self.members = tuple(members)
        self.base = base
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    @contextmanager
    def reply(
        self,
        key: str,
        body: Mapping[str, Any],
        adapter: Adapter | None,
        breakable: Breakable | None = None,
        *,
        stream: bool = False,
    ) -> Iterator[httpx.Response]:
        """A server's reply to a request for completions, which is no error; of a `stream` the body is still to be read.
        A `breakable` may break it off meanwhile.

        Raises CancelledError where that was broken off, ModelError where a server does not load the adapter,
        AnswerTimeoutError, and lm15's TransportError, ServerError, RateLimitError, AuthError and InvalidRequestError.
        """
        with ExitStack() as visit:
            ask = partial(Member.completion, body=body, adapter=adapter, breakable=breakable, stream=stream)
            yield self._first_reply(visit, key, adapter, ask)

    def _first_reply(
        self, visit: ExitStack, key: str, adapter: Adapter | None, ask: Callable[[Member], httpx.Response]
    ) -> httpx.Response:
        gone: dict[Member, Exception] = {}
        while (member := self._take(key, gone)) is not None:
            try:
                return visit.enter_context(self._asked(member, adapter, ask, gone))
            except (TransportError, ServerError):
                if len(self.members) == 1 or member not in gone:
                    raise
        said = "\n".join(f"- {error}" for error in gone.values())
        raise TransportError(f"None of the {len(gone)} servers answers:\n{said}")

    @contextmanager
    def _asked(
        self,
        member: Member,
        adapter: Adapter | None,
        ask: Callable[[Member], httpx.Response],
        gone: dict[Member, Exception],
    ) -> Iterator[httpx.Response]:
        """The reply of one server, which is put into `gone` with the error when that says that nobody is there."""
        try:
            if member.failures and len(self.members) > 1:
                member.welcome_back(self.base)
                self._in_service(member)
            with member.holding(adapter), closing(ask(member)) as reply:
                check(reply, member.server.url)
                yield reply
        except httpx.ReadTimeout as error:
            if not member.is_well():
                raise self._left_out(member, _no_answer(member, error), gone) from error
            raise AnswerTimeoutError(
                f"The vLLM server at {member.server.url} is well, but took longer than request_timeout_s="
                f"{self._timeout_s:g}. It was told to stop, and is not asked again. Give a longer request_timeout_s, a "
                "lower max_tokens, or a lower concurrency (engine_options)."
            ) from error
        except httpx.TransportError as error:
            raise self._left_out(member, _no_answer(member, error), gone) from error
        except TransportError as error:
            self._left_out(member, error, gone)
            raise
        except ServerError as error:
            if error.status in GONE or not member.is_well():
                self._left_out(member, error, gone)
            raise
        else:
            self._in_service(member)
        finally:
            with self._lock:
                member.in_flight -= 1

    def _take(self, key: str, gone: Collection[Member]) -> Member | None:
        """The server for a request, which is in flight there from now on; None when all are gone."""
        now = time.monotonic()
        with self._lock:
            left = [member for member in self.order(key) if member not in gone]
            resting = [member for member in left if member.failures]
            due = [member for member in resting if member.rests_until <= now]
            member = due[0] if due else self._with_room([member for member in left if not member.failures])
            member = member or min(resting, key=lambda each: each.rests_until, default=None)
            if member is None:
                return None
            if member.failures:
                member.failures += 1
                member.rests_until = now + _rest_s(member.failures)
            member.in_flight += 1
            return member

    def order(self, key: str) -> list[Member]:
        """The servers in the order in which a request of this key would go to them."""

        def weight(member: Member) -> bytes:
            return hashlib.sha256(f"{member.server.url}\0{key}".encode()).digest()

        return sorted(self.members, key=weight) if len(self.members) > 1 else list(self.members)

    def _with_room(self, left: Sequence[Member]) -> Member | None:
        serving = [member.in_flight for member in self.members if not member.failures]
        room = math.ceil(LOAD_BOUND * (sum(serving) + 1) / len(serving)) if serving else 0
        free = (member for member in left if member.in_flight < room)
        return next(free, None) or min(left, key=lambda member: member.in_flight, default=None)

    def _left_out(self, member: Member, error: Exception, gone: dict[Member, Exception]) -> Exception:
        gone[member] = error
        with self._lock:
            first = not member.failures
            if first:
                member.failures = 1
                member.rests_until = time.monotonic() + _rest_s(1)
        if first and len(self.members) > 1:
            logger.warning("The vLLM server at %s is left out until it answers again: %s", member.server.url, error)
        return error

    def _in_service(self, member: Member) -> None:
        with self._lock:
            back = bool(member.failures)
            member.failures = 0
        if back and len(self.members) > 1:
            logger.info("The vLLM server at %s answers again.", member.server.url)


def meet(members: Sequence[Member]) -> tuple[str, int | None]:
    """The name of the base model that all of these servers have, and the shortest of the contexts that they tell.

    Raises ModelError for servers that don't answer, and for those of different models.
    """
    served: list[Served] = []
    silent: list[str] = []
    for member in members:
        try:
            served.append(member.served())
        except UNMET as error:
            silent.append(f"No vLLM server answers at {member.server.url}: {error!r}.")
    if silent:
        raise ModelError(
            f"{' '.join(silent)} Start one there (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora "
            f"--max-lora-rank 64), or leave {'that address' if len(members) > 1 else 'url'} out"
            f"{'' if len(members) > 1 else ' to have one started here'}. A server with a key wants api_key=; one whose "
            "certificate is of an authority of your own wants SSL_CERT_FILE=FILE in the environment."
        )
    if len({each.base for each in served}) > 1:
        said = "; ".join(f"{m.server.url} serves {each.base!r}" for m, each in zip(members, served, strict=True))
        raise ModelError(
            f"The servers of url= have different base models: {said}. Requests are shared among servers of one model: "
            "start them all with the same model and --served-model-name, or leave the others out."
        )
    lengths = [each.max_length for each in served if each.max_length]
    return served[0].base, min(lengths, default=None)


def _rest_s(failures: int) -> float:
    return min(FIRST_REST_S * 2.0 ** min(failures - 1, 10), LONGEST_REST_S)


def _no_answer(member: Member, error: Exception) -> TransportError:
    return TransportError(
        f"No answer from the vLLM server at {member.server.url}: {error!r}.{member.server.why_gone()}"
    )
