"""Training on a CUDA device, and on Apple's, that are not there, in bfloat16: it mixes no devices, learns as on the
processor, and waits for the device twice a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import DeviceTensor, fake_device
from tiny import SIZES, random_rows, tiny_model
from transformers import LlamaConfig

from bettertogether.training.attention import PackedLayout, training_attention
from bettertogether.training.config import LoRAConfig, TrainingConfig
from bettertogether.training.packing import TokenizedRow, micro_batches, pack
from bettertogether.training.progress import ProgressFunction
from bettertogether.training.trainer import train_adapter

ROWS = [
    TokenizedRow([*range(40, 60), 70 + place], [80, 81 + place, 82], forced=[True, False, True]) for place in range(4)
]


def losses(
    folder: Path,
    put: Callable[[Any], Any],
    on_progress: ProgressFunction | None = None,
    config: LlamaConfig | None = None,
) -> list[float]:
    """Held-out losses before training, and after each of two steps, on the device where the model is put."""
    model: Any = tiny_model(config)
    model = put(model.to(torch.bfloat16).requires_grad_(False))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "dtype": "bfloat16"}
    training = TrainingConfig(**options, gradient_checkpointing=True)
    lora = LoRAConfig(rank=4, target_modules=("q_proj", "down_proj"))
    trained = train_adapter(
        model,
        ROWS,
        validation_rows=ROWS[:2],
        lora=lora,
        training=training,
        folder=folder,
        on_progress=on_progress,
    )
    return [line.validation_loss for line in trained.history if line.validation_loss is not None]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_training_learns_as_on_the_processor_and_reads_twice_a_step(kind: str, tmp_path: Path) -> None:
    expected, reads = losses(tmp_path / "cpu", lambda model: model), list[int]()
    with fake_device(kind) as device:
        found = losses(tmp_path / kind, device.put, lambda line: reads.append(len(device.reads)))
    assert found == pytest.approx(expected, rel=0.05)
    assert found[-1] < 0.9 * found[0]
    # The loss, and the norm of the gradient.
    assert reads[1] - reads[0] == 2


def test_heads_of_a_width_that_no_flash_kernel_takes_are_trained_without_it(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"head_dim": 12})
    expected = losses(tmp_path / "cpu", lambda model: model, config=config)
    with fake_device("cuda") as cuda:
        found = losses(tmp_path / "cuda", cuda.put, config=config)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.cuda
def test_training_on_a_gpu_learns_as_on_the_processor(tmp_path: Path) -> None:
    expected = losses(tmp_path / "cpu", lambda model: model)
    assert losses(tmp_path / "cuda", lambda model: model.to("cuda")) == pytest.approx(expected, rel=0.05)


def test_packed_rows_are_attended_to_without_a_matrix_of_scores() -> None:
    rows = [*random_rows(6, shared=200, seed=3), *random_rows(2, shared=0, seed=4)]
    (batch,) = micro_batches(rows, 10_000, 10_000)
    packed = pack(batch)
    tokens = len(packed.input_ids)
    numbers = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, heads, tokens, 16, generator=numbers) for heads in (4, 2, 2, 4))

    def outcome(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = (one, two, three) = [x.to(dtype).to(device).requires_grad_() for x in (q, k, v)]
        layout = PackedLayout(packed, device)
        out, _ = training_attention(torch.nn.Module(), one, two, three, None, scaling=0.25, packed_layout=layout)
        (out.transpose(1, 2) * grad.to(dtype).to(device)).sum().backward()
        return [out.detach().float().cpu(), *(leaf.grad.float().cpu() for leaf in leaves if leaf.grad is not None)]

    expected = outcome(torch.device("cpu"), torch.float32)
    with fake_device("cuda") as cuda:
        found = outcome(torch.device("cuda:0"), torch.bfloat16)
        assert isinstance(torch.ones(1, device="cuda:0"), DeviceTensor)
    assert cuda.largest < tokens * tokens
    assert len(found) == len(expected) == 4
    for rough, exact in zip(found, expected, strict=True):
        assert float((rough - exact).norm() / exact.norm()) < 0.02
