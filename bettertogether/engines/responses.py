"""From answers to lm15 responses and stream events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspy._vendor.lm15.types import StreamEvent, TokenLogprob, TopLogprob
from dspy.lm15 import Message, Request, Response, StreamDeltaEvent, StreamEndEvent, StreamStartEvent, TextDelta, Usage

from .decoding import TokenScore
from .scheduler import Answer


class ResponseWriter:
    """Writes responses with the texts of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens to text, without special tokens."""
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def response(self, request: Request, answer: Answer) -> Response:
        """The response to a request."""
        scored = request.config.logprobs is not None
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(answer.text),
            finish_reason=answer.finish_reason,
            usage=_usage(answer),
            logprobs=self._scores(answer.scores) if scored else None,
            logprobs_complete=not (scored and answer.cut),
        )

    def start(self, request: Request) -> StreamEvent:
        """First event of a stream."""
        return StreamStartEvent(model=request.model)

    def delta(self, text: str, scores: Sequence[TokenScore]) -> StreamEvent:
        """Event for a piece of the text."""
        return StreamDeltaEvent(TextDelta(text, logprobs=self._scores(scores)))

    def end(self, answer: Answer) -> StreamEvent:
        """Last event of a stream."""
        return StreamEndEvent(answer.finish_reason, _usage(answer))

    def _scores(self, scores: Sequence[TokenScore]) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(
                token=self._tokenizer.decode([score.token_id]),
                logprob=score.logprob,
                token_id=score.token_id,
                top=tuple(TopLogprob(self._tokenizer.decode([i]), value, token_id=i) for i, value in score.top),
            )
            for score in scores
        )


def _usage(answer: Answer) -> Usage:
    return Usage(
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.generated_tokens,
        cache_read_tokens=answer.reused_tokens,
    )
