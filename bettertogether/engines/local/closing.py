"""An answer under a grammar is brought to its end before its tokens run out."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..structured import GrammarConstraint

LOOKAHEAD = 512
"""Tokens before the last one at which an answer's end comes into view."""
SLACK = 24
"""So many tokens before the last chance a token is taken only where the end stays within reach after it."""


class ClosingConstraint:
    """A grammar with room for so many tokens. When they run out, open texts, lists and mappings are closed; what is
    still to be decided after that (a label, a number) the model decides.

    An answer that does not fit however short it is made is cut as one without a grammar is.
    """

    def __init__(self, grammar: GrammarConstraint, room: int) -> None:
        self._grammar = grammar
        self._left = room
        self._next_look = LOOKAHEAD
        """With no more room left than this, a look at the end comes before the next token."""
        self._hopeless = False
        self._closer: int | None = None
        """The token that must come next for want of room."""
        self.shortened = False
        """Whether the answer was closed where the model might have gone on."""

    @property
    def closing(self) -> bool:
        """Whether the next token is given, for want of room."""
        return self._closer is not None

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
        if any(map(self._grammar.opens, taken)):
            self._next_look = LOOKAHEAD
        return taken

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next. Where it may not for want of room, `fill_mask` leaves but the closer."""
        if not self._grammar.allows(token_id):
            return False
        if not self._is_time(token_id):
            return True
        needed = self._grammar.tokens_to_end(LOOKAHEAD, after=token_id)
        if needed < self._left:
            self._next_look = needed + SLACK
            return True
        closer = self._grammar.closer(instead_of=token_id)
        if closer in (None, token_id):
            return True
        if self._grammar.tokens_to_end(LOOKAHEAD) > self._left:
            self._hopeless = True
            return True
        self._closer, self.shortened = closer, True
        return False

    def _is_time(self, token_id: int) -> bool:
        """Whether to look if the end is within reach after this token."""
        if self._hopeless or self._left > LOOKAHEAD:
            return False
        return self._left <= self._next_look or self._grammar.opens(token_id)

    def advance(self, token_id: int) -> None:
        """Take this token."""
        self._grammar.advance(token_id)
        self._left -= 1
        self._closer = None

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Write one bit per token, 1 where it may come next, to memory at `address`."""
        if self._closer is None:
            self._grammar.fill_mask(address, size_bytes)
            return
        ctypes.memset(address, 0, size_bytes)
        (ctypes.c_uint8 * size_bytes).from_address(address)[self._closer // 8] = 1 << self._closer % 8
