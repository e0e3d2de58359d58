"""The seam between the scheduler, which knows requests, and the decoders, which know tensors. No torch here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..answers import SamplingOptions, TokenScore


class TokenConstraint(Protocol):
    """A grammar that an answer must follow."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...

    def forced(self) -> list[int]:
        """Take the tokens that must come next, as far as there is no choice, and return them."""
        ...

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next."""
        ...

    def advance(self, token_id: int) -> None:
        """Take this token."""
        ...

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Write one bit per token, 1 where it may come next, to memory at `address`."""
        ...


@dataclass(eq=False)
class BatchRow:
    """One answer being written."""

    prompt_ids: list[int]
    max_new_tokens: int
    adapter: str = ""
    """Model name of the adapter; "" is the base."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    constraint: TokenConstraint | None = None
    output_ids: list[int] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    """The token that ended the answer and is no part of it."""
    forced: list[bool] = field(default_factory=list)
    """For each token of these, whether the model had no say in it."""
    scores: list[TokenScore] = field(default_factory=list)
    computed: int = 0
    """Tokens of prompt and output whose keys and values the decoder holds."""
    reused_tokens: int = 0
    """Prompt tokens that were found computed."""
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def pending(self) -> int:
        """Tokens still to be put through the model before the next one can be picked."""
        return self.length - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and output, [start, stop)."""
        edge = len(self.prompt_ids)
        if start >= edge:
            return self.output_ids[start - edge : stop - edge]
        return (self.prompt_ids[start:stop] + self.output_ids)[: stop - start]


@dataclass(frozen=True)
class Decision:
    """What one step decided for one row."""

    token_ids: tuple[int, ...] = ()
    """New tokens: one that was picked, and those that the grammar forces after it. Empty: still in the prompt."""
    scores: tuple[TokenScore, ...] = ()
    ended: bool = False
    """The grammar allows nothing more."""
    postponed: bool = False
    """Memory does not suffice for the row now; it has to be released, and admitted again."""
    picked: bool = True
    """Whether the model chose the first token."""
    error: Exception | None = None
    """Why nothing could be decided; the row is then over."""


class Decoder(Protocol):
    """Runs the model over the tokens of rows. Called from one thread."""

    def admit(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Make room for rows; returns those that were taken. With no row held, takes one at least."""
        ...

    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        """One forward pass over rows that were admitted; sets their `computed`."""
        ...

    def release(self, row: BatchRow) -> None:
        """Forget a row. Its `computed` falls to 0, so that it can be admitted again."""
        ...

    def reset(self) -> None:
        """Forget all rows and everything cached."""
        ...

    def counters(self) -> dict[str, int]:
        """Work done: forward_passes, prefix_tokens_reused, ..."""
        ...
