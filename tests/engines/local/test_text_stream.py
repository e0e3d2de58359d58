"""Text that comes token by token is given in whole characters and ends before a stop text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from small_models import byte_tokenizer

from bettertogether.engines.local.text_stream import TextStream

TOKENIZER = byte_tokenizer()


def decode(token_ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(token_ids), skip_special_tokens=True))


def pieces(text: str, stop: Sequence[str] = (), at_once: int = 1) -> tuple[list[str], TextStream]:
    token_ids = TOKENIZER(text, add_special_tokens=False).input_ids
    stream = TextStream(decode, stop)
    given = [stream.push(token_ids[place : place + at_once]) for place in range(0, len(token_ids), at_once)]
    return [*given, stream.finish()], stream


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("text", ["plain", "grüße, 世界", "🙂🙃 mixed ✓", ""])
def test_the_pieces_add_up_to_the_text(text: str, at_once: int) -> None:
    given, stream = pieces(text, at_once=at_once)
    assert "".join(given) == stream.text == text


def test_a_space_that_only_the_token_before_it_shows_stays_where_nothing_or_a_special_token_comes_between() -> None:
    """As with the tokenizers of Llama 2, Mistral and Phi-3, whose decoder strips the space of a first word."""
    words = {1: " Hello", 2: " big", 3: " world", 4: ""}
    stream = TextStream(lambda ids: "".join(words[token_id] for token_id in ids).removeprefix(" "))
    assert [stream.push(ids) for ids in ([1], [2], [], [3], [4], [2])] == ["Hello", " big", "", " world", "", " big"]


def test_no_piece_holds_half_a_character() -> None:
    given, _ = pieces("世界")
    assert given == ["", "", "世", "", "", "界", ""]


def test_text_ends_before_the_stop_text() -> None:
    given, stream = pieces("one END two", ["END"])
    assert (stream.text, stream.stopped) == ("one ", True)
    assert "".join(given) == "one "


def test_the_first_of_several_stop_texts_counts() -> None:
    assert pieces("a;b|c", ["|", ";"])[1].text == "a"


def test_what_may_begin_a_stop_text_waits() -> None:
    given, stream = pieces("a EN b", ["END"])
    assert given == ["a", " ", "", "", "EN ", "b", ""]
    assert not stream.stopped


def test_a_stop_text_that_never_comes_is_given_at_the_end() -> None:
    given, stream = pieces("a EN", ["END"])
    assert given[-1] == "EN"
    assert stream.text == "a EN"


def test_a_stop_text_inside_one_push_is_found() -> None:
    assert pieces("one END two", ["END"], at_once=100)[1].text == "one "


def test_bytes_that_are_no_text_come_out_at_the_end() -> None:
    stream = TextStream(decode)
    token_ids = TOKENIZER("世", add_special_tokens=False).input_ids
    assert stream.push(token_ids[:2]) == ""
    assert stream.finish() == "�"
