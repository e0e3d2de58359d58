"""A model put back to what it was before: while it is trained, so that it can answer; after a look at what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ._upstream import AttentionNames, attention_names, restore_attention

SWITCHES = (
    "training", "forward", "gradient_checkpointing", "_gradient_checkpointing_func", "peft_config", "_active_adapter",
    "_disable_adapters",
)  # fmt: skip
"""Attributes of modules that a training changes."""


@dataclass(frozen=True)
class ModelState:
    """Which modules a model is made of, how they are switched, and the attention it uses; not its weights."""

    children: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    switches: tuple[tuple[nn.Module, dict[str, Any]], ...]
    attention: AttentionNames

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state that a model is in."""
        modules = list(model.modules())
        return cls(
            tuple((module, dict(module._modules)) for module in modules),
            tuple((module, {n: module.__dict__[n] for n in SWITCHES if n in module.__dict__}) for module in modules),
            attention_names(model),
        )

    def restore(self) -> None:
        """Bring the model to this state."""
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        for module, switches in self.switches:
            for name in SWITCHES:
                module.__dict__.pop(name, None)
            module.__dict__.update(switches)
        restore_attention(self.attention)


@contextlib.contextmanager
def lent_out(model: PreTrainedModel, state: ModelState) -> Iterator[None]:
    """The model in an earlier state for the block, and in the present one after it."""
    present = ModelState.of(model)
    state.restore()
    try:
        yield
    finally:
        present.restore()


@contextlib.contextmanager
def random_state_kept(model: PreTrainedModel) -> Iterator[None]:
    """Leave the random state after the block as it was, that of the model's device too."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def looked_at(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block passes are without gradients; after it the modules are in training or not, and the random state
    is, as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), random_state_kept(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
