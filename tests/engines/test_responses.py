"""Answers as responses and as streams."""

from __future__ import annotations

from typing import Any

from dspy.lm15 import Config, Message, Request
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bettertogether.engines.answers import FinishedAnswer, TokenScore
from bettertogether.engines.responses import ResponseWriter

REQUEST = Request("local/tiny", (Message.user("Hi"),), config=Config(logprobs=1))


def llama_2s() -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as "\u2581" and drops one at the beginning of a text."""
    pieces = ["<unk>", "</s>", "\u2581Hello", "\u2581big", "\u2581", "world", "a"]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_the_texts_of_tokens_are_together_the_text() -> None:
    writer = ResponseWriter(llama_2s())
    scores = [TokenScore(token, -1.0, ((token, -1.0),)) for token in (2, 3, 4, 5)]
    answer = FinishedAnswer(writer.decode([2, 3, 4, 5]), "stop", 1, 0, 4, tuple(scores), cut=False)
    response = writer.response(REQUEST, answer)
    assert response.text == "Hello big world"
    assert [score.token for score in response.logprobs or ()] == ["Hello", " big", " ", "world"]
    assert all(score.top[0].token == score.token for score in response.logprobs or ())
    deltas = writer.deltas()
    events: list[Any] = [*deltas("Hello big", scores[:2]), *deltas(" world", scores[2:])]
    assert tuple(score for event in events for score in event.delta.logprobs) == response.logprobs
