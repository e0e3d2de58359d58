"""The policy loss of packed answers is that of a plain implementation in float64, and teaches what is rewarded."""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import relative_error
from tiny import FAMILIES, VOCABULARY, random_rows, tiny_model
from torch import Tensor

from bettertogether.errors import ConfigError, NoTrainingDataError, TrainingError
from bettertogether.training.adapter import save_adapter, training_adapter
from bettertogether.training.config import LoRAConfig, PolicyConfig, TrainingConfig
from bettertogether.training.loss import row_loss
from bettertogether.training.policy import PolicyRow, PolicyTraining, choice_logprobs, choice_losses
from bettertogether.training.stepper import ready_to_step

SHARED = {"with a shared prefix": 12, "without": 0}


def sampled_rows(shared: int, *, masked: bool, seed: int = 0) -> list[PolicyRow]:
    """Answers of which some tokens were forced, at several temperatures; some of them under a grammar that allowed half
    of the vocabulary."""
    draw = random.Random(seed)
    rows = []
    for place, row in enumerate(random_rows(7, shared, seed=seed)):
        forced = [False, *(draw.random() < 0.4 for _ in row.completion_ids[1:])]
        masks = _masks(row.completion_ids, draw) if masked and place % 3 else None
        heat, advantage = draw.choice([0.5, 1.0, 1.7]), draw.uniform(-1, 1)
        marks: Any = {"forced": forced, "advantage": advantage, "temperature": heat, "masks": masks}
        rows.append(PolicyRow(row.prompt_ids, row.completion_ids, **marks))
    return rows


def _masks(token_ids: Sequence[int], draw: random.Random) -> Any:
    masks = []
    for token in token_ids:
        bits = np.array([draw.random() < 0.5 for _ in range(-(-VOCABULARY // 32) * 32)])
        bits[token] = True
        masks.append(np.packbits(bits, bitorder="little").view(np.uint32))
    return lambda: masks


def plain_logprobs(model: Any, row: PolicyRow) -> Tensor:
    """The log-probabilities of a row's free tokens, by itself, from the logits of all its tokens."""
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits_T_V = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1] / row.temperature
    if row.masks is not None:
        bits_T_W = np.stack([mask for mask in row.masks() if mask is not None])
        allowed_T_V = np.unpackbits(bits_T_W.view(np.uint8), axis=1, bitorder="little")[:, :VOCABULARY]
        logits_T_V = logits_T_V.masked_fill(~torch.from_numpy(allowed_T_V).bool(), -torch.inf)
    chosen_T = logits_T_V.log_softmax(-1)[range(len(row.completion_ids)), row.completion_ids]
    return chosen_T[torch.tensor(row.free)]


def plain_loss(
    model: Any,
    rows: Sequence[PolicyRow],
    before: Sequence[Tensor],
    reference: Sequence[Tensor],
    config: PolicyConfig,
) -> Tensor:
    """The loss of the docstring, row by row."""
    terms = []
    for row, old, ref in zip(rows, before, reference, strict=True):
        for new_t, old_t, ref_t in zip(plain_logprobs(model, row), old, ref, strict=True):
            r, x = (new_t - old_t).exp(), (ref_t - new_t).exp()
            gain = min(r * row.advantage, r.clamp(1 - config.clip, 1 + config.clip) * row.advantage)
            terms.append(config.kl_weight * (x - x.log() - 1) - gain)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("masked", [False, True], ids=["free text", "under a grammar"])
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("family", ["llama", "gemma3, capped logits", "mistral, window shorter than the rows"])
def test_loss_and_gradients_are_a_plain_implementations_in_float64(family: str, shared: int, masked: bool) -> None:
    model = tiny_model(FAMILIES[family]).double()
    config = PolicyConfig(kl_weight=0.3, clip=0.1)
    rows = sampled_rows(shared, masked=masked)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        now = [plain_logprobs(model, row) for row in rows]
    before, reference = (
        [each + 0.2 * torch.randn(each.shape, generator=noise, dtype=torch.float64) for each in now] for _ in range(2)
    )
    expected = plain_loss(model, rows, before, reference, config)
    parameters = list(model.parameters())
    expected_grads = torch.autograd.grad(expected, parameters)
    place = {id(row): number for number, row in enumerate(rows)}
    with row_loss(model, torch.float64, 64) as loss:
        (batch,) = loss.plan(rows, 10_000)
        assert loss.packed
        assert any(batch.shared) == (shared > 0)
        order = [place[id(row)] for row in batch.rows]
        held = [torch.cat([values[number] for number in order]) for values in (before, reference)]
        logprobs_F = choice_logprobs(loss, batch)
        losses_F, _ = choice_losses([rows[number] for number in order], logprobs_F, held[0], held[1], config)
        grads = torch.autograd.grad(losses_F.mean(), parameters)
    # The models' own norms and rotary factors are in float32.
    torch.testing.assert_close(losses_F.mean(), expected, rtol=1e-5, atol=0)
    assert relative_error(grads, expected_grads) < 1e-5


STEPS = [sampled_rows(12, masked=True, seed=seed) for seed in (1, 2)]
FULL = PolicyConfig(steps=2, updates=3, clip=0.01, kl_weight=0.2)


@contextlib.contextmanager
def policy_of(config: PolicyConfig, start: Path | None = None, **options: Any) -> Iterator[PolicyTraining]:
    training = TrainingConfig(learning_rate=1e-3, dtype="float32", warmup_ratio=0.0, **options)
    with ready_to_step(tiny_model(), LoRAConfig(rank=4), training, start, 64) as stepper:
        yield PolicyTraining(stepper, config)


def plainly_trained(config: PolicyConfig) -> dict[str, Tensor]:
    """The adapter after these steps by peft's own layers and AdamW, in float64."""
    with training_adapter(tiny_model().double(), LoRAConfig(rank=4), 0) as adapter:
        model, parameters = adapter.base, adapter.parameters.values()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        start = copy.deepcopy(model)
        for rows in STEPS:
            with torch.no_grad():
                before = [plain_logprobs(model, row) for row in rows]
                reference = [plain_logprobs(start, row) for row in rows]
            for _ in range(config.updates):
                optimizer.zero_grad()
                plain_loss(model, rows, before, reference, config).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
        return adapter.state()


@pytest.mark.parametrize("config", [PolicyConfig(steps=2), FULL], ids=["defaults", "clipped updates and a reference"])
@pytest.mark.parametrize("max_tokens", [16_384, 60], ids=["one pass", "several passes"])
def test_an_adapter_trained_on_steps_is_the_one_that_peft_and_adamw_train(
    config: PolicyConfig, max_tokens: int
) -> None:
    with policy_of(config, max_tokens_per_batch=max_tokens) as policy:
        updates = [policy.update(rows) for rows in STEPS]
        found = policy.weights()
    assert [update.kl is None for update in updates] == [not config.kl_weight] * 2
    expected = {key: weights for key, weights in plainly_trained(config).items() if "lora_B" in key}
    assert min(float(weights.norm()) for weights in expected.values()) > 1e-3
    assert relative_error([found[key].double() for key in expected], list(expected.values())) < 1e-3


def test_a_training_that_is_loaded_goes_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    with policy_of(FULL) as policy:
        policy.update(STEPS[0])
        policy.keep()
        policy.save(tmp_path, "this run")
        expected = policy.update(STEPS[1])
        last, best = policy.weights(), policy.best
    with policy_of(FULL) as policy:
        policy.load(tmp_path, "this run")
        assert policy.update(STEPS[1]) == expected
        assert all(torch.equal(last[key], weights) for key, weights in policy.weights().items())
        assert all(torch.equal(best[key], weights) for key, weights in policy.best.items())
        with pytest.raises(TrainingError, match="is another run's"):
            policy.load(tmp_path, "another run")
    assert any(not torch.equal(last[key], weights) for key, weights in best.items())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_adapter_with_dropout_is_trained_further_without_it(tmp_path: Path, checkpointed: bool) -> None:
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        with training_adapter(tiny_model(), LoRAConfig(rank=4, dropout=dropout), 0) as adapter:
            save_adapter(tmp_path / name, adapter.config, adapter.state())
    found = []
    for name in ("with", "without"):
        with policy_of(FULL, tmp_path / name, gradient_checkpointing=checkpointed) as policy:
            told = [policy.update(rows) for rows in STEPS]
            assert policy.adapter_config.lora_dropout == (0.5 if name == "with" else 0.0)
            found.append((told, policy.weights()))
    (told, weights), (expected_told, expected) = found
    assert [each.loss for each in told] == pytest.approx([each.loss for each in expected_told], rel=1e-4)
    moved = [key for key in expected if "lora_B" in key]
    assert relative_error([weights[key] for key in moved], [expected[key] for key in moved]) < 1e-3


def test_gradients_are_checkpointed_where_asked_for() -> None:
    passes: dict[bool, list[int]] = {False: [], True: []}
    for checkpointed, counted in passes.items():
        with policy_of(PolicyConfig(), gradient_checkpointing=checkpointed) as policy:
            part = policy._stepper.adapter.base.model.layers[0].mlp
            part.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
            policy.update(STEPS[0])
    assert (len(passes[False]), len(passes[True])) == (1, 2)


def test_an_error_that_is_no_lack_of_memory_comes_out_as_it_is() -> None:
    def broken(plan: Any) -> None:
        raise error

    error = RuntimeError("expected scalar type Half")
    with policy_of(FULL) as policy, pytest.raises(RuntimeError) as caught:
        policy._stepper.in_memory(STEPS[0], broken, "Step 1")
    assert caught.value is error


def test_answers_without_any_choice_are_an_error() -> None:
    forced = [replace(row, forced=[True] * len(row.completion_ids)) for row in STEPS[0]]
    with (
        policy_of(FULL) as policy,
        pytest.raises(NoTrainingDataError, match="No answer has a token that was the model"),
    ):
        policy.update(forced)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("group_size", 1, "2 or more: runs are compared to each other"),
        ("temperature", 0, "a number above 0, at most 2: at 0 all runs of an example are the same"),
        ("clip", 1.0, "a number between 0 and 1"),
        ("kl_weight", -1, "0 or more"),
        ("unread_reward", None, "a number"),
        ("steps", 0, "a whole number, 1 or more"),
        ("fade_demos", "yes", "True or False"),
        ("group_by", "example", '"call" or "branch"'),
    ],
)
def test_a_setting_that_can_not_be_is_refused_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r} is not allowed: give {allowed}.")):
        PolicyConfig(**{name: value})
