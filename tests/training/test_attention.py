"""Attention over packed rows equals that of the padded batch, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from reference import padded_loss_sum, relative_error
from tiny import FAMILIES, random_rows, tiny_model

from bettertogether.training.attention import TRAINING_ATTENTION, PackedLayout, attention_by_block, training_attention
from bettertogether.training.loss import row_loss
from bettertogether.training.packing import Block, PackedRow, TokenizedRow, micro_batches, pack

ROWS = [*random_rows(5, shared=20), *random_rows(3, shared=15, seed=1), *random_rows(1, shared=0, seed=2)]
# Answers to one prompt, which begins as the first.
ROWS += [TokenizedRow([*ROWS[0].prompt_ids, *range(12)], row.completion_ids) for row in ROWS[2:5]]


def layout() -> PackedLayout:
    """Of all rows, some of which share more than others."""
    (batch,) = micro_batches(ROWS, 10_000, 10_000)
    assert len(set(batch.shared)) > 3
    return PackedLayout(pack(batch), torch.device("cpu"))


def random_qkv(tokens: int, heads: int = 4, key_heads: int = 2, dim: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, heads, tokens, dim), (1, key_heads, tokens, dim), (1, key_heads, tokens, dim))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_padded_batchs(family: str) -> None:
    model = tiny_model(FAMILIES[family]).requires_grad_(True)
    weights = list(model.parameters())
    expected = padded_loss_sum(model, ROWS)
    expected_grads = torch.autograd.grad(expected, weights)
    with row_loss(model, torch.float32, max(map(len, ROWS))) as loss:
        (batch,) = loss.plan(ROWS, max_tokens=10_000)
        found = loss.token_losses(batch).sum()
        grads = torch.autograd.grad(found, weights)
    assert loss.packed
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(grads, expected_grads) < 1e-5


def test_the_mask_lets_a_row_see_its_prefix_and_itself_causally() -> None:
    packed = PackedRow(
        list(range(6)), [0, 1, 2, 3, 2, 0], [], (Block(0, 2, 5), Block(2, 4, 4), Block(4, 5, 5), Block(5, 6, 6))
    )
    assert PackedLayout(packed, torch.device("cpu")).mask(None).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_mask_of_a_window_counts_positions_in_the_row() -> None:
    packed = PackedRow(list(range(5)), [0, 1, 2, 2, 3], [], (Block(0, 2, 5), Block(2, 3, 3), Block(3, 5, 5)))
    assert PackedLayout(packed, torch.device("cpu")).mask(2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("window", [None, 0, -1], ids=["no window", "of the longest row", "a token shorter"])
def test_block_attention_equals_attention_under_a_dense_mask(window: int | None) -> None:
    rows = layout()
    sees = None if window is None else rows.longest + window
    q, k, v = random_qkv(len(rows.packed.input_ids))
    out, _ = training_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=sees, packed_layout=rows)
    expected = dense(q, k, v, rows.mask(sees))
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out.transpose(1, 2) * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert relative_error([out.transpose(1, 2), *grads], [expected, *expected_grads]) < 1e-5


def test_the_attention_of_other_devices_equals_attention_under_a_dense_mask() -> None:
    rows = layout()
    q, k, v = random_qkv(len(rows.packed.input_ids))
    out, expected = attention_by_block(q, k, v, 0.3, rows.packed.blocks), dense(q, k, v, rows.mask(None))
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert relative_error([out, *grads], [expected, *expected_grads]) < 1e-5


def test_attention_refuses_what_it_can_not_compute_exactly() -> None:
    q, k, v = random_qkv(len(layout().packed.input_ids))
    with pytest.raises(NotImplementedError, match="softcap"):
        training_attention(torch.nn.Module(), q, k, v, None, packed_layout=layout(), softcap=5.0)


def test_what_one_row_alone_has_is_attended_like_any_other_when_it_lies_in_two_blocks() -> None:
    tokens = len(ROWS[0])
    packed = PackedRow([], list(range(tokens)), [], (Block(0, 10, tokens), Block(10, tokens, tokens)))
    rows = PackedLayout(packed, torch.device("cpu"))
    q, k, v = random_qkv(tokens)
    out, _ = training_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, packed_layout=rows)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert relative_error([out.transpose(1, 2)], [dense(q, k, v, causal)]) < 1e-5


def test_the_models_own_attention_is_back_afterwards() -> None:
    model = tiny_model()
    with row_loss(model, torch.float32, 40):
        assert model.config._attn_implementation == TRAINING_ATTENTION
    assert model.config._attn_implementation == "sdpa"
