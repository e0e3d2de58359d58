"""Both decoders, packed and plain, answer as `generate` does on tiny models of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import PACKED, bank, bfloat16_by_default, decode, generated, prompts, tiny_model
from transformers import GptOssConfig, LlamaConfig

from bettertogether.engines.answers import SamplingOptions
from bettertogether.engines.local.choice import make_decoder, why_not_packed_decoder
from bettertogether.engines.local.decoder import BatchRow, Decision
from bettertogether.engines.local.packed_decoder import LONG_ROW, PackedDecoder
from bettertogether.engines.local.plain_decoder import PlainDecoder

CACHE_BYTES = 1 << 30


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def packed(model: Any, **options: Any) -> PackedDecoder:
    return PackedDecoder(model, bank(model), **{"cache_bytes": CACHE_BYTES, **options})


def answers(decoder: Any, rows: list[BatchRow]) -> list[list[int]]:
    decode(decoder, rows)
    return [row.output_ids for row in rows]


def mixed_rows() -> list[BatchRow]:
    """Two groups with shared prefixes, one prompt longer than a slot may be, one of a single token."""
    texts = [*prompts(6, 80), *prompts(3, 40, seed=1), *prompts(1, LONG_ROW + 50, seed=2), [7]]
    return [BatchRow(text, 4 + place) for place, text in enumerate(texts)]


@pytest.mark.parametrize("family", PACKED)
def test_packed_passes_answer_as_generate_does(family: str, device: str) -> None:
    model = tiny_model(PACKED[family]).to(device)
    rows = mixed_rows()
    assert why_not_packed_decoder(model, bank(model)) is None
    assert answers(packed(model), rows) == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gemma3"])
def test_answers_are_the_same_while_another_thread_builds_a_model(family: str) -> None:
    model, rows = tiny_model(PACKED[family]), mixed_rows()
    expected = [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]
    with bfloat16_by_default():
        decoder = make_decoder(model, bank(model), CACHE_BYTES)
        assert isinstance(decoder, PackedDecoder)
        assert answers(decoder, rows) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padded_batches_answer_as_generate_does(family: str, device: str) -> None:
    model = tiny_model(PACKED[family]).to(device)
    rows = mixed_rows()
    expected = [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]
    assert answers(PlainDecoder(model, bank(model)), rows) == expected


def test_bfloat16_logits_stay_as_close_to_float32_as_the_models_own() -> None:
    config = LlamaConfig(**{**PACKED["llama"].to_dict(), "num_hidden_layers": 4})
    exact, rough = tiny_model(config), tiny_model(config).to(torch.bfloat16)
    prompt = prompts(1, 90)[0]
    expected = exact(torch.tensor([prompt])).logits[0, -1]
    own = (rough(torch.tensor([prompt])).logits[0, -1].float() - expected).abs().mean()
    ours = (packed(rough).probe(prompt, 60).float() - expected).abs().mean()
    assert ours < 1.5 * own


@pytest.mark.parametrize("tokens", [25, 40])
def test_a_window_of_24_tokens_ends_where_the_models_own_does(tokens: int) -> None:
    model, prompt = tiny_model(PACKED["mistral with a window"]), list(range(tokens))
    expected = model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(packed(model).probe(prompt, 8), expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_attention_sinks_goes_the_plain_way_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {**PACKED["llama"].to_dict(), "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    names = ("model_type", "architectures", "transformers_version", "mlp_bias", "rope_parameters")
    config = GptOssConfig(**{name: value for name, value in sizes.items() if name not in names})
    model = tiny_model(config)
    decoder = make_decoder(model, bank(model), CACHE_BYTES)
    assert isinstance(decoder, PlainDecoder)
    assert "answers in padded batches" in caplog.text
    assert "attention can't be packed" in caplog.text


def test_a_shared_prefix_is_computed_once(model: Any) -> None:
    decoder = packed(model)
    texts = prompts(8, 100)
    answers(decoder, [BatchRow(text, 1) for text in texts])
    assert decoder.counters() == {"forward_passes": 2, "prefix_tokens_reused": 7 * 100}


def test_a_lone_prompt_is_kept_for_those_that_share_a_part_of_it(model: Any) -> None:
    decoder = packed(model)
    first, second = prompts(2, 100)
    answers(decoder, [BatchRow(first, 1)])
    row = BatchRow(second, 3)
    assert answers(decoder, [row]) == [generated(model, second, 3)]
    assert row.reused_tokens == 100


def test_a_prefix_that_extends_another_starts_from_it(model: Any) -> None:
    decoder = packed(model)
    short, long = prompts(1, 0, own=1)[0] + prompts(1, 99, own=1)[0], prompts(1, 200, seed=3)[0]
    head = prompts(1, 300, seed=4)[0][:300]
    groups = [[head[:100] + tail for tail in (short, [1], [2, 3])], [head + tail for tail in (long, [4], [5, 6])]]
    rows = [BatchRow(text, 4) for group in groups for text in group]
    assert answers(decoder, rows) == [generated(model, row.prompt_ids, 4) for row in rows]


def test_a_row_waits_for_the_head_that_its_prefix_is_to_copy(model: Any) -> None:
    head = prompts(1, 40)[0][:40]
    first, second, third = ([*head, 1, *range(250)], [*head, 2, *range(200)], [3, *range(200)])
    decoder = packed(model)
    answers(decoder, [BatchRow([*first, 0, place], 1) for place in range(3)])
    # `second` copies the head from `first` when its turn comes, after `third`. Used last, `first` is looked at last.
    for group in (third, second):
        decoder.admit([BatchRow([*group, 0, place], 1) for place in range(3)])
    decoder.admit([BatchRow([*first, 9], 1)])
    row = BatchRow([*head, 4, 5, 6], 4)
    decoder.admit([row])
    while len(row.output_ids) < 4:
        row.output_ids += decoder.step([row])[0].token_ids
    assert row.output_ids == generated(model, row.prompt_ids, 4)


def test_prompts_that_are_the_same_share_all_but_the_last_token(model: Any) -> None:
    prompt = prompts(1, 200)[0]
    rows = [BatchRow(list(prompt), 3) for _ in range(4)]
    assert answers(packed(model), rows) == [generated(model, prompt, 3)] * 4
    assert [row.reused_tokens for row in rows] == [0, *[len(prompt) - 1] * 3]


def test_tokens_of_answers_are_none_of_the_prompt_tokens_that_were_found_computed(model: Any) -> None:
    prompt, common = prompts(1, 40)[0], prompts(1, 80, seed=1)[0]
    rows = [BatchRow(list(prompt), 100, output_ids=list(common)) for _ in range(3)]
    decoder = packed(model)
    decoder.admit(rows)
    assert [row.reused_tokens for row in rows] == [0, len(prompt), len(prompt)]
    assert decoder.counters()["prefix_tokens_reused"] == 2 * len(prompt)


def test_answers_under_way_that_share_more_than_their_prompt_go_on_together(model: Any) -> None:
    prompt, common, *own = (prompts(1, size, seed=seed)[0] for seed, size in enumerate((20, 80, 150, 150)))
    rows = [BatchRow(list(prompt), len(common + tail) + 3, output_ids=common + tail) for tail in own]
    expected = [generated(model, row.prompt_ids + row.output_ids, 3) for row in rows]
    assert [answer[-3:] for answer in answers(packed(model), rows)] == expected


def test_a_long_prompt_goes_through_in_chunks(model: Any) -> None:
    decoder = packed(model, tokens_per_pass=64)
    rows = [BatchRow(text, 3) for text in (*prompts(3, 150), *prompts(2, 0, own=150, seed=5))]
    assert answers(decoder, rows) == [generated(model, row.prompt_ids, 3) for row in rows]
    assert decoder.counters()["forward_passes"] > 6


def test_the_prefix_cache_stays_within_its_bound(model: Any) -> None:
    token_bytes = 2 * 2 * 2 * 16 * 4
    decoder = packed(model, cache_bytes=250 * token_bytes)
    for seed in range(6):
        rows = [BatchRow(text, 2) for text in prompts(3, 100, seed=seed)]
        assert answers(decoder, rows) == [generated(model, row.prompt_ids, 2) for row in rows]
        assert decoder._prefixes.size_bytes <= 250 * token_bytes


def test_a_prompt_that_does_not_fit_the_cache_is_answered_all_the_same(model: Any) -> None:
    decoder = packed(model, cache_bytes=1)
    rows = [BatchRow(text, 2) for text in (*prompts(3, 100), *prompts(1, LONG_ROW + 20, seed=1))]
    assert answers(decoder, rows) == [generated(model, row.prompt_ids, 2) for row in rows]
    assert decoder._prefixes.size_bytes == 0


def test_rows_may_join_and_leave_at_any_step(model: Any) -> None:
    decoder = packed(model)
    rows = [BatchRow(text, 3 + place % 4) for place, text in enumerate(prompts(12, 30, own=40))]
    running: list[BatchRow] = []
    waiting = list(rows)
    while waiting or running:
        running += decoder.admit([waiting.pop(0)]) if waiting else []
        for row, decision in zip(list(running), decoder.step(running), strict=True):
            row.output_ids += decision.token_ids
            if len(row.output_ids) == row.max_new_tokens:
                decoder.release(row)
                running.remove(row)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]


def test_a_released_row_goes_on_where_it_was_when_it_is_admitted_again(model: Any) -> None:
    decoder = packed(model)
    row = BatchRow(prompts(1, 40)[0], 8)
    decoder.admit([row])
    for _ in range(3):
        row.output_ids += decoder.step([row])[0].token_ids
    decoder.release(row)
    assert row.computed == 0
    assert answers(decoder, [row]) == [generated(model, row.prompt_ids, 8)]


def test_after_a_reset_nothing_is_left(model: Any) -> None:
    decoder = packed(model)
    row = BatchRow(prompts(1, 40)[0], 4)
    decoder.admit([row])
    row.output_ids += decoder.step([row])[0].token_ids
    decoder.reset()
    assert (row.computed, decoder._prefixes.size_bytes) == (0, 0)
    assert answers(decoder, [row]) == [generated(model, row.prompt_ids, 4)]


def test_the_models_own_attention_is_back_after_each_pass(model: Any) -> None:
    before = model.config._attn_implementation
    answers(packed(model), [BatchRow(prompts(1, 40)[0], 2)])
    assert model.config._attn_implementation == before == "sdpa"


def test_a_row_still_in_its_prompt_gets_no_token(model: Any) -> None:
    decoder = packed(model, tokens_per_pass=10)
    row = BatchRow(prompts(1, 15)[0][:15], 1)
    decoder.admit([row])
    assert decoder.step([row]) == [Decision()]
    assert len(decoder.step([row])[0].token_ids) == 1


@pytest.mark.parametrize("kind", [packed, lambda model: PlainDecoder(model, bank(model))])
def test_the_same_seed_gives_the_same_text_whatever_the_batch(model: Any, kind: Any) -> None:
    texts = prompts(5, 40)
    options = SamplingOptions(temperature=1.0, seed=3)
    alone = [answers(kind(model), [BatchRow(text, 6, sampling=options)])[0] for text in texts]
    together = answers(kind(model), [BatchRow(text, 6, sampling=options) for text in texts])
    assert together == alone
    assert len(set(map(tuple, together))) == 5
