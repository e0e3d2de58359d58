"""Optimizer steps of a LoRA adapter, whatever the loss: each in as many forward passes as memory asks for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigError, TrainingError
from ..printable import get_logger
from .adapter import ADAPTER_NAME, TrainableAdapter, training_adapter
from .config import LoRAConfig, TrainingConfig
from .fused import fused_lora
from .lending import random_state_kept
from .loss import RowLoss, row_loss
from .packing import MicroBatch, TokenizedRow
from .precision import (
    checkpoint_gradients,
    compute_dtype,
    give_back_memory,
    is_out_of_memory,
    tokens_in_memory,
)
from .sharing import Sharing

logger = get_logger(__name__)

T = TypeVar("T")

PassLoss = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Of one forward pass over some rows of a step: its part of the step's loss, a scalar to go backward from, and its part
of what is told of the step [K], without gradients. The parts of all passes add up."""


@dataclass
class Stepper:
    """An adapter on its model, ready for optimizer steps."""

    adapter: TrainableAdapter
    optimizer: torch.optim.AdamW
    sharing: Sharing
    loss: RowLoss
    training: TrainingConfig
    max_tokens: int
    """Tokens of a forward pass at most; fewer once memory did not suffice."""
    drops_out: bool = True
    """Whether steps have the dropout of the adapter and the model."""

    def step(
        self, rows: Sequence[TokenizedRow], pass_loss: PassLoss, rate: float, name: str
    ) -> tuple[list[float], int]:
        """Lower a loss over some rows at a learning rate; returns what is told of it, and the tokens run. All processes
        give the same rows. `name` says in errors which step it is. Raises TrainingError."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.adapter.base.train(self.drops_out)
        if not self.drops_out:
            for module in self.adapter.base.modules():
                # Gradients are checkpointed in modules that train alone.
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        told = self._gradients(rows, pass_loss, name)
        # Losses are already over the tokens of all processes, so that a sum is the mean.
        told = self.sharing.sum(told)
        parameters = list(self.adapter.parameters.values())
        self.sharing.sum_gradients(parameters)
        norm = self.sharing.clip(parameters, self.training.max_grad_norm or math.inf)
        if not (told.isfinite().all() and math.isfinite(norm)):
            raise TrainingError(
                f"{name}: the loss is {float(told[0])} and the gradient's norm {norm}. Lower the learning rate (now "
                f"{rate:g}), or use dtype='float32'. Nothing was saved after the last checkpoint."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        *told_K, tokens = told.tolist()
        return told_K, round(tokens)

    def _gradients(self, rows: Sequence[TokenizedRow], pass_loss: PassLoss, name: str) -> Tensor:
        """Add up the gradients of this process's part of a step; returns its share of what is told and, last, the
        tokens run."""

        def run(plan: Sequence[MicroBatch]) -> Tensor:
            self.optimizer.zero_grad(set_to_none=False)
            told: list[Tensor] = []
            for batch, counts in self.sharing.passes(plan, rows):
                loss, of_pass = pass_loss(batch)
                (loss * counts * self.sharing.loss_scale).backward()
                told.append(of_pass * counts)
            told_K = torch.stack(told).sum(0).cpu().double()
            return torch.cat([told_K, told_K.new_tensor([sum(self.loss.tokens(batch) for batch in plan)])])

        return self.in_memory(self.sharing.rows(rows), run, name)

    def in_memory(self, rows: Sequence[TokenizedRow], run: Callable[[Sequence[MicroBatch]], T], name: str) -> T:
        """What `run` gives for the forward passes over some rows. Where memory doesn't suffice for them it is run again
        with smaller ones. Raises TrainingError, which says what it is by `name`, where there are none."""
        while True:
            plan = self.loss.plan(rows, self.max_tokens)
            try:
                return run(plan)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._check_splittable(plan, name, error)
            # Out of the except block, so that the exception no longer keeps the failed pass's tensors.
            self.max_tokens = max(self.loss.tokens(batch) for batch in plan) // 2
            logger.warning("Out of memory: going on with %d tokens per forward pass.", self.max_tokens)
            give_back_memory()

    def _check_splittable(self, plan: Sequence[MicroBatch], name: str, error: Exception) -> None:
        """Raise TrainingError where a pass that memory doesn't suffice for can't be run in smaller ones."""
        where = f"{name}: memory doesn't suffice for"
        if self.sharing.sharded:
            raise TrainingError(
                f"{where} {self.max_tokens} tokens. Processes that share the weights can't split a step by themselves: "
                "lower max_tokens_per_batch, or use gradient_checkpointing=True."
            ) from error
        if all(batch.is_single for batch in plan):
            longest = max((self.loss.tokens(batch) for batch in plan), default=0)
            raise TrainingError(
                f"{where} a single row or pair of {longest} tokens. Use gradient_checkpointing=True or "
                "quantize_base='4bit', or leave out the longest rows."
            ) from error


@contextlib.contextmanager
def ready_to_step(
    model: PreTrainedModel | PeftModel,
    lora: LoRAConfig,
    training: TrainingConfig,
    start_from: Path | None,
    longest: int,
) -> Iterator[Stepper]:
    """An adapter over `model`, new or that of a PEFT folder, for rows of up to `longest` tokens. After the block, also
    after an exception, the model is as before, and so is the random state."""
    sharing = Sharing.of_this_process()
    if training.quantize_base is not None:
        if sharing.sharded:
            raise ConfigError("quantize_base='4bit' can't be sharded: use quantize_base=None, or no FSDP.")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not getattr(base, "is_loaded_in_4bit", False):
            raise ConfigError("quantize_base='4bit' needs a model in 4 bits: load it so, or use quantize_base=None.")
    with training_adapter(model, lora, training.seed, start_from) as adapter, random_state_kept(adapter.base):
        base = adapter.base
        optimizer = torch.optim.AdamW(
            adapter.parameters.values(), betas=(0.9, training.adam_beta2), weight_decay=training.weight_decay
        )
        sharing.prepare(base, optimizer)
        dtype = compute_dtype(base, training)
        checkpoint_gradients(base, training)
        with row_loss(base, dtype, longest) as loss, fused_lora(base, ADAPTER_NAME, dtype, gathered=sharing.sharded):
            sharing.let_go(base)
            most = tokens_in_memory(base.config, base.device, loss.dtype)
            max_tokens = min(training.max_tokens_per_batch, most)
            yield Stepper(adapter, optimizer, sharing, loss, training, max_tokens)
