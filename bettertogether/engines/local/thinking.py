"""Reasoning models think freely first, and answer, under the grammar where there is one, after that."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence

from ..thinking import AFTER, CLOSE, EMPTY
from .decoder import TokenConstraint

WINDOW = 16
"""Tokens in which the end of thinking is looked for; it is one in most vocabularies."""


class ThinkingConstraint:
    """Anything until the end of thinking, which comes by itself or at the bound; then what `answer` allows.

    Args:
        answer: The grammar of what comes after; None allows anything there too.
        most: Tokens of thinking, at most; then the end of thinking is written for the model.
        encode: Text to tokens, where something stands before it.
        decode: Tokens to text, special tokens included.
        eos_ids: Tokens that end an answer, which thinking can't.
        spend: Is told how many tokens of the answer's room the thoughts took.
    """

    def __init__(
        self,
        answer: TokenConstraint | None,
        *,
        most: int,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        eos_ids: Collection[int],
        spend: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._answer = answer
        self._most = most
        self._encode, self._decode, self._eos_ids, self._spend = encode, decode, eos_ids, spend
        self._thoughts: list[int] = []
        self._next: list[int] = []
        """Tokens that must come next: the end of thinking, or what is missing of it."""
        self._thinking = True

    @property
    def shortened(self) -> bool:
        """Whether the answer was closed where the model might have gone on."""
        return bool(getattr(self._answer, "shortened", False))

    @property
    def closing(self) -> bool:
        """Whether the next token is given, for want of room."""
        return bool(getattr(self._answer, "closing", False))

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return not self._thinking and not self._next and self._answer is not None and self._answer.ended

    def forced(self) -> list[int]:
        """Take the tokens that must come next, as far as there is no choice, and return them."""
        taken, self._next = self._next, []
        return taken if self._thinking or self._answer is None else [*taken, *self._answer.forced()]

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next."""
        if self._next:
            return token_id == self._next[0]
        if self._thinking:
            return token_id not in self._eos_ids
        return self._answer is None or self._answer.allows(token_id)

    def advance(self, token_id: int) -> None:
        """Take this token."""
        if self._next:
            self._next.pop(0)
        elif self._thinking:
            self._think(token_id)
        elif self._answer is not None:
            self._answer.advance(token_id)

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Write one bit per token, 1 where it may come next, to memory at `address`."""
        if not self._next and not self._thinking and self._answer is not None:
            self._answer.fill_mask(address, size_bytes)
            return
        ctypes.memset(address, 0 if self._next else 0xFF, size_bytes)
        bits = (ctypes.c_uint8 * size_bytes).from_address(address)
        if self._next:
            bits[self._next[0] // 8] |= 1 << self._next[0] % 8
        elif self._thinking:
            for token_id in self._eos_ids:
                bits[token_id // 8] &= ~(1 << token_id % 8) & 0xFF

    def _think(self, token_id: int) -> None:
        self._thoughts.append(token_id)
        _, end, after = self._decode(self._thoughts[-WINDOW:]).partition(CLOSE)
        if end:
            missing = AFTER.removeprefix(after)
            self._begin(self._encode(missing) if missing else [])
        elif len(self._thoughts) >= self._most:
            self._begin(self._encode(EMPTY))

    def _begin(self, before: list[int]) -> None:
        self._thinking, self._next = False, before
        self._spend(len(self._thoughts) + len(before))
