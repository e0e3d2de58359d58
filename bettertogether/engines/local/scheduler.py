"""Continuous batching: one worker thread, into whose batch new requests come and from which finished ones leave.

Knows nothing of tensors: what decides tokens is a `Decoder`, which a test can replace.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...errors import EngineClosedError, UnknownAdapterError
from ...printable import get_logger
from ..answers import FinishReason
from ..making_process import MakingProcess
from .decoder import BatchRow, Decision, Decoder
from .job import Job

logger = get_logger(__name__)

GATHER_S = 0.003
"""An idle engine waits so long for companions of a request, and again after each that comes."""
GATHER_ROUNDS = 5
EXIT_WAIT_S = 30.0
"""How long the end of the program may wait for a training on a daemon thread."""
COUNTERS = ("requests", "prompt_tokens", "generated_tokens", "forced_tokens", "batches")


class Scheduler:
    """Runs jobs on a decoder.

    Args:
        make_decoder: Called on the worker thread before the first job; may take long (it loads the model).
        eos_ids: Tokens that end an answer and are not part of it.
        max_batch_size: Rows decoded at once, at most.
        out_of_memory: Tells whether an error means that a smaller batch may succeed.
        check_adapter: Given an adapter's name, raises UnknownAdapterError where it is served no more.
    """

    def __init__(
        self,
        make_decoder: Callable[[], Decoder],
        *,
        eos_ids: frozenset[int],
        max_batch_size: int,
        out_of_memory: Callable[[BaseException], bool],
        check_adapter: Callable[[str], object],
    ) -> None:
        self._make_decoder = make_decoder
        self._eos_ids = eos_ids
        self._max_batch_size = max_batch_size
        self.limit = max_batch_size
        """Rows decoded at once, at most, until memory suffices for more again."""
        self._out_of_memory = out_of_memory
        self._check_adapter = check_adapter
        self._decoder: Decoder | None = None
        self._waiting: deque[Job] = deque()
        self._running: dict[BatchRow, Job] = {}
        self._wake = threading.Condition()
        self._model_in_use = threading.Lock()
        self._pauses = 0
        """Threads that want the model to themselves; a lock alone would let the worker take it again first."""
        self._trainings = 0
        """Threads that are in a training, or get one ready."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._made_in = MakingProcess()
        self._counters = dict.fromkeys(COUNTERS, 0)
        _alive.add(self)

    @property
    def is_ours(self) -> bool:
        """Whether it was made in this process, and not in the one that this is a fork of."""
        return self._made_in.is_this

    def check_open(self) -> None:
        """Raises EngineClosedError where no job can be submitted, as in a fork. Takes no lock."""
        self._made_in.check("local_lm(...)")
        if self._closed:
            raise EngineClosedError("The engine is closed; make a new one to go on.")

    def submit(self, job: Job) -> None:
        """Queue a job; its future gets the answer, or the error. Raises EngineClosedError."""
        self.check_open()
        with self._wake:
            self.check_open()
            self._counters["requests"] += 1
            self._counters["prompt_tokens"] += len(job.row.prompt_ids)
            reason = self._begin(job)
            if reason is None:
                self._waiting.append(job)
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="bettertogether-engine", daemon=True)
                    self._thread.start()
                self._wake.notify_all()
        if reason is not None:
            job.finish(reason)

    def _begin(self, job: Job) -> FinishReason | None:
        """Write what the grammar forces from the start, which then goes through the model with the prompt."""
        constraint = job.row.constraint
        if constraint is None or job.row.sampling.logprobs is not None:
            return None
        forced = constraint.forced()
        self._counters["forced_tokens"] += len(forced)
        return self._take(job, Decision(tuple(forced), picked=False, ended=constraint.ended))

    def counters(self) -> dict[str, int]:
        """Work done so far."""
        decoder = self._decoder
        with self._wake:
            counters = dict(self._counters)
        return {**counters, **(decoder.counters() if decoder else {"forward_passes": 0, "prefix_tokens_reused": 0})}

    @contextmanager
    def training(self) -> Iterator[None]:
        """A training from first to last, for whose end the end of the program waits a while. Raises
        EngineClosedError."""
        self.check_open()
        with self._wake:
            self._trainings += 1
        try:
            yield
        finally:
            with self._wake:
                self._trainings -= 1
                self._wake.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the worker between two steps, so that the caller may use the model (and most of its memory). Raises
        EngineClosedError."""
        with self._wake:
            self._pauses += 1
        try:
            with self._model_in_use:
                self.check_open()
                if self._decoder is not None and not self._running:
                    self._decoder.reset()
                yield
        finally:
            with self._wake:
                self._pauses -= 1
                self._wake.notify_all()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside `exclusive`: give the model back to the worker for the block."""
        self._model_in_use.release()
        with self._wake:
            self._pauses -= 1
            self._wake.notify_all()
        try:
            yield
        finally:
            with self._wake:
                self._pauses += 1
            self._model_in_use.acquire()
            if self._decoder is not None and not self._running:
                self._decoder.reset()

    def forget_decoder(self) -> None:
        """Inside `exclusive`: free what the decoder holds; the next job makes another. Jobs under way go on then."""
        self._requeue(list(self._running))
        self._decoder = None

    def stop(self) -> None:
        """Let the worker end its step, and end it. Pending jobs are left as they are."""
        if not self.is_ours:
            # The fork left the thread behind, and may have left the lock taken.
            self._closed = True
            return
        with self._wake:
            self._closed = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def wait_for_trainings(self) -> None:
        """Wait a while for the threads that train; the next progress line ends a closed engine's training."""
        if self.is_ours:
            with self._wake:
                self._wake.wait_for(lambda: not self._trainings, EXIT_WAIT_S)

    def close(self) -> None:
        """Stop the worker; pending jobs fail with EngineClosedError."""
        self.stop()
        self._fail_all(EngineClosedError("The engine was closed before this request was answered."))

    def _fail_all(self, error: BaseException) -> None:
        jobs = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._decoder = None
        for job in jobs:
            job.fail(error)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(self._has_work)
                    if self._closed:
                        return
                    self._gather()
                with self._model_in_use:
                    self._cycle()
        except BaseException as error:
            # Nobody may wait for a thread that has ended; the next request starts another.
            logger.critical("The engine's worker thread ends, all requests with it.", exc_info=error)
            with self._wake:
                self._thread = None
                self._fail_all(error)

    def _has_work(self) -> bool:
        return self._closed or bool(not self._pauses and (self._waiting or self._running))

    def _gather(self) -> None:
        """With nothing running, wait a moment for the requests that other threads are about to send."""
        for _ in range(GATHER_ROUNDS):
            known = len(self._waiting)
            if self._running or self._closed or known >= self.limit:
                return
            self._wake.wait(GATHER_S)
            if len(self._waiting) == known:
                return

    def _cycle(self) -> None:
        """Admit what is waiting, and take one step."""
        if self._decoder is None and not self._load():
            return
        assert self._decoder is not None
        jobs: Sequence[Job] = ()
        try:
            self._drop_cancelled(self._decoder)
            self._fail_without_adapter(self._decoder)
            jobs = self._next_jobs()
            self._admit(self._decoder, jobs)
            jobs = list(self._running.values())
            decisions = self._decoder.step([job.row for job in jobs]) if jobs else []
        except Exception as error:
            self._handle(error, jobs)
        else:
            self._apply(self._decoder, jobs, decisions)

    def _load(self) -> bool:
        """Make the decoder; where that fails, those who wait get the error, and the next request tries again."""
        try:
            self._decoder = self._make_decoder()
        except Exception as error:
            logger.error("The model can't be loaded; %d requests fail.", len(self._waiting), exc_info=error)
            with self._wake:
                jobs = list(self._waiting)
                self._waiting.clear()
            for job in jobs:
                job.fail(error)
        return self._decoder is not None

    def _next_jobs(self) -> list[Job]:
        with self._wake:
            free = max(self.limit - len(self._running), 0)
            return list(self._waiting)[:free]

    def _admit(self, decoder: Decoder, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        by_row = {job.row: job for job in jobs}
        taken = decoder.admit(list(by_row))
        with self._wake:
            for row in taken:
                self._waiting.remove(by_row[row])
                self._running[row] = by_row[row]

    def _apply(self, decoder: Decoder, jobs: Sequence[Job], decisions: Sequence[Decision]) -> None:
        """Give each job what a step decided for it."""
        if not jobs:
            return
        self._counters["batches"] += 1
        for job, decision in reversed([*zip(jobs, decisions, strict=True)]):
            if decision.postponed:
                with self._wake:
                    self._waiting.appendleft(self._leave(decoder, job))
        for job, decision in zip(jobs, decisions, strict=True):
            if decision.token_ids:
                self._counters["forced_tokens"] += len(decision.token_ids) - 1
            reason, error = None, decision.error
            try:
                reason = None if error else self._take(job, decision)
            except Exception as raised:
                error = raised
            if reason is None and error is None:
                continue
            self._leave(decoder, job)
            if error is not None:
                job.fail(error)
            elif reason is not None:
                job.finish(reason)
        if not self._running:
            self.limit = min(self._max_batch_size, self.limit * 2)

    def _take(self, job: Job, decision: Decision) -> FinishReason | None:
        """Add decided tokens to a job; says why it ends, where they end it."""
        row = job.row
        token_ids = list(decision.token_ids)[: row.max_new_tokens - len(row.output_ids)]
        complete = decision.ended and len(token_ids) == len(decision.token_ids)
        end = next((place for place, token in enumerate(token_ids) if token in self._eos_ids), None)
        if end is not None:
            token_ids, row.end_ids = token_ids[:end], [token_ids[end]]
        row.output_ids += token_ids
        new = len(row.output_ids) + len(row.end_ids) - len(row.forced)
        row.forced += [place > 0 or not decision.picked for place in range(new)]
        scores = decision.scores[: len(token_ids)]
        row.scores += scores
        self._counters["generated_tokens"] += len(token_ids)
        if job.reads_text:
            text = job.stream.push(token_ids)
            if job.sink is not None and (text or scores):
                job.sink(text, scores)
        if end is not None or complete or job.stream.stopped:
            return "length" if getattr(row.constraint, "shortened", False) else "stop"
        return "length" if len(row.output_ids) >= row.max_new_tokens else None

    def _drop_cancelled(self, decoder: Decoder) -> None:
        for job in [job for job in self._running.values() if job.future.cancelled()]:
            self._leave(decoder, job)
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _fail_without_adapter(self, decoder: Decoder) -> None:
        """Fail the requests whose adapter was removed: a pass with one of them fails for all."""
        with self._wake:
            jobs = [job for job in (*self._running.values(), *self._waiting) if job.row.adapter]
        for name in {job.row.adapter for job in jobs}:
            try:
                self._check_adapter(name)
            except UnknownAdapterError as error:
                for job in [job for job in jobs if job.row.adapter == name]:
                    if job.row in self._running:
                        self._leave(decoder, job)
                    else:
                        with self._wake:
                            self._waiting.remove(job)
                    job.fail(error)

    def _leave(self, decoder: Decoder, job: Job) -> Job:
        """Take a job out of the batch."""
        decoder.release(job.row)
        return self._running.pop(job.row)

    def _handle(self, error: Exception, jobs: Sequence[Job]) -> None:
        """Go on after a failed pass with half of the requests, until the one that can't be answered is alone."""
        rows = list(self._running)
        involved = len({*rows, *(job.row for job in jobs)})
        self._requeue(rows)
        if isinstance(error, UnknownAdapterError):
            # It was removed since this cycle looked; the next one fails its requests.
            return
        if involved > 1:
            self.limit = max(1, involved // 2)
            if self._out_of_memory(error):
                logger.warning("Out of memory; the batch is halved to %d requests.", self.limit)
            else:
                logger.warning("A pass over %d requests failed; trying %d of them.", involved, self.limit)
            return
        logger.error("A pass over a single request failed, and the request with it.", exc_info=error)
        with self._wake:
            self._waiting = deque(job for job in self._waiting if job not in jobs)
        if not self._out_of_memory(error):
            self.limit = self._max_batch_size
        for job in jobs:
            job.fail(error)

    def _requeue(self, rows: Sequence[BatchRow]) -> None:
        """Put running rows back to the head of the queue; what they have written stays."""
        with self._wake:
            self._waiting.extendleft(self._running.pop(row) for row in reversed(rows))
        if self._decoder is not None:
            self._decoder.reset()


_alive: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _stop_all() -> None:
    # A daemon thread that comes back from a kernel after the interpreter has gone ends the process with SIGABRT.
    for scheduler in list(_alive):
        scheduler.stop()
        scheduler.wait_for_trainings()


atexit.register(_stop_all)
