"""A request on its way through the engine, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..answers import FinishedAnswer, FinishReason, SampledAnswer, TokenScore
from .decoder import BatchRow
from .text_stream import TextStream

TokenSink = Callable[[str, Sequence[TokenScore]], Any]
"""Is told of the text of one answer as it comes, on the worker thread. What it raises fails this answer alone."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    row: BatchRow
    stream: TextStream
    response_format: Any = None
    """Of the request."""
    sink: TokenSink | None = None
    future: Future[FinishedAnswer] = field(default_factory=Future)

    @property
    def reads_text(self) -> bool:
        """Whether the text must be known at each step."""
        return self.sink is not None or bool(self.row.sampling.stop)

    def finish(self, reason: FinishReason) -> None:
        """Give it its answer."""
        row = self.row
        try:
            if not self.reads_text:
                self.stream.push(row.output_ids)
            rest = self.stream.finish()
            if self.sink is not None and rest:
                self.sink(rest, ())
        except Exception as error:
            self.fail(error)
            return
        answer = FinishedAnswer(
            text=self.stream.text,
            finish_reason="stop" if self.stream.stopped else reason,
            prompt_tokens=len(row.prompt_ids),
            reused_tokens=row.reused_tokens,
            generated_tokens=len(row.output_ids),
            scores=tuple(row.scores),
            cut=self.stream.stopped,
            sampled=self._sampled() if row.sampling.store else None,
        )
        if self._is_awaited():
            self.future.set_result(answer)

    def _sampled(self) -> SampledAnswer:
        row = self.row
        return SampledAnswer(
            prompt_token_ids=row.prompt_ids,
            token_ids=[*row.output_ids, *row.end_ids],
            forced=row.forced,
            response_format=self.response_format,
            temperature=row.sampling.temperature,
        )

    def fail(self, error: BaseException) -> None:
        """Give it an error."""
        if self._is_awaited():
            self.future.set_exception(error)

    def _is_awaited(self) -> bool:
        """Whether its future still wants an outcome."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()
