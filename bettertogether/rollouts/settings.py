"""What every pass over examples has in common within a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import dspy

from ..checks import require, require_pass_options, with_plain_numbers
from .rollout import RolloutStore


@dataclass(frozen=True)
class RunSettings:
    """How programs are run over examples; checked when it is made, with ConfigError."""

    num_threads: int | None = None
    """Examples at once; None: what the local engine likes to have in flight."""
    max_errors: int | None = None
    """Examples that may raise before the pass does; None: `dspy.settings.max_errors`."""
    seed: int | None = None
    """Of sampled answers; None: that of the step, or 0."""
    store: RolloutStore | None = None
    """Rollouts made before, and to come."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        require_pass_options(self.num_threads, self.max_errors, self.seed)
        is_store = isinstance(self.store, RolloutStore | None)
        require(is_store, "store", self.store, "a bettertogether.rollouts.rollout.RolloutStore, or None")

    @property
    def most_errors(self) -> int | None:
        """Examples that may raise before the pass does; None: any number."""
        limit: int | None = dspy.settings.max_errors if self.max_errors is None else self.max_errors
        return limit

    def or_else(self, *, num_threads: int | None, max_errors: int | None, seed: int | None) -> RunSettings:
        """These settings, with the given ones where these are None."""
        return replace(
            self,
            num_threads=num_threads if self.num_threads is None else self.num_threads,
            max_errors=max_errors if self.max_errors is None else self.max_errors,
            seed=seed if self.seed is None else self.seed,
        )
