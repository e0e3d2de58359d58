"""An answer under a grammar is brought to its end before its tokens run out."""

from __future__ import annotations

import ctypes
from typing import Protocol

from .decoder import TokenConstraint

LOOKAHEAD = 64
"""Tokens before the last one at which an answer's end comes into view."""
SLACK = 24
"""So many tokens before the last chance a token is taken only where the end stays within reach after it."""


class Closable(TokenConstraint, Protocol):
    """A grammar that knows its way to the end."""

    def closer(self) -> int | None:
        """The token that ends a text, mapping or list that is open here; None where none may."""
        ...

    def tokens_to_end(self, most: int, after: int | None = None) -> int:
        """About how many tokens end the answer soonest (after one more token), counted up to `most`."""
        ...


class ClosingConstraint:
    """A grammar with room for so many tokens. When they run out, open texts, lists and mappings are closed; what is
    still to be decided after that (a label, a number) the model decides.

    An answer that does not fit however short it is made is cut as one without a grammar is.
    """

    def __init__(self, grammar: Closable, room: int) -> None:
        self._grammar = grammar
        self._left = room
        self._next_look = LOOKAHEAD
        self._looked_at = -1
        self._near = False
        self._insists = False
        self.shortened = False
        """Whether the answer was closed where the model might have gone on."""

    def spend(self, tokens: int) -> None:
        """Tokens of the room that went elsewhere."""
        self._left -= tokens

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._grammar.ended

    def forced(self) -> list[int]:
        """Take the tokens that must come next, as far as there is no choice, and return them."""
        taken = self._grammar.forced()
        self._left -= len(taken)
        return taken

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next. Where it may not for want of room, `fill_mask` leaves but the closer."""
        closer = self._closer()
        if closer in (None, token_id) or not self._grammar.allows(token_id):
            return self._grammar.allows(token_id)
        fits = self._grammar.tokens_to_end(LOOKAHEAD, after=token_id) < self._left
        self._insists = not fits
        self.shortened |= self._insists
        return fits

    def advance(self, token_id: int) -> None:
        """Take this token."""
        self._grammar.advance(token_id)
        self._left -= 1
        self._insists = False

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Write one bit per token, 1 where it may come next, to memory at `address`."""
        closer = self._closer() if self._insists else None
        if closer is None:
            self._grammar.fill_mask(address, size_bytes)
            return
        ctypes.memset(address, 0, size_bytes)
        (ctypes.c_uint8 * size_bytes).from_address(address)[closer // 8] = 1 << closer % 8

    def _closer(self) -> int | None:
        """The token that closes what is open, where it is time."""
        if self._left <= self._next_look and self._left != self._looked_at:
            needed = self._grammar.tokens_to_end(LOOKAHEAD)
            self._near = needed <= self._left <= needed + SLACK
            self._next_look = needed + SLACK if needed <= self._left else -1
            self._looked_at = self._left
        return self._grammar.closer() if self._near and self._left <= self._next_look else None
