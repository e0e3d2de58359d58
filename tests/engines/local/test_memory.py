"""Keys and values stay within their bound, as many requests as it allows run together, and none stands still."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dspy.lm15 import Config, Message, Request
from small_models import PACKED, bank, decode, generated, prompts, tiny_model

from bettertogether import TrainingConfig
from bettertogether.engines import TransformersEngine, loading
from bettertogether.engines.local import packed_decoder, transformers_engine
from bettertogether.engines.local.decoder import BatchRow, Decision
from bettertogether.engines.local.job import Job
from bettertogether.engines.local.packed_decoder import PackedDecoder
from bettertogether.engines.local.scheduler import Scheduler
from bettertogether.engines.local.text_stream import TextStream

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are long with more than 40 tokens of their own."""
    monkeypatch.setattr(packed_decoder, "LONG_ROW", 40)
    monkeypatch.setattr(packed_decoder, "LONGEST_SLOT", 64)


class Watched(PackedDecoder):
    """Keeps how many rows each step had, and for how many tokens memory was held at most."""

    def __init__(self, model: Any, tokens: int, **options: Any) -> None:
        super().__init__(model, bank(model), cache_bytes=tokens * TOKEN_BYTES, **options)
        self.steps: list[int] = []
        self.most_tokens = 0

    def step(self, rows: Sequence[BatchRow]) -> list[Decision]:
        decisions = super().step(rows)
        self.steps.append(len(rows))
        self.most_tokens = max(self.most_tokens, self.tokens_held())
        return decisions

    def tokens_held(self) -> int:
        there = sum(tensor.nbytes for tensor in (*self._slots.keys, *self._slots.values))
        there += sum(prefix.data.nbytes for prefix in self._prefixes._prefixes)
        promised = self._prefixes.size_bytes + self._prefixes.reserved_bytes
        assert there <= promised
        return promised // TOKEN_BYTES


def scheduled(decoder: PackedDecoder, rows: Sequence[BatchRow]) -> list[list[int]]:
    """The answers, where rows may be postponed."""
    scheduler = Scheduler(
        lambda: decoder,
        eos_ids=frozenset(),
        max_batch_size=64,
        out_of_memory=lambda error: False,
        check_adapter=lambda name: None,
    )
    jobs = [Job(row, TextStream(lambda ids: "")) for row in rows]
    for job in jobs:
        scheduler.submit(job)
    for job in jobs:
        job.future.result(timeout=60)
    scheduler.close()
    return [row.output_ids for row in rows]


def long_rows(number: int, new_tokens: int = 3) -> list[BatchRow]:
    """Prompts of 100 tokens in common and 150 of their own."""
    shared = prompts(1, 100, own=1)[0][:100]
    return [BatchRow(shared + prompts(1, 150, own=1, seed=9 + place)[0], new_tokens) for place in range(number)]


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gemma2"])
def test_long_rows_run_together_and_hold_what_they_share_once(family: str) -> None:
    model, rows = tiny_model(PACKED[family]), long_rows(4)
    decoder = Watched(model, 4000)
    decode(decoder, rows)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, 3) for row in rows]
    assert max(decoder.steps) == 4
    assert decoder._prefixes.size_bytes == (100 + 4 * 150) * TOKEN_BYTES


def test_as_many_rows_run_as_there_is_memory_for() -> None:
    model, rows = tiny_model(), long_rows(6)
    decoder = Watched(model, tokens := 100 + 3 * 150 + 4 * 64)
    assert scheduled(decoder, rows) == [generated(model, row.prompt_ids, 3) for row in rows]
    assert max(decoder.steps) == 3
    assert decoder.most_tokens <= tokens


def test_one_long_answer_leaves_the_others_slots_short_and_all_are_freed() -> None:
    model = tiny_model()
    texts = prompts(8, 0, own=10)
    rows = [BatchRow(text, 75 if place == 3 else 3) for place, text in enumerate(texts)]
    decoder = Watched(model, 100_000)
    decode(decoder, rows)
    assert [row.output_ids for row in rows] == [generated(model, row.prompt_ids, row.max_new_tokens) for row in rows]
    assert decoder.most_tokens <= 8 * 64 + sum(map(len, texts)) + 75
    assert decoder.tokens_held() * TOKEN_BYTES == decoder._prefixes.size_bytes


def test_rows_for_which_memory_runs_out_wait_and_go_on_where_they_were() -> None:
    model = tiny_model()
    rows = [BatchRow(text, 75) for text in prompts(3, 0, own=30)]
    decoder = Watched(model, tokens := 4 * 64 + 100)
    assert scheduled(decoder, rows) == [generated(model, row.prompt_ids, 75) for row in rows]
    assert max(decoder.steps) == 3
    assert decoder.most_tokens <= tokens


def test_more_forced_tokens_than_a_slot_has_room_for_go_through_in_parts() -> None:
    model = tiny_model()
    decoder, row = Watched(model, 100_000), BatchRow(prompts(1, 0, own=30)[0], 100)
    decoder.admit([row])
    row.output_ids += [*decoder.step([row])[0].token_ids, *range(50)]
    expected = generated(model, row.prompt_ids + row.output_ids, 1)
    while not (decision := decoder.step([row])[0]).token_ids:
        pass
    assert list(decision.token_ids) == expected


def test_the_row_that_waits_longest_is_not_overtaken_by_shorter_ones() -> None:
    decoder = Watched(tiny_model(), 600)
    first, long, short = *prompts(1, 60, own=1), *prompts(1, 500, own=1, seed=1), *prompts(1, 20, own=1, seed=2)
    assert len(decoder.admit([BatchRow(first, 20)])) == 1
    assert decoder.admit([BatchRow(long, 20), BatchRow(short, 20)]) == []


def test_a_running_row_gets_its_token_in_each_step_while_long_prompts_come_in() -> None:
    model = tiny_model()
    decoder = Watched(model, 100_000, tokens_per_pass=32)
    running, *late = [BatchRow(prompts(1, 20, own=1, seed=1)[0], 30), *long_rows(3)]
    decoder.admit([running])
    running.output_ids += decoder.step([running])[0].token_ids
    waiting = [running, *decoder.admit(late)]
    while not late[-1].output_ids:
        decisions = decoder.step(waiting)
        assert len(decisions[0].token_ids) == 1
        for row, decision in zip(waiting, decisions, strict=True):
            row.output_ids += decision.token_ids
    assert decoder.counters()["forward_passes"] == 1 + 2 * (4 + 3 * 5)
    assert running.output_ids == generated(model, running.prompt_ids, len(running.output_ids))


def test_the_prompt_of_a_row_that_is_gone_is_not_computed() -> None:
    decoder = Watched(tiny_model(), 100_000)
    gone, stays = long_rows(2)
    assert len(decoder.admit([gone, stays])) == 2
    decoder.release(gone)
    for _ in range(2):
        decisions = decoder.step([stays])
    assert len(decisions[0].token_ids) == 1
    assert decoder._prefixes.size_bytes == (100 + 150) * TOKEN_BYTES


@pytest.mark.parametrize("training", [TrainingConfig(num_processes=2), TrainingConfig(quantize_base="4bit")])
def test_the_base_is_freed_while_other_processes_or_a_quantized_copy_train_and_answers_all_the_same(
    engine: TransformersEngine, training: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> str | None:
        return engine.complete(Request("local/tiny", (Message.user("Hello"),), config=Config(max_tokens=4))).text

    def quantized(*_: Any) -> str:
        held.append(engine._model)
        return "in 4 bits"

    def train(_: Any, __: Any, model: Any, ___: Any, on_progress: Any) -> Any:
        held.append(engine._model)
        on_progress("line")
        held.append(engine._model)
        return model

    held: list[Any] = []
    answers = [answer()]
    monkeypatch.setattr(loading, "four_bit_model", quantized)
    monkeypatch.setattr(transformers_engine, "train", train)
    job: Any = SimpleNamespace(training=training)
    trained: Any = engine._train(job, lambda line: answers.append(answer()))
    assert trained == ("in 4 bits" if training.quantize_base else None)
    assert set(held) == {None}
    assert [*answers, answer()] == answers[:1] * 3


def test_on_a_gpu_where_vllm_is_installed_the_log_says_that_it_is_faster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("bettertogether.engines.local.transformers_engine.is_installed", lambda name: True)
    TransformersEngine(folder, device="cuda")
    assert "vllm_lm(...) in place of local_lm(...)" in caplog.text


def test_a_closed_engine_gives_back_the_memory_of_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cpu", "cuda"):
        engine = TransformersEngine(folder, device=device)
        monkeypatch.setattr(transformers_engine, "give_back_memory", lambda device=device: given.append(device))
        engine.close()
    assert given == ["cuda"]
