"""Training on pairs is a plain DPO loop with the chosen answer's loss beside it, whatever its batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import relative_error
from safetensors.torch import load_file
from tiny import GEMMA2, VOCABULARY, random_rows, tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PretrainedConfig

from bettertogether.errors import DataError
from bettertogether.training import LoRAConfig, TrainingConfig
from bettertogether.training.adapter import TrainableAdapter, training_adapter
from bettertogether.training.packing import MicroBatch, TokenizedRow, epoch_batches
from bettertogether.training.preference import PairObjective
from bettertogether.training.stepper import Stepper, ready_to_step
from bettertogether.training.trainer import TrainingResult, learning_rate, train_adapter

LORA = LoRAConfig(rank=4, alpha=8)
FAST = TrainingConfig(learning_rate=1e-2, epochs=2, dtype="float32", batch_size=4, beta=0.3, nll_weight=0.5)


def pairs(number: int, shared: int, seed: int = 0, marked: bool = False) -> list[TokenizedRow]:
    """Two answers to each prompt; `marked` has tokens that a grammar forces, and fields."""
    random_ = random.Random(seed)
    made = []
    for row in random_rows(number, shared, seed=seed):
        rejected = [*(random_.randrange(3, VOCABULARY) for _ in range(random_.randint(1, 6))), 2]
        pair = replace(row, rejected_ids=rejected)
        if marked:
            forced = [[False, *(random_.random() < 0.5 for _ in ids[1:])] for ids in (row.completion_ids, rejected)]
            fields = [random_.choice(["a", "b"]) for _ in row.completion_ids]
            pair = replace(pair, forced=forced[0], rejected_forced=forced[1], fields=fields)
        made.append(pair)
    return made


PAIRS, HELD_OUT = pairs(10, shared=20), pairs(4, shared=20, seed=1)
MARKED = pairs(6, shared=20, seed=4, marked=True)


def token_losses(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> Tensor:
    """Of an answer that is run alone."""
    logits = model(torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0]
    return cross_entropy(logits[len(prompt_ids) - 1 : -1], torch.tensor(answer_ids), reduction="none")


def log_probability(model: Any, pair: TokenizedRow, answer_ids: list[int], forced: list[bool]) -> Tensor:
    losses = token_losses(model, pair.prompt_ids, answer_ids)
    if pair.forced and pair.rejected_forced:
        losses = losses[~torch.tensor(forced)]
    return -losses.sum()


def margin(model: Any, pair: TokenizedRow) -> Tensor:
    chosen = log_probability(model, pair, pair.completion_ids, pair.forced)
    return chosen - log_probability(model, pair, pair.rejected_ids, pair.rejected_forced)


def chosen_loss(model: Any, pair: TokenizedRow, training: TrainingConfig) -> Tensor:
    """Mean loss of a token; each field alike, and a forced token a share of what a free one counts."""
    losses = token_losses(model, pair.prompt_ids, pair.completion_ids)
    if not pair.forced:
        return losses.mean()
    free = [not each for each in pair.forced]
    in_field = {name: sum(f for f, n in zip(free, pair.fields, strict=True) if n == name) for name in pair.fields}
    weights = [1 / in_field[name] if f else 0.0 for f, name in zip(free, pair.fields, strict=True)]
    usual = sum(weights) / sum(free)
    weights = [weight or training.skeleton_weight * usual for weight in weights]
    return (losses * torch.tensor(weights)).sum() / sum(weights)


def plain_loss(model: Any, some: Sequence[TokenizedRow], reference: list[float], training: TrainingConfig) -> Tensor:
    """The loss as the papers write it."""
    terms = [
        -logsigmoid(training.beta * (margin(model, pair) - before))
        + training.nll_weight * chosen_loss(model, pair, training)
        for pair, before in zip(some, reference, strict=True)
    ]
    return torch.stack(terms).mean()


def stir(adapter: TrainableAdapter, seed: int) -> None:
    """Weights that no one would call initial."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters.values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def plain_gradients(config: PretrainedConfig | None, some: Sequence[TokenizedRow]) -> tuple[float, list[Tensor]]:
    """The loss and its gradients in float64, the reference being the weights before."""
    with training_adapter(tiny_model(config).double(), LORA, seed=0) as adapter:
        adapter.base.double()
        stir(adapter, 1)
        with torch.no_grad():
            reference = [float(margin(adapter.base, pair)) for pair in some]
        stir(adapter, 2)
        loss = plain_loss(adapter.base, some, reference, FAST)
        return loss.item(), list(torch.autograd.grad(loss, list(adapter.parameters.values())))


def gradients(stepper: Stepper, some: Sequence[TokenizedRow], most: int) -> tuple[float, list[Tensor], int]:
    """Ours, and the forward passes that they took."""
    stir(stepper.adapter, 1)
    objective = PairObjective(stepper, FAST)
    rows = list(objective.prepared(some))
    stir(stepper.adapter, 2)
    plan, total = stepper.loss.plan(rows, most), 0.0
    for batch in plan:
        loss, told = objective.of_step(rows).losses(batch.rows, stepper.loss.token_losses(batch))
        loss.backward()
        total += float(told)
    grads = [parameter.grad for parameter in stepper.adapter.parameters.values() if parameter.grad is not None]
    return total, grads, len(plan)


@pytest.mark.parametrize(
    ("config", "some"),
    [
        (None, PAIRS),
        (None, pairs(6, shared=0, seed=3)),
        (None, [*MARKED[:3], *(replace(pair, rejected_forced=[]) for pair in MARKED[3:])]),
        (GEMMA2, PAIRS[:4]),
    ],
    ids=["a shared prefix", "none shared", "with forced tokens and fields", "padded rows"],
)
def test_loss_and_gradients_in_one_pass_and_in_several_are_those_of_answers_run_alone_in_float64(
    config: PretrainedConfig | None, some: list[TokenizedRow]
) -> None:
    expected, expected_grads = plain_gradients(config, some)
    for most in (10_000, 70):
        with ready_to_step(tiny_model(config), LORA, FAST, None, max(pair.longest for pair in some)) as stepper:
            found, grads, passes = gradients(stepper, some, most)
        assert (passes == 1) == (most == 10_000)
        assert found == pytest.approx(expected, rel=1e-5)
        assert relative_error([grad.double() for grad in grads], expected_grads) < 1e-4


def train(folder: Path, training: TrainingConfig = FAST, rows: Any = PAIRS, **options: Any) -> TrainingResult:
    return train_adapter(tiny_model(), rows, lora=LORA, folder=folder, training=training, **options)


def weights(folder: Path) -> list[Tensor]:
    return [tensor for _, tensor in sorted(load_file(folder / "adapter_model.safetensors").items())]


def test_training_is_a_plain_loop_whose_reference_is_what_it_starts_from(tmp_path: Path) -> None:
    training = replace(FAST, scheduler="cosine")
    result = train(tmp_path, training)
    steps, losses = 2 * math.ceil(len(PAIRS) / 4), list[float]()
    with training_adapter(tiny_model(), LORA, training.seed) as adapter:
        parameters = list(adapter.parameters.values())
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, training.adam_beta2), weight_decay=0.0)
        with torch.no_grad():
            reference = [float(margin(adapter.base, pair)) for pair in PAIRS]
        for epoch in (1, 2):
            for indices in epoch_batches(len(PAIRS), 4, training.seed, epoch):
                optimizer.param_groups[0]["lr"] = learning_rate(len(losses) + 1, steps, training)
                some, before = [PAIRS[i] for i in indices], [reference[i] for i in indices]
                loss = plain_loss(adapter.base, some, before, training)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                losses.append(loss.item())
        expected = [tensor for _, tensor in sorted(adapter.state().items())]
    assert [line.loss for line in result.history] == pytest.approx(losses, rel=1e-4)
    assert relative_error(weights(tmp_path), expected) < 1e-3


def test_held_out_pairs_choose_the_epoch_and_their_loss_begins_at_that_of_no_preference(tmp_path: Path) -> None:
    result = train(tmp_path, validation_rows=HELD_OUT)
    assert result.base is not None
    assert result.best is not None
    assert result.base.free == pytest.approx(math.log(2) + 0.5 * result.base.all_tokens, rel=1e-6)
    losses = [line.validation_loss for line in result.history if line.validation_loss is not None]
    assert (losses[0], result.best.free) == (result.base.free, min(losses[1:]))


def test_a_killed_training_goes_on_to_the_same_weights_against_the_same_reference(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(line: Any) -> None:
        if line.step == 5:
            raise Killed

    start = tmp_path / "start"
    train(start, rows=pairs(4, shared=20, seed=7))
    whole = train(tmp_path / "whole", start_from=start, validation_rows=HELD_OUT)
    with pytest.raises(Killed):
        train(tmp_path / "killed", start_from=start, validation_rows=HELD_OUT, on_progress=kill)
    again: list[Any] = []
    result = train(tmp_path / "killed", start_from=start, validation_rows=HELD_OUT, on_progress=again.append)
    assert again[0].step == 4
    assert (result.best, result.history) == (whole.best, whole.history)
    assert all(map(torch.equal, weights(tmp_path / "killed"), weights(tmp_path / "whole")))


def test_a_pair_is_never_split(tmp_path: Path) -> None:
    passes: list[MicroBatch] = []
    with ready_to_step(tiny_model(), LORA, FAST, None, 100) as stepper:
        passes = stepper.loss.plan(PAIRS, 1)
    assert [batch.is_single for batch in passes] == [True] * len(PAIRS)
    assert [len(batch.rows) for batch in passes] == [2] * len(PAIRS)


def test_a_row_among_pairs_and_a_pair_of_several_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\[1\] has no rejected answer .*give rows, or pairs"):
        train(tmp_path, rows=[PAIRS[0], random_rows(1, shared=3)[0]])
    with pytest.raises(DataError, match=r"rows\[0\] has a rejected answer and 1 forms"):
        train(tmp_path, rows=[replace(PAIRS[0], forms=[[3, 4]])])
