"""vLLM's HTTP API for completions: what is sent, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
from dspy.lm15 import AuthError, InvalidRequestError, RateLimitError, Request, ServerError

from ...errors import ModelError
from ..answers import FinishedAnswer, SampledAnswer, SamplingOptions, TokenScore

NEUTRAL = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0,
    "skip_special_tokens": True,
}  # fmt: skip
"""A server fills fields that are not sent from the model's generation_config.json."""
GONE = (502, 503, 504)
"""What a server, or the gateway before it, answers when there is nobody to answer."""


def sampling_fields(sampling: SamplingOptions) -> dict[str, Any]:
    """The sampling options of a request, as fields of its body."""
    fields: dict[str, Any] = {**NEUTRAL, "stop": list(sampling.stop), "seed": sampling.seed}
    if sampling.logprobs is not None:
        fields |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.store:
        fields["return_token_ids"] = True
    if sampling.greedy:
        return fields | {"temperature": 0.0}
    return fields | {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}


def scores_of(choice: Mapping[str, Any]) -> list[TokenScore]:
    """Scores from vLLM's log probabilities, where tokens are written as "token_id:17"."""
    found = choice.get("logprobs")
    if not found:
        return []
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    scores = []
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True):
        likeliest = sorted(((_token_id(key), value) for key, value in (top or {}).items()), key=lambda pair: -pair[1])
        scores.append(TokenScore(_token_id(token), logprob, tuple(likeliest)))
    return scores


class Piece(NamedTuple):
    """A part of a streamed answer."""

    text: str
    scores: list[TokenScore]


def answer_of(reply: httpx.Response) -> tuple[FinishedAnswer, Mapping[str, Any]]:
    """The answer in a reply, and what vLLM says of it. Raises ServerError for one that was broken off, or is none."""
    with understood(reply, reply.text):
        content = reply.json()
        choice = content["choices"][0]
        return _finished_of(reply, choice, content["usage"]), choice


def pieces_of(reply: httpx.Response) -> Iterator[Piece | FinishedAnswer]:
    """The parts of a stream of server-sent events, and at the end what `answer_of` gives. Raises ServerError."""
    last: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    for line in reply.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        with understood(reply, data):
            chunk = json.loads(data)
            if "error" in chunk:
                raise ServerError(f"vLLM broke an answer off: {chunk['error']} ({reply.url})")
            pieces = [Piece(choice["text"], scores_of(choice)) for choice in chunk["choices"]]
            last = next((choice for choice in chunk["choices"] if choice["finish_reason"]), last)
            usage = chunk.get("usage") or usage
        yield from (piece for piece in pieces if piece.text or piece.scores)
    with understood(reply, f"usage={usage}"):
        yield _finished_of(reply, last, usage)


def _finished_of(reply: httpx.Response, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> FinishedAnswer:
    if choice.get("finish_reason") not in ("stop", "length"):
        raise ServerError(f"vLLM broke an answer off: finish_reason={choice.get('finish_reason')!r} ({reply.url}).")
    details = usage.get("prompt_tokens_details") or {}
    return FinishedAnswer(
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        reused_tokens=details.get("cached_tokens") or 0,
        generated_tokens=usage["completion_tokens"],
        scores=tuple(scores_of(choice)),
        cut=isinstance(choice.get("stop_reason"), str),
    )


@contextmanager
def understood(reply: httpx.Response, text: str) -> Iterator[None]:
    """Read what a server said inside the block. Raises ServerError where it is not what vLLM says, as of a gateway that
    answers 200 with a page of its own; `text` is for the message."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(
            f"{reply.url} answered {reply.status_code} with what is not vLLM's: {text:.200} ({error!r}). See what "
            "answers there: a gateway, or another server."
        ) from error


def sampled_of(choice: Mapping[str, Any], request: Request, prompt_ids: list[int]) -> SampledAnswer:
    """An answer in tokens. Raises ModelError where the server gave none."""
    token_ids = choice.get("token_ids")
    if token_ids is None:
        raise ModelError(
            "The vLLM server gave no token ids, without which a policy can't be trained: use vLLM 0.32 or later, or "
            "local_lm(...)."
        )
    return SampledAnswer(
        prompt_token_ids=prompt_ids,
        token_ids=token_ids,
        # It samples each token, also where the grammar leaves one alone.
        forced=[False] * len(token_ids),
        response_format=request.config.response_format,
        temperature=request.config.temperature or 0.0,
    )


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def check(reply: httpx.Response, server: str) -> None:
    """Raise what an answer with an error status stands for; `server` is the address of who gave it."""
    status = reply.status_code
    if status < 400:
        return
    reply.read()
    message = f"vLLM answered {status}: {reply.text:.500} (the server at {server})"
    if status in (401, 403):
        raise AuthError(f"{message}. A server with a key wants api_key=, or VLLM_API_KEY in the environment.")
    pause = reply.headers.get("retry-after", "")
    after = float(pause) if pause.isdecimal() else None
    if status == 429:
        raise RateLimitError(message, status=status, retry_after=after)
    if status < 500:
        raise InvalidRequestError(message, status=status)
    raise ServerError(message, status=status, retry_after=after)
