"""The running mean of a training's weights: at any step what a learning rate that falls to 0 gives at the last one.

So a training needs no length that is fixed beforehand: it goes on at its learning rate for as long as the held-out
error of the mean falls (Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
arXiv 2405.18392). The mean reaches back over a share of the steps done, not over a number of them (Karras et al.,
arXiv 2312.02696, section 3): it follows the first steps closely, and smooths more the longer the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .sharing import all_whole, like

EXPONENT = 7
"""The mean is over weights that are a ninth, 1 / (EXPONENT + 2), of the steps old."""


class RunningMean:
    """The mean of the weights so far, by PEFT key, beside the weights. It starts from `state`, or with step 1."""

    def __init__(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._mean = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        for key, tensor in state.items():
            self._mean[key].copy_(like(tensor, self._mean[key]))

    def update(self, step: int) -> None:
        """Take the weights after optimizer step `step`, from 1."""
        share = 1 - (1 - 1 / step) ** (EXPONENT + 1)
        for key, mean in self._mean.items():
            mean.lerp_(self._parameters[key].detach(), share)

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        return all_whole(self._mean)

    def in_place(self) -> AbstractContextManager[None]:
        """The model runs with the mean in place of its weights."""
        return in_place(self._parameters, self._mean)


@contextlib.contextmanager
def in_place(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """The model runs with other weights in place of its own, which are on its device as they are."""
    _swap(parameters, others)
    try:
        yield
    finally:
        _swap(parameters, others)


def _swap(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(others[key])
            others[key].copy_(weights)
