"""From answers to lm15 responses and stream events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    TopLogprob,
    Usage,
)

from ._upstream import StreamEvent
from .answers import FinishedAnswer, TokenScore
from .thinking import ThoughtSplitter, split_thoughts


class ResponseWriter:
    """Writes responses with the texts of one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        thinks: Whether answers begin with thoughts, which go into a part of their own (DSPy's `reasoning_content`).
    """

    def __init__(self, tokenizer: Any, *, thinks: bool = False) -> None:
        self._tokenizer = tokenizer
        self._thinks = thinks
        self._lead: list[int] = tokenizer("a", add_special_tokens=False).input_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens to text, without special tokens."""
        return self._text(token_ids, skip_special_tokens=True)

    def _text(self, token_ids: Sequence[int], **options: bool) -> str:
        return str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False, **options))

    def response(self, request: Request, answer: FinishedAnswer) -> Response:
        """The response to a request."""
        scored = request.config.logprobs is not None
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(self._parts(answer.text)),
            finish_reason=answer.finish_reason,
            usage=_usage(answer),
            logprobs=self._scores(answer.scores) if scored else None,
            logprobs_complete=not (scored and answer.cut),
            provider_data=None if answer.sampled is None else asdict(answer.sampled),
        )

    def _parts(self, text: str) -> Any:
        thoughts, answer = split_thoughts(text) if self._thinks else ("", text)
        return [ThinkingPart(thoughts), TextPart(answer)] if thoughts else answer

    def start(self, request: Request) -> StreamEvent:
        """First event of a stream."""
        return StreamStartEvent(model=request.model)

    def deltas(self) -> Deltas:
        """The events of one stream's text."""
        return ThoughtfulDeltas(self._scores) if self._thinks else Deltas(self._scores)

    def end(self, answer: FinishedAnswer) -> StreamEvent:
        """Last event of a stream."""
        return StreamEndEvent(answer.finish_reason, _usage(answer))

    def _scores(self, scores: Sequence[TokenScore], start: int = 0) -> tuple[TokenLogprob, ...]:
        """The scores of the tokens of an answer from the `start`th on."""
        # Where nothing stands before it, decoders drop a token's leading space, as they do that of the whole text.
        leads = [self._lead if place else [] for place in range(start, start + len(scores))]
        return tuple(
            TokenLogprob(
                token=self._token_text(score.token_id, lead),
                logprob=score.logprob,
                token_id=score.token_id,
                top=tuple(TopLogprob(self._token_text(i, lead), value, token_id=i) for i, value in score.top),
            )
            for score, lead in zip(scores, leads, strict=True)
        )

    def _token_text(self, token_id: int, lead: list[int]) -> str:
        return self._text([*lead, token_id])[len(self._text(lead)) :]


WriteScores = Callable[[Sequence[TokenScore], int], tuple[TokenLogprob, ...]]


class Deltas:
    """The events of an answer, for each piece of its text as it comes."""

    def __init__(self, write_scores: WriteScores) -> None:
        self._write_scores = write_scores
        self._scored = 0

    def __call__(self, text: str, scores: Sequence[TokenScore]) -> Iterator[StreamEvent]:
        yield self._delta(text, scores)

    def _delta(self, text: str, scores: Sequence[TokenScore], part: int = 0) -> StreamEvent:
        logprobs = self._write_scores(scores, self._scored)
        self._scored += len(scores)
        return StreamDeltaEvent(TextDelta(text, part_index=part, logprobs=logprobs))

    def finish(self) -> Iterator[StreamEvent]:
        """The events that were held back, where the text ends."""
        yield from ()


class ThoughtfulDeltas(Deltas):
    """The events of an answer that begins with thoughts: those are part 0, and the answer is part 1. Events of thoughts
    have no place for scores: these come with the text after them, at the latest with an empty one at the end."""

    def __init__(self, write_scores: WriteScores) -> None:
        super().__init__(write_scores)
        self._splitter = ThoughtSplitter()
        self._thought = False
        self._held: list[TokenScore] = []

    def __call__(self, text: str, scores: Sequence[TokenScore]) -> Iterator[StreamEvent]:
        thoughts, answer = self._splitter.push(text)
        self._held += scores
        yield from self._thoughts(thoughts)
        if answer:
            yield self._answer(answer)

    def finish(self) -> Iterator[StreamEvent]:
        """The beginning of an end of thinking that didn't come, and the scores that no text came after."""
        yield from self._thoughts(self._splitter.finish())
        if self._held:
            yield self._answer("")

    def _thoughts(self, thoughts: str) -> Iterator[StreamEvent]:
        if thoughts:
            self._thought = True
            yield StreamDeltaEvent(ThinkingDelta(thoughts))

    def _answer(self, text: str) -> StreamEvent:
        scores, self._held = self._held, []
        return self._delta(text, scores, int(self._thought))


def _usage(answer: FinishedAnswer) -> Usage:
    return Usage(
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.generated_tokens,
        cache_read_tokens=answer.reused_tokens,
    )
