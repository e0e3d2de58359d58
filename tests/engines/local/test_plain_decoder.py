"""Rows join the plain decoder's padded batch and leave it while others are written."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, VOCABULARY
from small_models import PACKED, bank, decode, generated, prompts, save_adapter, tiny_model

from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.plain_decoder import PlainDecoder


def rows_of(lengths: list[int], adapter: str = "") -> list[BatchRow]:
    texts = prompts(len(lengths), 30)
    return [BatchRow(text, length, adapter) for text, length in zip(texts, lengths, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_join_those_under_way_and_answer_as_generate_does(family: str, device: str) -> None:
    model = tiny_model(PACKED[family]).to(device)
    rows = rows_of([9, 3, 6, 2, 5])
    decoder = PlainDecoder(model, bank(model))
    decode(decoder, rows, most=2)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]
    # 25 tokens, of which the first of each row comes with its prompt: 13 passes if two were always running.
    assert decoder.counters()["forward_passes"] < 9 + 6 + 5


def test_a_model_that_keeps_a_state_of_its_own_has_one_batch_after_the_other() -> None:
    model = FAMILIES["recurrent_gemma"].model()
    texts = [[token % VOCABULARY for token in text] for text in prompts(3, 20)]
    rows = [BatchRow(text, 3 + 2 * place) for place, text in enumerate(texts)]
    decoder = PlainDecoder(model, bank(model), pads=False, joins=False)
    decode(decoder, rows, most=2)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]


def test_rows_of_another_adapter_have_their_turn(tmp_path: Any) -> None:
    model = tiny_model()
    adapters = bank(model)
    name = adapters.add(save_adapter(tmp_path / "adapter", seed=1))
    decoder = PlainDecoder(model, adapters)
    (first, second), (other,) = rows_of([4, 4]), rows_of([4], name)
    assert decoder.admit([first]) == [first]
    decoder.step([first])
    assert decoder.admit([second, other]) == []
    decoder.release(first)
    assert decoder.admit([other, second]) == [other]


def test_the_room_of_rows_that_have_left_is_given_back() -> None:
    model = tiny_model()
    long, short = BatchRow(prompts(1, 200)[0], 50), BatchRow(prompts(1, 10)[0], 50)
    decoder = PlainDecoder(model, bank(model))
    decoder.admit([long, short])
    for row, decision in zip((long, short), decoder.step([long, short]), strict=True):
        row.output_ids += decision.token_ids
    decoder.release(long)
    decoder.step([short])
    assert decoder._batch is not None
    assert decoder._batch.cache.layers[0].keys.shape[::2] == (1, short.computed)
