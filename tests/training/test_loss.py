"""Which models train on packed rows, which on padded ones, with the same loss."""

from __future__ import annotations

import logging

import pytest
import torch
from reference import padded_loss_sum, relative_error
from tiny import FAMILIES, GEMMA2, SIZES, VOCABULARY, random_rows, tiny_model
from transformers import GPT2Config, Lfm2Config, LlamaConfig, PretrainedConfig

from bettertogether.training import loss as loss_module
from bettertogether.training.fused import completion_losses
from bettertogether.training.loss import row_loss, why_not_packed

ROWS = [*random_rows(5, shared=20), *random_rows(3, shared=0, seed=1)]
LONGEST = max(map(len, ROWS))


def test_a_family_with_capped_attention_scores_trains_on_padded_rows_with_the_same_loss() -> None:
    model = tiny_model(GEMMA2).requires_grad_(True)
    weights = list(model.parameters())
    expected = padded_loss_sum(model, ROWS)
    expected_grads = torch.autograd.grad(expected, weights)
    with row_loss(model, torch.float32, LONGEST) as loss:
        batches = loss.plan(ROWS, max_tokens=4 * LONGEST)
        found = torch.stack([loss.token_losses(batch).sum() for batch in batches]).sum()
        grads = torch.autograd.grad(found, weights)
    assert not loss.packed
    assert len(batches) > 1
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("config", [FAMILIES["llama"], GEMMA2], ids=["packed", "padded"])
def test_a_model_that_gives_the_logits_of_all_tokens_has_the_same_loss(config: PretrainedConfig) -> None:
    model = tiny_model(config)
    forward, expected = model.forward, padded_loss_sum(model, ROWS)
    model.forward = lambda **inputs: forward(**inputs, logits_to_keep=0)
    with row_loss(model, torch.float32, LONGEST) as loss, torch.no_grad():
        found = sum(loss.token_losses(batch).sum() for batch in loss.plan(ROWS, 10_000))
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)


def test_a_family_whose_layers_are_more_than_attention_by_its_config_is_not_packed() -> None:
    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    assert why_not_packed(tiny_model(config), 40) == "its layers are of type conv"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_mix_tokens_outside_attention_are_found_out_by_their_logits(dtype: torch.dtype) -> None:
    model = tiny_model().type(dtype)
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: output + 0.02 * output.roll(1, 1))
    assert "with their place among packed rows" in str(why_not_packed(model, 40))


def test_a_model_with_dropout_in_its_attention_under_any_name_is_not_packed() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    assert why_not_packed(tiny_model(config), 40) == "packed attention without a layout or with dropout"


def test_attention_dropout_is_a_reason_not_to_pack() -> None:
    config = LlamaConfig(**SIZES, attention_dropout=0.1)
    assert why_not_packed(tiny_model(config), 40) == "attention_dropout=0.1 in its config"


def test_a_model_that_another_attention_serves_is_still_checked_against_transformers_own() -> None:
    import bettertogether.engines.local.packed_attention as serving

    model = tiny_model()
    model.set_attn_implementation(serving.PACKED_ATTENTION)
    assert why_not_packed(model, 40) is None
    assert model.config._attn_implementation == serving.PACKED_ATTENTION


def test_the_padded_path_is_announced_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_said", set())
    model = tiny_model(GEMMA2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with row_loss(model, torch.float32, LONGEST):
                pass
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "Gemma2ForCausalLM trains on padded batches"
    ]


def test_padded_batches_stay_within_the_limits_of_tokens_padding_included_and_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with row_loss(tiny_model(GEMMA2), torch.float32, LONGEST) as loss:
        batches = loss.plan(ROWS, max_tokens=3 * LONGEST)
        monkeypatch.setattr(loss_module, "LOGIT_ELEMENTS", 25 * VOCABULARY)
        small = loss.plan(ROWS, max_tokens=10_000)
    assert sum(len(batch.rows) for batch in batches) == sum(len(batch.rows) for batch in small) == len(ROWS)
    assert all(loss.tokens(batch) <= 3 * LONGEST for batch in batches)
    assert [len(batch.rows) for batch in small] == [2, 1, 3, 2]


def test_the_probe_leaves_the_models_mode_alone() -> None:
    model = tiny_model()
    model.train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    why_not_packed(model, 40)
    assert [module.training for module in model.modules()] == before


def test_bfloat16_loss_is_near_the_float32_loss_which_an_autocast_of_the_callers_does_not_change() -> None:
    model = tiny_model()
    losses = []
    for dtype, outside in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        with row_loss(model, dtype, LONGEST) as loss, torch.no_grad(), torch.autocast("cpu", enabled=outside):
            losses.append(float(sum(loss.token_losses(batch).sum() for batch in loss.plan(ROWS, 10_000))))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[2] == losses[0]


def test_completion_loss_and_its_gradient_are_cross_entropys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bettertogether.training.fused.CHUNK_ELEMENTS", 3 * VOCABULARY)
    torch.manual_seed(0)
    logits_N_V = torch.randn(10, VOCABULARY, requires_grad=True)
    labels_N = torch.randint(VOCABULARY, (10,))
    expected = torch.nn.functional.cross_entropy(logits_N_V, labels_N, reduction="sum")
    found = completion_losses(logits_N_V, labels_N).sum()
    grads = [torch.autograd.grad(x / 7, logits_N_V)[0] for x in (found, expected)]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(grads[:1], grads[1:]) < 1e-6


def test_every_tested_family_packs() -> None:
    assert {name: why_not_packed(tiny_model(config), 40) for name, config in FAMILIES.items()} == dict.fromkeys(
        FAMILIES
    )
