"""Train a LoRA adapter on rows of tokens."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import TrainingError
from ..printable import get_logger
from . import checkpoint
from .adapter import save_adapter
from .auto import resolved
from .averaging import RunningMean
from .checkpoint import TrainingState
from .config import LoRAConfig, TrainingConfig
from .held_out import HeldOutLosses
from .length import RunLength
from .objective import RowObjective
from .packing import MicroBatch, TokenizedRow, check_rows, drawn_form, epoch_batches
from .preference import PairObjective
from .progress import ProgressFunction, TrainingProgress
from .stepper import Stepper, ready_to_step

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training run gives."""

    folder: Path
    """Plain PEFT adapter folder."""
    history: tuple[TrainingProgress, ...]
    best_epoch: int
    """Epoch whose weights were kept, from 1."""
    tokens: int
    """Tokens trained on (forward tokens, as packed)."""
    seconds: float
    base: HeldOutLosses | None
    """Held-out losses before training; None without validation rows."""
    best: HeldOutLosses | None
    """Held-out losses of the weights kept."""
    out_of_time: bool
    """Whether `max_minutes` ended it before its last step."""

    @property
    def base_validation_loss(self) -> float | None:
        """Held-out loss of the free tokens before training."""
        return None if self.base is None else self.base.free

    @property
    def validation_loss(self) -> float | None:
        """Held-out loss of the free tokens, of the weights kept."""
        return None if self.best is None else self.best.free


def train_adapter(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TokenizedRow],
    *,
    validation_rows: Sequence[TokenizedRow] = (),
    lora: LoRAConfig = LoRAConfig(),
    training: TrainingConfig = TrainingConfig(),
    folder: Path,
    start_from: Path | None = None,
    on_progress: ProgressFunction | None = None,
) -> TrainingResult:
    """Train a LoRA adapter over `model` and write it to `folder` as a plain PEFT adapter.

    The loss of an optimizer step is the mean over the completion tokens of its rows, in which each output field of a
    row counts alike (`balance_fields`) and tokens that the answer's grammar forces count `skeleton_weight`; the loss
    that is reported is that of the others, the free ones. Of pairs it is that of `preference.PairLoss`. Base weights
    don't change, other adapters of a PeftModel are kept, and on return, also after an exception, the model is as
    before. A run that was killed goes on from its last full epoch when it is called again with the same arguments, and
    gives the same result as an uninterrupted one; so does one that was killed at its end, without training again: the
    last checkpoint stays in `folder`. `start_from` is the PEFT folder of an adapter to continue from, with
    its own rank and layers. Under `accelerate launch` the processes share each step's rows, and with FSDP2 the weights;
    the model stays sharded then.

    Raises NoTrainingDataError without rows, DataError for a row that can't be trained on, ConfigError for options
    that can't be had on this model or machine, ModelError for a `start_from` that is no adapter of this model, and
    TrainingError when the loss stops being a number or memory doesn't suffice.
    """
    check_rows(rows, validation_rows)
    longest = max(row.longest for row in itertools.chain(rows, validation_rows))
    with ready_to_step(model, lora, training, start_from, longest) as stepper:
        return _Run(stepper, rows, validation_rows, training, folder, on_progress).train()


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (from 1): linear warm-up to the peak, then the schedule."""
    warmup, peak = math.ceil(training.warmup_ratio * total_steps), _number(training.learning_rate)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if training.scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done if training.scheduler == "linear" else 1.0)


def _number(value: float | str) -> float:
    """A number that "auto" has been replaced by."""
    assert not isinstance(value, str)
    return value


class _Run:
    """One training run; `state` is all that it would take to go on."""

    def __init__(
        self,
        stepper: Stepper,
        rows: Sequence[TokenizedRow],
        validation_rows: Sequence[TokenizedRow],
        training: TrainingConfig,
        folder: Path,
        on_progress: ProgressFunction | None,
    ) -> None:
        self.stepper, self.folder = stepper, folder
        self.adapter, self.sharing = stepper.adapter, stepper.sharing
        adapter, loss = stepper.adapter, stepper.loss
        width = adapter.base.config.get_text_config().hidden_size
        pairs = bool(rows[0].rejected_ids)
        self.training = resolved(training, width, len(rows), held_out=bool(validation_rows), pairs=pairs)
        self.objective: RowObjective | PairObjective
        self.objective = (PairObjective if pairs else RowObjective)(stepper, self.training)
        self.rows, self.validation_rows, self.on_progress = rows, validation_rows, on_progress
        self.parameters = adapter.parameters
        self.length = RunLength(training, int(_number(self.training.epochs)), len(rows), bool(validation_rows))
        self.total_steps = self.length.total_steps
        self.started = time.perf_counter()
        options: dict[str, object] = {
            "training": [training.recipe().to_dict(), self.training.recipe().to_dict()],
            "base": adapter.base.config.to_json_string(),
            "dtype": str(loss.dtype),
        }
        options |= {"packed": loss.packed, "initial": adapter.digest(), "torch": torch.__version__}
        self.fingerprint = checkpoint.fingerprint(rows, validation_rows, options)
        self.state = TrainingState()
        self.mean: RunningMean | None = None
        self.history: list[TrainingProgress] = []

    def train(self) -> TrainingResult:
        """Run the epochs that are left, and write the adapter."""
        # Before the weights of a checkpoint are there.
        self.rows, self.validation_rows = map(self.objective.prepared, (self.rows, self.validation_rows))
        self._resume()
        if self.sharing.is_main:
            self.length.announce()
        if self.state.epoch == 0 and self.validation_rows:
            losses = self._held_out_losses()
            self.state = replace(self.state, base=losses)
            self._report(None, losses, 0.0, 0)
        while self.state.epoch < self.length.epochs and not self._ends_early():
            self._epoch(self.state.epoch + 1)
        if self.sharing.is_main:
            save_adapter(self.folder, self.adapter.config, self.state.kept)
        self.sharing.wait()
        state = self.state
        return TrainingResult(
            folder=self.folder,
            history=tuple(self.history),
            best_epoch=state.best_epoch,
            tokens=state.tokens,
            seconds=state.seconds,
            base=state.base,
            best=state.best,
            out_of_time=state.step < self.total_steps and not self.length.lost_patience(self.history),
        )

    def _resume(self) -> None:
        state = checkpoint.load_state(self.folder, self.fingerprint)
        # All have looked for the last checkpoint, before anybody writes the first.
        self.sharing.check_agreed(0 if state is None else state.epoch, "checkpoints")
        if state is not None:
            logger.info("Going on after epoch %d of %d in %s.", state.epoch, self.length.epochs, self.folder)
            self.adapter.load(state.weights, self.folder)
            checkpoint.restore_optimizer(self.stepper.optimizer, self.parameters, state)
            self.state, self.history = state, list(state.history)
        if self.training.scheduler == "averaged":
            self.mean = RunningMean(self.parameters, self.state.mean_weights)

    @property
    def _seconds(self) -> float:
        """Of the whole run until now."""
        return self.state.seconds + time.perf_counter() - self.started

    def _ends_early(self) -> bool:
        """Whether no epoch should follow the one that is done."""
        epoch = self.state.epoch
        if epoch == 0:
            return False
        too_long = self._agreed(self.length.next_too_long(epoch, self._seconds))
        ends = too_long or self.length.lost_patience(self.history)
        if ends and self.sharing.is_main:
            self.length.say_why(epoch, self.history, self.state.step)
        return ends

    def _agreed(self, over: bool) -> bool:
        """Whether the time is over by the clock of any process."""
        return over if self.training.max_minutes is None else self.sharing.most(over) > 0

    def _epoch(self, epoch: int) -> None:
        seed = f"{self.training.seed}/{epoch}/{self.sharing.index}"
        torch.manual_seed(random.Random(seed).getrandbits(63))
        training = self.training
        for number, indices in enumerate(epoch_batches(len(self.rows), training.batch_size, training.seed, epoch)):
            rows = [self.rows[index] for index in indices]
            form = drawn_form(rows, training.form_share, training.seed, epoch, number)
            self._step(rows if form is None else [row.shown(form) for row in rows])
            if epoch == 1 and self._agreed(self.length.too_long(self._seconds)):
                break
        losses = self._held_out_losses() if self.validation_rows else None
        if losses is not None:
            self._report(None, losses, self.stepper.optimizer.param_groups[0]["lr"], 0)
        self._finish_epoch(epoch, losses)

    def _finish_epoch(self, epoch: int, losses: HeldOutLosses | None) -> None:
        before, weights = self.state, self.adapter.state()
        choose = self.training.keep_best and losses is not None and before.best is not None
        better = not choose or losses.measure < before.best.measure  # type: ignore[union-attr]
        first, second = checkpoint.optimizer_moments(self.stepper.optimizer, self.parameters)
        self.state = replace(
            before,
            epoch=epoch,
            seconds=self._seconds,
            best_epoch=epoch if better else before.best_epoch,
            best=losses if better else before.best,
            weights=weights,
            mean_weights=self.mean.state() if self.mean else {},
            best_weights={} if better else before.kept,
            first_moments=first,
            second_moments=second,
            history=tuple(self.history),
        )
        self.started = time.perf_counter()
        if self.sharing.is_main:
            checkpoint.save_state(self.folder, self.state, self.fingerprint)

    def _step(self, rows: Sequence[TokenizedRow]) -> None:
        step, started = self.state.step + 1, time.perf_counter()
        rate = learning_rate(step, self.total_steps, self.training)
        of_step = self.objective.of_step(rows)

        def pass_loss(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return of_step.losses(batch.rows, self.stepper.loss.token_losses(batch))

        (loss,), tokens = self.stepper.step(rows, pass_loss, rate, f"Step {step} of {self.total_steps}")
        if self.mean:
            self.mean.update(step)
        self.state = replace(self.state, step=step, tokens=self.state.tokens + tokens)
        self._report(loss, None, rate, tokens)
        if self.sharing.is_main:
            self.length.step_done(step, time.perf_counter() - started, self._seconds)

    def _held_out_losses(self) -> HeldOutLosses:
        self.adapter.base.eval()
        started = time.perf_counter()
        with self.mean.in_place() if self.mean else contextlib.nullcontext():
            losses = self.objective.held_out(self.validation_rows)
        self.length.held_out_seconds = time.perf_counter() - started
        if not losses.finite:
            raise TrainingError(
                f"After step {self.state.step} of {self.total_steps} the held-out loss is {losses.free} ("
                f"{losses.all_tokens} over all tokens). Lower the learning rate (now {self.training.learning_rate}), "
                "or use dtype='float32'."
            )
        return losses

    def _report(self, loss: float | None, held_out: HeldOutLosses | None, rate: float, new_tokens: int) -> None:
        epoch, state = self.state.step / self.length.steps_per_epoch, self.state
        line = TrainingProgress(
            step=state.step,
            total_steps=self.total_steps,
            epoch=epoch,
            loss=loss,
            validation_loss=None if held_out is None else held_out.free,
            tokens=state.tokens,
            learning_rate=rate,
            validation_error=None if held_out is None else held_out.error,
            new_tokens=new_tokens,
        )
        self.history.append(line)
        if self.on_progress is not None and self.sharing.is_main:
            self.on_progress(line)
