"""Find the prefixes that prompts share, and keep what was computed for them. No torch here.

The prompts of one DSPy predictor share its instructions and demos, most of their tokens. `shared_clusters` finds such
groups in a set of prompts; `PrefixCache` holds what was computed for prefixes, least recently used out first, and
keeps the account of all memory for keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .packed_attention import PrefixTensors

Tokens = NDArray[np.int64]

LEAST_GAIN = 64
"""Tokens that a prefix of its own must save; below it, a shorter prefix serves as well."""
SLACK = 16
"""Prompts whose common prefixes differ by less are one group."""


def common_length(a: Tokens, b: Tokens) -> int:
    """Number of tokens at the head of both."""
    size = min(a.size, b.size)
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


@dataclass(frozen=True)
class Cluster:
    """Prompts that share a prefix."""

    length: int
    """Tokens of the prefix; every member is longer by one token at least."""
    members: tuple[int, ...]
    """Positions of the prompts."""


def shared_clusters(prompts: Sequence[Tokens]) -> list[Cluster]:
    """Partition of prompts by the prefix that is worth sharing, longest prefix first.

    Sorted, the prompts form a tree by their common prefixes. A branch becomes a cluster of its own where that saves
    `LEAST_GAIN` tokens more than staying with its siblings.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda position: prompts[position].astype(">u4").tobytes())
    limit = [prompts[position].size - 1 for position in order]
    common = [
        min(common_length(prompts[order[i]], prompts[order[i + 1]]), limit[i], limit[i + 1])
        for i in range(len(order) - 1)
    ]
    clusters: list[Cluster] = []
    branches = [(0, len(order))]
    while branches:
        first, last = branches.pop()
        least = min(common[first : last - 1], default=0)
        cuts = [i + 1 for i in range(first, last - 1) if common[i] <= least + SLACK]
        alone: list[int] = []
        for start, stop in zip([first, *cuts], [*cuts, last], strict=True):
            gain = (stop - start - 1) * (min(common[start : stop - 1], default=least) - least)
            if gain >= LEAST_GAIN:
                branches.append((start, stop))
            else:
                alone += order[start:stop]
        if alone:
            clusters.append(Cluster(least if last - first > 1 else 0, tuple(sorted(alone))))
    return sorted(clusters, key=lambda cluster: -cluster.length)


@dataclass(eq=False)
class Prefix:
    """A prefix that is computed, or will be."""

    adapter: str
    tokens: Tokens
    size_bytes: int
    data: PrefixTensors
    parent: Prefix | None = None
    """Holds the first tokens of this one, too."""
    computed: int = 0
    """Tokens whose keys and values are there."""
    near: Prefix | None = None
    """While this one is computed: the prefix that its first tokens come from."""
    users: int = 0
    """Rows that attend to it now, and prefixes that it is the parent of; it stays while there are any."""


class PrefixCache:
    """Computed prefixes within a bound of bytes, beside what else counts towards it."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        """Promised to rows, for tokens that are in no prefix."""
        self._prefixes: list[Prefix] = []
        """Least recently used first."""

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(prefix.size_bytes for prefix in self._prefixes)

    def best(self, adapter: str, tokens: Tokens) -> tuple[Prefix | None, int]:
        """The prefix that has most tokens in common with the head of `tokens`, and how many."""
        best, length = None, 0
        for prefix in self._prefixes:
            if prefix.adapter == adapter:
                common = common_length(prefix.tokens, tokens)
                if common > length:
                    best, length = prefix, common
        return best, length

    def make_room(self, size_bytes: int) -> bool:
        """Drop unused prefixes until `size_bytes` more fit; says whether they do."""
        excess = self.size_bytes + self.reserved_bytes + size_bytes - self.limit_bytes
        unused = self._unused()
        if sum(prefix.size_bytes for prefix in unused) < excess:
            return False
        for prefix in unused:
            if excess <= 0:
                break
            self.drop(prefix)
            excess -= prefix.size_bytes
        return True

    def _unused(self) -> list[Prefix]:
        """Prefixes that can be dropped, in the order in which that may be done: parents after those they serve."""
        unused = [prefix for prefix in self._prefixes if not prefix.users]
        children = Counter(prefix.parent for prefix in unused if prefix.parent)
        return unused + [prefix for prefix in self._prefixes if prefix.users and prefix.users == children[prefix]]

    def add(self, prefix: Prefix) -> None:
        """Hold a prefix; `make_room` first."""
        if prefix.parent is not None:
            prefix.parent.users += 1
        self._prefixes.append(prefix)

    def drop(self, prefix: Prefix) -> None:
        """Hold a prefix no longer that nothing uses."""
        self._prefixes.remove(prefix)
        if prefix.parent is not None:
            prefix.parent.users -= 1

    def use(self, prefix: Prefix) -> None:
        """One more row attends to a prefix, which makes it the most recently used."""
        prefix.users += 1
        if prefix in self._prefixes:
            self._prefixes.remove(prefix)
            self._prefixes.append(prefix)

    def unuse(self, prefix: Prefix) -> None:
        """One row less attends to a prefix."""
        prefix.users -= 1

    def clear(self) -> None:
        """Forget every prefix, and what was promised."""
        self._prefixes.clear()
        self.reserved_bytes = 0
