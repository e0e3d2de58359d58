"""What transformers answers and peft trains is what is answered and trained here, whatever the family; or it is refused
before any work. Hidden size 32, 2 layers, random weights; windows are shorter than the texts."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED, VOCABULARY, Family
from peft import PeftModel
from small_models import bank, byte_tokenizer, decode, generated
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from bettertogether.engines.adapters import AdapterBank, linear_shapes
from bettertogether.engines.loading import read_card
from bettertogether.engines.local.choice import make_decoder
from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.errors import ModelError
from bettertogether.training.adapter import training_adapter
from bettertogether.training.config import LoRAConfig, TrainingConfig
from bettertogether.training.loss import row_loss
from bettertogether.training.packing import TokenizedRow
from bettertogether.training.trainer import train_adapter

NEW_TOKENS = 4
NUMBERS = random.Random(0)
SHARED = [NUMBERS.randrange(3, VOCABULARY - 10) for _ in range(18)]
TEXTS = [SHARED + [NUMBERS.randrange(3, VOCABULARY - 10) for _ in range(own)] for own in (3, 9, 14)]
ROWS = [TokenizedRow(text, text[own : own + 3 + own]) for own, text in enumerate([*TEXTS, TEXTS[0][5:12]])]
LORA = LoRAConfig(rank=2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    found = FAMILIES[request.param]
    return found, found.model()


def test_answers_are_generates(family: tuple[Family, Any]) -> None:
    expected, model = family
    decoder = make_decoder(model, bank(model), 1 << 24)
    rows = [BatchRow(text, NEW_TOKENS + place) for place, text in enumerate(TEXTS)]
    decode(decoder, rows, most=2)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]
    assert isinstance(decoder, PackedDecoder) == expected.fast


def test_loss_and_gradients_are_those_of_rows_alone(family: tuple[Family, Any]) -> None:
    expected, model = family
    with training_adapter(model, LORA, 0) as adapter:
        weights = list(adapter.parameters.values())
        numbers = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in weights:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=numbers))
        alone = [_loss_alone(model, row) for row in ROWS]
        alone_grads = torch.autograd.grad(torch.stack(alone).sum(), weights)
        with row_loss(model, torch.float32, max(map(len, ROWS))) as loss:
            together = torch.stack([loss.token_losses(batch).sum() for batch in loss.plan(ROWS, 10_000)]).sum()
            grads = torch.autograd.grad(together, weights)
    assert loss.packed == expected.packed
    assert float(together.detach()) == pytest.approx(float(torch.stack(alone).sum().detach()), rel=1e-4)
    size = torch.cat([grad.flatten() for grad in alone_grads]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(grads, alone_grads, strict=True)]).norm() < 3e-4 * size


def _loss_alone(model: Any, row: TokenizedRow) -> Tensor:
    logits_T_V = model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids]), use_cache=False).logits[0]
    answer = logits_T_V[len(row.prompt_ids) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(answer, torch.tensor(row.completion_ids), reduction="sum")


def test_a_trained_adapter_beside_the_base_answers_as_peft_does(family: tuple[Family, Any], tmp_path: Path) -> None:
    _, model = family
    training = TrainingConfig(epochs=1, batch_size=2, learning_rate=0.05, dtype="float32")
    train_adapter(model, ROWS, lora=LORA, training=training, folder=tmp_path)
    adapters = AdapterBank("tiny", lambda: linear_shapes(model))
    adapters.attach(model)
    names = [adapters.add(tmp_path), ""]
    rows = [BatchRow(text, NEW_TOKENS, name) for text in TEXTS for name in names]
    decode(make_decoder(model, adapters, 1 << 24), rows)
    adapters.attach(None)
    tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    expected = [generated(each, text, NEW_TOKENS) for text in TEXTS for each in (tuned, model)]
    assert [row.output_ids for row in rows] == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_is_not_served_is_refused_when_its_card_is_read(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=REFUSED[kind]):
        read_card(tmp_path)
