"""What transformers answers and peft trains is what is answered and trained here, whatever the family; or it is refused
before any work. Hidden size 32, 2 layers, random weights; windows are shorter than the texts."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFUSED, VOCABULARY, Family
from peft import PeftModel
from small_models import byte_tokenizer, decode, generated
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from bettertogether.engines.adapters import AdapterBank, linear_shapes
from bettertogether.engines.loading import read_card
from bettertogether.engines.local.choice import make_decoder
from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.errors import ModelError
from bettertogether.training.adapter import save_adapter, training_adapter
from bettertogether.training.config import LoRAConfig, TrainingConfig
from bettertogether.training.packing import TokenizedRow
from bettertogether.training.stepper import ready_to_step

NEW_TOKENS = 3
NUMBERS = random.Random(0)
SHARED = [NUMBERS.randrange(3, VOCABULARY - 10) for _ in range(18)]
TEXTS = [SHARED + [NUMBERS.randrange(3, VOCABULARY - 10) for _ in range(own)] for own in (3, 9, 14)]
ROWS = [TokenizedRow(text, text[own : own + 3 + own]) for own, text in enumerate([*TEXTS, TEXTS[0][5:12]])]
LORA = LoRAConfig(rank=2)


@dataclass(frozen=True)
class Tuned:
    """A random model, and an adapter of it that is far from its first weights."""

    family: Family
    model: Any
    folder: Path
    """The adapter, as we write it."""
    peft: PeftModel
    """A copy of the model with the adapter, by peft."""


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("adapter")
    numbers = torch.Generator().manual_seed(1)
    model = family.model()
    with training_adapter(model, LORA, 0) as adapter:
        weights = {key: 0.1 * torch.randn(each.shape, generator=numbers) for key, each in adapter.parameters.items()}
        save_adapter(folder, adapter.config, weights)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True).eval()
    return Tuned(family, model, folder, peft)


def test_loss_and_gradients_are_those_of_rows_alone_under_peft(tuned: Tuned) -> None:
    alone = torch.stack([_loss_alone(tuned.peft, row) for row in ROWS]).sum()
    weights = {name.replace(".default", ""): each for name, each in tuned.peft.named_parameters() if "lora_" in name}
    alone_grads = dict(zip(weights, torch.autograd.grad(alone, list(weights.values())), strict=True))
    training = TrainingConfig(dtype="float32")
    with ready_to_step(tuned.model, LORA, training, tuned.folder, max(map(len, ROWS))) as stepper:
        loss, weights = stepper.loss, stepper.adapter.parameters
        together = torch.stack([loss.token_losses(batch).sum() for batch in loss.plan(ROWS, 10_000)]).sum()
        grads = dict(zip(weights, torch.autograd.grad(together, list(weights.values())), strict=True))
    assert loss.packed == tuned.family.packed
    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-4)
    assert grads.keys() == alone_grads.keys()
    size = torch.cat([grad.flatten() for grad in alone_grads.values()]).norm()
    assert torch.cat([(grads[key] - alone_grads[key]).flatten() for key in grads]).norm() < 3e-4 * size


def _loss_alone(model: Any, row: TokenizedRow) -> Tensor:
    logits_T_V = model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids]), use_cache=False).logits[0]
    answer = logits_T_V[len(row.prompt_ids) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(answer, torch.tensor(row.completion_ids), reduction="sum")


def test_an_adapter_and_the_base_beside_it_answer_as_peft_and_transformers_do(tuned: Tuned) -> None:
    adapters = AdapterBank("tiny", lambda: linear_shapes(tuned.model))
    adapters.attach(tuned.model)
    names = (adapters.add(tuned.folder), "")
    rows = [BatchRow(text, NEW_TOKENS + place, name) for name in names for place, text in enumerate(TEXTS)]
    decoder = make_decoder(tuned.model, adapters, 1 << 24)
    decode(decoder, rows, most=4)
    adapters.attach(None)
    assert isinstance(decoder, PackedDecoder) == tuned.family.fast
    models = (tuned.model, tuned.peft)
    answers = [generated(models[row.adapter != ""], row.prompt_ids, row.max_new_tokens) for row in rows]
    assert [row.output_ids for row in rows] == answers


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_is_not_served_is_refused_when_its_card_is_read(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=REFUSED[kind]):
        read_card(tmp_path)
