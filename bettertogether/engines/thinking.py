"""How reasoning models write their thoughts, and how these are told from the answer that comes after."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
AFTER = "\n\n"
"""Between the end of thinking and the answer, as the templates of Qwen3 and DeepSeek-R1 write it."""
EMPTY = f"\n{CLOSE}{AFTER}"
"""What follows an opened block of thinking in which nothing is thought."""


def with_thoughts(thoughts: str, answer: str) -> str:
    """What a reasoning model writes for these thoughts and this answer, after a prompt that opens the thinking."""
    return f"{thoughts}{EMPTY}{answer}"


def split_thoughts(text: str) -> tuple[str, str]:
    """The thoughts and the answer in what a reasoning model wrote. Without an end of thinking all of it is thought."""
    thoughts, _, answer = text.partition(CLOSE)
    return thoughts.strip("\n"), answer.removeprefix(AFTER)


class ThoughtSplitter:
    """`split_thoughts` for text that comes in pieces: what is held back may be the beginning of the end."""

    def __init__(self) -> None:
        self._held = ""
        self._thinking = True
        self._missing = AFTER

    def push(self, text: str) -> tuple[str, str]:
        """The thoughts and the part of the answer that this piece brings."""
        if not self._thinking:
            return "", self._answer(text)
        self._held += text
        thoughts, end, answer = self._held.partition(CLOSE)
        if end:
            self._held, self._thinking = "", False
            return thoughts, self._answer(answer)
        size = next((n for n in range(len(CLOSE) - 1, 0, -1) if self._held.endswith(CLOSE[:n])), 0)
        cut = len(self._held) - size
        thoughts, self._held = self._held[:cut], self._held[cut:]
        return thoughts, ""

    def finish(self) -> str:
        """The thoughts that are held back where the text ends."""
        held, self._held = self._held, ""
        return held

    def _answer(self, text: str) -> str:
        while self._missing and text.startswith(self._missing[0]):
            text, self._missing = text[1:], self._missing[1:]
        if text:
            self._missing = ""
        return text
