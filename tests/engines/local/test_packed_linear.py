"""Linear layers with packed weights give the results of the layers that they stand for."""

from __future__ import annotations

import copy
import platform
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from bettertogether.engines.local.packed_linear import PackedLinear, pack_linear_layers

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="nothing is packed here")


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(48, 96, bias=False, dtype=dtype)
        self.two = nn.Linear(96, 32, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_packed_layers_give_the_plain_result() -> None:
    model, x = Small(), torch.randn(2, 5, 48)
    expected = model(x)
    assert pack_linear_layers(model) == 2
    with torch.inference_mode():
        found = model(x)
    assert type(model.one) is type(model.two) is PackedLinear
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_result_whatever_the_rows_beside_it() -> None:
    model, x = Small(), torch.randn(1, 64, 48)
    pack_linear_layers(model)
    with torch.inference_mode():
        together = model(x)
        for count in (1, 3, 16):
            assert torch.equal(model(x[:, :count]), together[:, :count])


def test_outside_inference_mode_gradients_and_results_are_the_plain_layers() -> None:
    model = Small()
    plain = copy.deepcopy(model)
    pack_linear_layers(model)
    x = torch.randn(4, 48, requires_grad=True)
    expected = torch.autograd.grad(plain(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], expected)
    assert torch.equal(model(x), plain(x))


def test_input_of_another_precision_takes_the_plain_path() -> None:
    layer = nn.Linear(8, 8)
    pack_linear_layers(layer)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 8, dtype=torch.float64))


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    assert pack_linear_layers(nn.Sequential(Special(8, 8))) == 0


def test_nothing_is_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 4 * 96 * 48

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    model: Any = Small()
    assert pack_linear_layers(model) == 0
    assert type(model.one) is nn.Linear
