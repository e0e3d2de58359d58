"""The engine on a CUDA device, and on Apple's, that are not there: it mixes no devices, answers as on the processor,
and reads the chosen tokens once a step and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fake_device import DeviceTensor, FakeDevice, fake_device
from small_models import PACKED, VOCABULARY, bank, byte_tokenizer, decode, generated, prompts, save_adapter, tiny_model

from bettertogether.engines.answers import SamplingOptions
from bettertogether.engines.local.decoder import BatchRow, Decision
from bettertogether.engines.local.packed_attention import AttentionKind, PrefixPass, PrefixTensors
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.engines.local.plain_decoder import PlainDecoder
from bettertogether.engines.local.sampling import decide
from bettertogether.engines.structured import GrammarCompiler

CACHE_BYTES = 1 << 30
CHOSEN = "tolist: sampling.py, token_ids: list[int] = "
PADDING = "is_nonzero.default: masking_utils.py, "
"""transformers looks whether a batch has padding."""


@pytest.fixture
def cuda() -> Iterator[FakeDevice]:
    with fake_device("cuda") as made:
        yield made


def texts() -> list[list[int]]:
    return [*prompts(2, 30, own=4), *prompts(1, 12, seed=1)]


def answered(decoder: Any, rows: list[BatchRow]) -> int:
    """Run the rows; how many steps it took."""
    with mock.patch.object(decoder, "step", wraps=decoder.step) as step:
        decode(decoder, rows)
    return step.call_count


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_passes_answer_as_generate_does_and_read_once_a_step(cuda: FakeDevice, family: str) -> None:
    rows = [BatchRow(text, 3) for text in texts()]
    model = cuda.put(tiny_model(PACKED[family]))
    steps = answered(PackedDecoder(model, bank(model), cache_bytes=CACHE_BYTES), rows)
    own = tiny_model(PACKED[family])
    assert [row.output_ids for row in rows] == [generated(own, row.prompt_ids, 3) for row in rows]
    assert [read.startswith(CHOSEN) for read in cuda.reads] == [True] * steps


def test_padded_batches_answer_as_generate_does_and_read_what_transformers_asks_of_the_padding(
    cuda: FakeDevice,
) -> None:
    rows = [BatchRow(text, 3) for text in texts()]
    model = cuda.put(tiny_model())
    steps = answered(PlainDecoder(model, bank(model)), rows)
    assert [row.output_ids for row in rows] == [generated(tiny_model(), row.prompt_ids, 3) for row in rows]
    assert sum(read.startswith(CHOSEN) for read in cuda.reads) == steps
    assert all(read.startswith((CHOSEN, PADDING)) for read in cuda.reads)


def test_rows_of_adapters_and_of_the_base_answer_as_on_the_processor(cuda: FakeDevice, tmp_path: Path) -> None:
    def answers(model: Any) -> list[list[int]]:
        adapters = bank(model)
        name = adapters.add(folder)
        rows = [BatchRow(text, 3, adapter) for text in texts()[:2] for adapter in ("", name)]
        decode(PackedDecoder(model, adapters, cache_bytes=CACHE_BYTES), rows)
        return [row.output_ids for row in rows]

    folder = save_adapter(tmp_path / "adapter", seed=1)
    expected = answers(tiny_model())
    assert answers(cuda.put(tiny_model())) == expected
    assert all(read.startswith(CHOSEN) for read in cuda.reads)


def test_bfloat16_logits_are_as_near_to_float32_as_the_models_own(cuda: FakeDevice) -> None:
    exact, rough = tiny_model(), tiny_model().to(torch.bfloat16)
    prompt = prompts(1, 60)[0]
    expected_V = exact(torch.tensor([prompt])).logits[0, -1]
    own = float((rough(torch.tensor([prompt])).logits[0, -1].float() - expected_V).abs().max())
    model = cuda.put(rough)
    decoder = PackedDecoder(model, bank(model), cache_bytes=CACHE_BYTES, tokens_per_pass=32)
    found_V = decoder.probe(prompt, prefix_length=50).float().cpu()
    assert float((found_V - expected_V).abs().max()) < 2 * own


def grammar(sampling: SamplingOptions, prefix: str) -> BatchRow:
    compiler = GrammarCompiler(byte_tokenizer(), VOCABULARY, [258])
    constraint = compiler.constraint({"type": "json_object"})
    for token in byte_tokenizer().encode(prefix):
        constraint.advance(token)
    return BatchRow([1], 9, sampling=sampling, constraint=constraint)


def sampled_rows() -> list[BatchRow]:
    drawn = [SamplingOptions(temperature=0.7, top_p=0.9, seed=1), SamplingOptions(temperature=1.0, top_k=5, seed=2)]
    drawn += [SamplingOptions(temperature=1.0, seed=3), SamplingOptions()]
    plain = [BatchRow([1], 9, sampling=options) for options in drawn]
    return [*plain, *(grammar(options, '{\n  "') for options in drawn[:3])]


def tokens(decisions: Sequence[Decision]) -> list[int]:
    return [decision.token_ids[0] for decision in decisions]


@pytest.mark.parametrize(("kind", "reads"), [("cuda", 1), ("mps", 2)])
def test_greedy_drawn_and_constrained_rows_are_read_together(kind: str, reads: int) -> None:
    logits_B_V = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    expected = tokens(decide(logits_B_V, sampled_rows()))
    with fake_device(kind) as device:
        assert tokens(decide(DeviceTensor(logits_B_V), sampled_rows())) == expected
    assert len(device.reads) == reads


def test_what_the_grammar_refuses_is_chosen_again_with_one_read_for_all_rows(cuda: FakeDevice) -> None:
    logits_B_V = torch.zeros(3, VOCABULARY)
    logits_B_V[:, byte_tokenizer().encode("x")] = 1.0
    expected, found = (
        tokens(decide(logits, [grammar(SamplingOptions(), "{") for _ in range(3)]))
        for logits in (logits_B_V, DeviceTensor(logits_B_V))
    )
    assert found == expected
    assert len(cuda.reads) == 2


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_scores_of_all_rows_are_one_read_more(kind: str) -> None:
    rows = [BatchRow([1], 9, sampling=SamplingOptions(logprobs=count)) for count in (0, 3, 2)]
    logits_B_V = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    with fake_device(kind) as device:
        scores = [decision.scores for decision in decide(DeviceTensor(logits_B_V), rows)]
    assert scores == [decision.scores for decision in decide(logits_B_V, copy.deepcopy(rows))]
    assert len(device.reads) == 2


def prefix_attention(chunks: Sequence[int], kind: AttentionKind, dtype: torch.dtype, wrap: Any) -> torch.Tensor:
    """Attention [T, H, D] of a prefix that is computed in chunks; 4 heads, 2 of keys."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, sum(chunks), 16, generator=numbers).to(dtype) for heads in (4, 2, 2))
    data, start, parts = PrefixTensors(sum(chunks)), 0, []
    for size in chunks:
        part = slice(start, start + size)
        parts.append(PrefixPass(data, start).attend(0, wrap(q[:, part]), wrap(k[:, part]), wrap(v[:, part]), kind))
        start += size
    return torch.cat(parts)


def densely(kind: AttentionKind, tokens: int) -> torch.Tensor:
    """The same under a dense mask."""
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, tokens, 16, generator=numbers) for heads in (4, 2, 2))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = (distance >= 0) & (distance < (kind.window or tokens))
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kind.scale).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 10])
def test_a_prefix_in_chunks_is_attended_to_as_under_a_dense_mask(window: int | None) -> None:
    kind = AttentionKind(0.25, window)
    found = prefix_attention((7, 20, 5), kind, torch.float32, lambda tensor: tensor)
    torch.testing.assert_close(found, densely(kind, 32))


def test_no_scores_of_a_long_prefix_are_held_in_half_precision_on_cuda(cuda: FakeDevice) -> None:
    kind = AttentionKind(0.25)
    found = prefix_attention((512, 64), kind, torch.bfloat16, DeviceTensor)
    assert cuda.largest <= 4 * 576 * 16 < 4 * 64 * 576
    np.testing.assert_allclose(found.float().cpu().numpy(), densely(kind, 576).numpy(), atol=0.05)


def test_tensors_of_two_devices_are_found(cuda: FakeDevice) -> None:
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        _ = DeviceTensor(torch.ones(3)) + torch.ones(3)
