"""What the processes of a training share: a step's rows always, and the weights where accelerate shards the model.

Sharded (FSDP2), each process holds a part of every weight, and a pass through a layer gathers that layer from all of
them: so all run equally many passes, forward and backward, whatever rows they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..errors import TrainingError
from ._upstream import new_accelerator
from .packing import MicroBatch, TokenizedRow


@dataclass(frozen=True)
class Sharing:
    """The processes of a training, as accelerate has started them: one, where it has not."""

    accelerator: Accelerator

    @classmethod
    def of_this_process(cls) -> Sharing:
        """Those that this process is one of."""
        return cls(new_accelerator())

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        """Which of them this is."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @cached_property
    def sharded(self) -> bool:
        """Whether they share the weights, too."""
        return bool(self.accelerator.is_fsdp2)

    def prepare(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Shard the model and the weights of its optimizer, where that is asked for. It stays so."""
        if self.sharded:
            self.accelerator.prepare(model, optimizer)

    def rows(self, rows: Sequence[TokenizedRow]) -> Sequence[TokenizedRow]:
        """This process's rows: a run of the rows in order of their prompts, so that prefixes stay together."""
        number, index = self.processes, self.index
        if number == 1:
            return rows
        ordered = sorted(rows, key=lambda row: (row.prompt_ids, row.completion_ids))
        return ordered[len(ordered) * index // number : len(ordered) * (index + 1) // number]

    def passes(self, plan: Sequence[MicroBatch], rows: Sequence[TokenizedRow]) -> list[tuple[MicroBatch, bool]]:
        """Micro-batches, at least one, each with whether it counts: sharded, as many as the process with the most has,
        filled up with the shortest of `rows`, which don't count."""
        counted = [(batch, True) for batch in plan]
        wanted = self.most(len(plan)) if self.sharded else 1
        filler = MicroBatch.apart(min(rows, key=len).answers)
        return counted + [(filler, False)] * (wanted - len(plan))

    def most(self, number: float) -> int:
        """The largest of the processes' whole numbers."""
        return int(self.accelerator.gather(torch.tensor([int(number)], device=self.accelerator.device)).max())

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.processes == 1:
            return values.cpu()
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return summed.cpu()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all processes. Sharded, the backward pass has done so, and taken their mean."""
        grads = [_grad(parameter) for parameter in parameters]
        if self.processes == 1 or self.sharded:
            return
        summed = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for grad, part in zip(grads, summed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    @property
    def loss_scale(self) -> int:
        """What a loss is multiplied by before the backward pass, so that gradients add up over the processes."""
        return self.processes if self.sharded else 1

    def clip(self, parameters: Sequence[Tensor], most: float) -> float:
        """Clip the gradients to a norm; returns what it was."""
        return float(whole(self.accelerator.clip_grad_norm_(parameters, most)))

    def let_go(self, model: nn.Module) -> None:
        """After passes without a backward pass: layers keep no gathered weights, which would be old after a step."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def check_agreed(self, number: int, what: str) -> None:
        """Raise TrainingError where the processes found different numbers."""
        found = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).tolist()
        if len(set(found)) > 1:
            raise TrainingError(
                f"The processes see different {what}: {found}. Put the run's directory on a file system that all "
                "machines share."
            )

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded tensor all of it, for which every process has to ask."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().to("cpu", copy=True).contiguous()
    return tensor.to("cpu", copy=True).contiguous()


def like(tensor: Tensor, place: Tensor) -> Tensor:
    """A whole tensor as another one is held: on its device, and sharded as it is."""
    moved = tensor.to(place.device, place.dtype)
    return distribute_tensor(moved, place.device_mesh, place.placements) if isinstance(place, DTensor) else moved


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`whole` of each."""
    return {key: whole(tensor) for key, tensor in tensors.items()}


def _grad(parameter: Tensor) -> Tensor:
    """The gradient; zeros where no token of the step reached the weight."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
