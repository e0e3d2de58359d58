"""The fused LoRA layer gives PEFT's loss and gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import relative_error
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn

from bettertogether.engines.local.packed_linear import pack_linear_layers
from bettertogether.training.fused import fused_lora

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def lora_model(family: str = "llama", dropout: float = 0.0) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(FAMILIES[family]), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    loss = model(IDS, labels=IDS, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


# Qwen2's projections have a bias.
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_fused_layer_gives_pefts_loss_and_gradients(family: str) -> None:
    model = lora_model(family)
    expected = gradients(model)
    with fused_lora(model, "default", torch.float32):
        found = gradients(model)
    assert relative_error(found, expected) < 1e-5


def test_the_fused_layer_takes_bfloat16() -> None:
    model = lora_model()
    expected = gradients(model)
    with fused_lora(model, "default", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    assert {grad.dtype for grad in found[1:]} == {torch.float32}
    assert 0 < relative_error(found, expected) < 0.1


def test_layers_with_dropout_keep_pefts_forward() -> None:
    model = lora_model(dropout=0.5)
    with fused_lora(model, "default", torch.float32):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_are_as_before_afterwards() -> None:
    model = lora_model()
    with fused_lora(model, "default", torch.float32):
        assert sum("forward" in module.__dict__ for module in model.modules()) == 14
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_with_packed_weights_are_fused_and_give_the_same_gradients() -> None:
    plain, packed = lora_model(), lora_model()
    if not pack_linear_layers(packed):
        pytest.skip("this processor has no use for packed weights")
    expected = gradients(packed)
    with fused_lora(packed, "default", torch.float32):
        assert sum("forward" in module.__dict__ for module in packed.modules()) == 14
        found = gradients(packed)
    with fused_lora(plain, "default", torch.float32):
        assert all(map(torch.equal, found, gradients(plain)))
    assert relative_error(found, expected) < 1e-5
