"""From tokens to text as they come: whole characters only, and nothing that might yet turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "�"


class TextStream:
    """The text of an answer that is still being written.

    Args:
        decode: Tokens to text.
        stop: Texts that end the answer.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._settled = 0
        """Tokens before this one are in `text`; the ones since `_context` give the next its spacing."""
        self._context = 0
        self._given = 0
        self.text = ""
        """The answer so far, up to a stop text."""
        self.stopped = False
        """Whether a stop text came."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; returns the new text that is final."""
        self._ids += token_ids
        known = self._decode(self._ids[self._context : self._settled])
        text = self._decode(self._ids[self._context :])
        new = text[len(known) :]
        # Where nothing is new (no token, or special ones alone), the next token needs the spacing as before.
        if not new or text.endswith(REPLACEMENT):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        self._append(new)
        return self._give(len(self.text) - self._held_back())

    def finish(self) -> str:
        """The rest of the text, where no more tokens come."""
        known = self._decode(self._ids[self._context : self._settled])
        self._append(self._decode(self._ids[self._context :])[len(known) :])
        self._context = self._settled = len(self._ids)
        return self._give(len(self.text))

    def _append(self, text: str) -> None:
        if self.stopped:
            return
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += text
        found = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Characters at the end with which a stop text might begin."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stop), default=0)
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0

    def _give(self, end: int) -> str:
        text = self.text[self._given : end]
        self._given = max(self._given, end)
        return text
