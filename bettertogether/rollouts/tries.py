"""How hard to try for a passing trace of each example.

RFT, arXiv 2308.01825 (several samples); STaR, arXiv 2203.14465 (rescue).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..checks import is_number, require, require_switch, require_whole, with_plain_numbers

MOST_TRIES = 8
"""Tries of an example that failed, where hardly any was solved. A student that solves 5% would solve a third so."""

TEMPERATURES = (0.3, 0.6, 1.0)
"""Of those tries, in turn. What a small model gets right at once is near its likeliest answer: at 1.0 it hardly solves
anything that it did not solve already, and guesses what it can guess."""


@dataclass(frozen=True)
class Sampling:
    """How hard to try for a passing trace of each example."""

    num_samples: int = 4
    """More tries for an example that failed, each with its own seed."""
    temperature: float | Sequence[float] = TEMPERATURES
    """Temperature of those tries; several values are used in turn."""
    rescue: bool = True
    """For examples that still fail: once more with the label as a hint, which no training row shows."""
    sample_passing: bool = False
    """Take the `num_samples` tries and `branches` for examples that passed as well (RFT), for more distinct traces."""
    branches: int = 0
    """New answers to each call of a run that failed, the others as they were: for programs of several calls."""
    enough: int = 0
    """Where fewer examples than this are solved after all that, tries go on, up to `MOST_TRIES`; 0: they never do."""

    def __post_init__(self) -> None:
        require_whole("num_samples", self.num_samples, 0, meaning="a whole number, 0 for none")
        require_whole("branches", self.branches, 0, meaning="a whole number, 0 for none")
        require_whole("enough", self.enough, 0)
        if isinstance(self.temperature, Sequence) and not isinstance(self.temperature, str):
            object.__setattr__(self, "temperature", tuple(self.temperature))
        with_plain_numbers(self)
        temperatures = self.temperatures
        warm = bool(temperatures) and all(is_number(value) and 0 < value <= 2 for value in temperatures)
        require(warm, "temperature", self.temperature, "numbers above 0, at most 2")
        require_switch("rescue", self.rescue)
        require_switch("sample_passing", self.sample_passing)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The schedule."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    def temperature_of(self, number: int) -> float:
        """Temperature of the try with this number, from 1."""
        return self.temperatures[(number - 1) % len(self.temperatures)]

    def carry_out(self, tries: Tries) -> None:
        """A first run each, then more tries for those that failed: so many samples, new answers to single calls, a
        hint, and where hardly any example is solved then, more samples."""
        tries.first()
        for number in range(1, self.num_samples + 1):
            tries.sample(number, self.temperature_of(number), everyone=self.sample_passing)
        if self.branches:
            temperatures = [self.temperature_of(number) for number in range(1, self.branches + 1)]
            tries.branch(temperatures, everyone=self.sample_passing)
        if self.rescue:
            tries.rescue()
        if self.num_samples:
            for number in range(self.num_samples + 1, MOST_TRIES + 1):
                if tries.solved >= self.enough:
                    break
                tries.sample(number, self.temperature_of(number))


class Tries(Protocol):
    """Examples and what their tries came to, or are expected to come to."""

    @property
    def solved(self) -> float:
        """How many examples are solved by now."""

    def first(self) -> None:
        """Run each example."""

    def sample(self, number: int, temperature: float, *, everyone: bool = False) -> None:
        """Try the unsolved examples, or all of them, with another seed."""

    def branch(self, temperatures: Sequence[float], *, everyone: bool = False) -> None:
        """Answer single calls of the first runs of the unsolved examples, or of all, anew at these temperatures."""

    def rescue(self) -> None:
        """Try the unsolved examples with the label as a hint."""
