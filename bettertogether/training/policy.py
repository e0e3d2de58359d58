"""Learn from rewards: the policy gradient of sampled answers. What their prompts share is computed once.

GRPO (arXiv 2402.03300) as Dr. GRPO corrects it (arXiv 2503.20783), for programs of several modules (mmGRPO, arXiv
2508.04660). The loss of an update over the answers o of a step, with advantages A, is

    - 1/F * sum over o and over its free tokens t of min(r A, clip(r, 1 - e, 1 + e) A) - b (x - log x - 1)

with r = p(t) / p_before(t), 1 in the first update of a step, and x = p_reference(t) / p(t). F is the number of free
tokens of all the step's answers: one divisor for all, so that no token counts less for standing in a long answer, which
is what Dr. GRPO mends; its own divisor, a constant, differs by a factor that AdamW takes out again. Free are the tokens
that the model chose; what the grammar forced has no part. p is the distribution that the tokens were chosen from: at
their temperature, among those that the grammar allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import NoTrainingDataError, TrainingError
from . import checkpoint
from .averaging import in_place
from .checkpoint import TrainingState
from .config import PolicyConfig
from .fused import completion_losses
from .loss import RowLoss
from .packing import MicroBatch, TokenizedRow
from .progress import PolicyUpdate
from .sharing import all_whole
from .stepper import Stepper
from .token_masks import any_token, on_device
from .trainer import learning_rate

Masks = Sequence[NDArray[np.uint32] | None]
"""Of each token of an answer, which tokens there were to choose from, one bit each [W]; None: all of them."""


@dataclass(frozen=True)
class PolicyRow(TokenizedRow):
    """An answer as it was sampled, and how much better it was than others. What is `forced` was no choice."""

    advantage: float = 0.0
    """Its reward minus the mean of its group."""
    temperature: float = 1.0
    """At which it was sampled."""
    masks: Callable[[], Masks] | None = field(default=None, compare=False, repr=False)
    """Asked in each forward pass, since masks are as wide as the vocabulary; None: all tokens, everywhere."""


def choice_logprobs(loss: RowLoss, batch: MicroBatch) -> Tensor:
    """Log-probabilities [F] of the free tokens of a micro-batch's sampled answers, one row after the other: at the
    temperature, and among the tokens, that they were chosen at and from. The output layer runs on these alone."""
    rows = cast(Sequence[PolicyRow], batch.rows)
    places = [place for place, free in enumerate(free for row in rows for free in row.free) if free]
    logits_F_V = loss.logits(batch, places)
    tokens = [token for row in rows for token, free in zip(row.completion_ids, row.free, strict=True) if free]
    tokens_F = torch.tensor(tokens, device=logits_F_V.device)
    exact = torch.promote_types(logits_F_V.dtype, torch.float32)
    temperature_F = _of_tokens(rows, [row.temperature for row in rows]).to(logits_F_V.device, exact)
    return -completion_losses(logits_F_V, tokens_F, temperature_F, _bits(rows, logits_F_V))


def choice_losses(
    rows: Sequence[PolicyRow],
    logprobs_F: Tensor,
    before_F: Tensor,
    reference_F: Tensor | None,
    config: PolicyConfig,
) -> tuple[Tensor, Tensor]:
    """The loss [F] of each free token, given its log-probability now, before the step's first update, and under the
    reference; and the divergence from the reference that is in it, 0 without one."""
    advantage_F = _of_tokens(rows, [row.advantage for row in rows]).to(logprobs_F)
    ratio_F = (logprobs_F - before_F).exp()
    limited_F = ratio_F.clamp(1 - config.clip, 1 + config.clip)
    losses_F = -torch.minimum(ratio_F * advantage_F, limited_F * advantage_F)
    if reference_F is None:
        return losses_F, torch.zeros_like(losses_F)
    log_x_F = reference_F - logprobs_F
    kl_F = log_x_F.exp() - log_x_F - 1
    return losses_F + config.kl_weight * kl_F, kl_F


def _of_tokens(rows: Sequence[PolicyRow], values: Sequence[float]) -> Tensor:
    """A value of each row, for each of its free tokens [F]."""
    counts = torch.tensor([sum(row.free) for row in rows])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts)


def _bits(rows: Sequence[PolicyRow], logits_F_V: Tensor) -> Tensor | None:
    """Which tokens each free token was chosen from, for `completion_losses`; None: all of them, everywhere."""
    masks: list[NDArray[np.uint32] | None] = []
    for row in rows:
        of_tokens = row.masks() if row.masks is not None else [None] * len(row.completion_ids)
        masks += [mask for mask, free in zip(of_tokens, row.free, strict=True) if free]
    if all(mask is None for mask in masks):
        return None
    bits_F_W = any_token(*logits_F_V.shape)
    for place, mask in enumerate(masks):
        if mask is not None:
            bits_F_W[place] = mask
    return on_device(bits_F_W, logits_F_V.device)


class PolicyTraining:
    """An adapter that learns from rewards, step by step; `save` writes all that it takes to go on."""

    def __init__(self, stepper: Stepper, config: PolicyConfig) -> None:
        self._stepper, self._config = stepper, config
        # With dropout, probabilities are not those that the answers were sampled with.
        stepper.drops_out = False
        self.adapter_config = stepper.adapter.config
        # Kept, since a model that is lent out for answers has them not.
        self._parameters = stepper.adapter.parameters
        self._reference = {key: weights.detach().clone() for key, weights in self._parameters.items()}
        """What it started from. A new adapter changes nothing: then that is the base."""
        self._best: Mapping[str, Tensor] = {}
        self._updates = 0

    def update(self, rows: Sequence[PolicyRow]) -> PolicyUpdate:
        """Learn from the answers of a step. Those without a free token tell nothing. Raises TrainingError, and
        NoTrainingDataError where none has one."""
        rows = [row for row in rows if any(row.free)]
        if not rows:
            raise NoTrainingDataError(
                "No answer has a token that was the model's choice, since their grammar leaves it none. Train on a "
                "predictor with an output field that can have more than one value."
            )
        config, total = self._config, sum(sum(row.free) for row in rows)
        before = dict[int, Tensor]()
        reference = self._reference_logprobs(rows) if config.kl_weight else {}

        def pass_loss(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            own = cast(Sequence[PolicyRow], batch.rows)
            logprobs_F = choice_logprobs(self._stepper.loss, batch)
            for row, values in zip(own, _by_row(logprobs_F.detach(), own), strict=True):
                before.setdefault(id(row), values)
            before_F = torch.cat([before[id(row)] for row in own])
            reference_F = torch.cat([reference[id(row)] for row in own]) if reference else None
            losses_F, kl_F = choice_losses(own, logprobs_F, before_F, reference_F, config)
            return losses_F.sum() / total, torch.stack([losses_F.detach().sum(), kl_F.detach().sum()]) / total

        first, tokens = list[float](), 0
        for _ in range(config.updates):
            self._updates += 1
            of_all = config.steps * config.updates
            rate = learning_rate(self._updates, of_all, self._stepper.training)
            told, run = self._stepper.step(rows, pass_loss, rate, f"Update {self._updates} of {of_all}")
            first, tokens = first or told, tokens + run
        return PolicyUpdate(first[0], first[1] if config.kl_weight else None, rate, tokens)

    def _reference_logprobs(self, rows: Sequence[PolicyRow]) -> dict[int, Tensor]:
        """Of the free tokens of each row, by its id, under the weights that the training started from."""
        stepper = self._stepper
        stepper.adapter.base.eval()

        def run(plan: Sequence[MicroBatch]) -> dict[int, Tensor]:
            found = dict[int, Tensor]()
            for batch in plan:
                own = _by_row(choice_logprobs(stepper.loss, batch), batch.rows)
                found |= {id(row): logprobs for row, logprobs in zip(batch.rows, own, strict=True)}
            return found

        with torch.no_grad(), in_place(self._parameters, self._reference):
            return stepper.in_memory(rows, run, "The reference of the answers")

    def keep(self) -> None:
        """Take the weights as they are for the best so far."""
        self._best = self.weights()

    @property
    def best(self) -> Mapping[str, Tensor]:
        """A copy of the best weights on the CPU, by PEFT key; those of now where none were kept."""
        return self._best or self.weights()

    def weights(self) -> dict[str, Tensor]:
        """The same of the weights as they are now."""
        return all_whole(self._parameters)

    def save(self, folder: Path, run: str) -> None:
        """Write the state of a run, by its name, into a folder."""
        first, second = checkpoint.optimizer_moments(self._stepper.optimizer, self._parameters)
        state = TrainingState(
            step=self._updates,
            weights=self.weights(),
            best_weights=self._best,
            first_moments=first,
            second_moments=second,
        )
        checkpoint.write_state(folder, state, run)

    def load(self, folder: Path, run: str) -> None:
        """Go on from the state that `save` wrote. Raises TrainingError for another run's."""
        state = checkpoint.read_state(folder, run)
        if state is None:
            raise TrainingError(f"The checkpoint in {folder} is another run's: delete {folder.parent} and train again.")
        self._stepper.adapter.load(state.weights, folder)
        checkpoint.restore_optimizer(self._stepper.optimizer, self._parameters, state)
        self._best, self._updates = state.best_weights, state.step


def _by_row(values_F: Tensor, rows: Sequence[TokenizedRow]) -> tuple[Tensor, ...]:
    """The values of each row's free tokens."""
    return values_F.split([sum(row.free) for row in rows])
