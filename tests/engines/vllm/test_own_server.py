"""A vLLM server of our own: started, stopped for a training, ended, closed, and whose it is."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import TransportError
from fakes import wait_for
from running_vllm import FAKE
from small_models import save_adapter
from vllm_requests import request, seen, told, train

from bettertogether.engines import VLLMEngine
from bettertogether.errors import ConfigError, EngineClosedError, MissingExtraError, ModelError
from bettertogether.training.config import LoRAConfig, TrainingConfig


def test_the_server_is_stopped_for_a_training_and_serves_its_adapter_after(alone: VLLMEngine, tmp_path: Path) -> None:
    before = alone.complete(request(alone)).text
    process = alone.server.process
    assert process is not None
    states: list[int | None] = []
    name = train(alone, tmp_path, on_progress=lambda line: states.append(process.exit_code))
    assert states
    assert None not in states
    assert alone.complete(request(alone)).text == before
    assert alone.complete(request(alone, model=name)).text != before
    assert alone.server.address()[1] == 2


def test_the_server_may_run_on_while_an_adapter_is_trained(folder: Path, tmp_path: Path) -> None:
    engine = VLLMEngine(folder, command=FAKE, stop_while_training=False)
    engine.complete(request(engine))
    engine.complete(request(engine, model=train(engine, tmp_path)))
    assert engine.server.address()[1] == 1
    engine.close()


def test_a_rank_that_the_server_does_not_take_is_refused_before_training(alone: VLLMEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora has rank 128, and the server takes 64 at most"):
        train(alone, tmp_path, lora=LoRAConfig(rank=128))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoRAConfig(rank=128)}, "lora has rank 128, and the server takes 64 at most"),
        ({"lora": LoRAConfig(target_modules="nope")}, "no layer has such a name"),
        ({"training": TrainingConfig(quantize_base="4bit")}, "needs a CUDA device"),
    ],
)
def test_what_it_can_not_train_is_known_before_there_are_rows(
    alone: VLLMEngine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        alone.check_training(**{"lora": LoRAConfig(), "training": TrainingConfig(), **options})
    assert alone.server.process is None


def test_a_server_that_ended_is_an_error_with_its_log_and_the_next_request_starts_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_DIES_AFTER", "2")
    engine = VLLMEngine(folder, command=FAKE)
    answer = engine.complete(request(engine)).text
    with pytest.raises(TransportError, match="No answer from the vLLM server") as error:
        engine.complete(request(engine))
    assert wait_for(lambda: bool(engine.server.why_gone()))
    assert "code 3" in engine.server.why_gone() or "code 3" in str(error.value)
    assert "out of memory, said the fake" in engine.server.why_gone()
    assert engine.complete(request(engine)).text == answer
    engine.close()


def test_a_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "no room for the weights")
    engine = VLLMEngine(folder, command=FAKE)
    with pytest.raises(ModelError, match=r"(?s)ended with code 1 before.*no room for the weights"):
        engine.complete(request(engine))
    engine.close()


def test_a_program_that_is_not_there_is_an_error_with_the_ways_out(folder: Path) -> None:
    engine = VLLMEngine(folder, command="no-such-vllm")
    with pytest.raises(MissingExtraError, match=r"pip install 'bettertogether\[vllm\]'"):
        engine.complete(request(engine))
    engine.close()


def test_options_that_the_engine_sets_itself_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'port'"):
        VLLMEngine(folder, server_options={"port": 8000})
    with pytest.raises(ConfigError, match="the server runs already"):
        VLLMEngine(folder, url="http://127.0.0.1:1", server_options={"seed": 1})


def test_a_closed_engine_says_so(folder: Path) -> None:
    engine = VLLMEngine(folder, command=FAKE)
    engine.close()
    with pytest.raises(EngineClosedError, match="was closed"):
        engine.complete(request(engine))


def test_closing_ends_those_who_wait_for_their_turn_and_starts_no_other_server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_PAUSES", "60")
    engine = VLLMEngine(folder, command=FAKE, mixed_batches=False)
    adapter = engine.add_adapter(save_adapter(tmp_path / "adapter", 0))
    engine.server.address()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(engine.complete, request(engine))
        assert wait_for(lambda: engine._gate.inside == 1)
        waiting = pool.submit(engine.complete, request(engine, model=adapter))
        assert wait_for(lambda: len(engine._gate._waiting) == 1)
        engine.close()
        with pytest.raises((TransportError, EngineClosedError)):
            asked.result(60)
        with pytest.raises(EngineClosedError, match="was closed"):
            waiting.result(60)
    assert (engine.server.process, engine.server.starts) == (None, 1)


@pytest.fixture
def slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMEngine]:
    """An engine whose server takes 5 * 0.5 s for a stream."""
    monkeypatch.setenv("FAKE_VLLM_PAUSES", "0.5")
    engine = VLLMEngine(folder, command=FAKE)
    yield engine
    engine.close()


def test_a_stream_that_takes_too_long_for_an_event_loop_times_out_and_leaves_the_engine_free(slow: VLLMEngine) -> None:
    async def take() -> None:
        async for _ in slow.asynchronous.stream(request(slow)):
            pass

    slow.complete(request(slow))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(take(), 0.8))
    assert wait_for(lambda: slow._gate.inside == 0, seconds=0.6)


def test_a_stream_that_is_never_taken_to_its_end_keeps_no_training_waiting(slow: VLLMEngine, tmp_path: Path) -> None:
    stream = slow.stream(request(slow))
    assert [next(stream).type, next(stream).type] == ["start", "delta"]
    train(slow, tmp_path)
    assert [event.type for event in stream][-1] == "end"


def test_a_stream_that_is_given_up_is_broken_off(slow: VLLMEngine) -> None:
    stream = slow.stream(request(slow))
    next(stream)
    next(stream)
    assert isinstance(stream, Generator)
    stream.close()
    assert wait_for(lambda: slow._gate.inside == 0, seconds=0.6)


def test_an_awaited_answer_that_is_cancelled_is_broken_off_and_its_place_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_PAUSES", "60")
    engine = VLLMEngine(folder, command=FAKE, concurrency=1)

    async def give_up(asked: int) -> None:
        answer = asyncio.ensure_future(engine.complete_async(request(engine)))
        assert await asyncio.to_thread(wait_for, lambda: len(seen(engine)) == asked)
        answer.cancel()
        assert await asyncio.to_thread(wait_for, lambda: told(engine) == ["broken off"] * asked)

    for asked in (1, 2):
        asyncio.run(give_up(asked))
    assert wait_for(lambda: engine._gate.inside == 0)
    engine.close()


def test_those_who_wait_for_a_server_that_can_not_start_share_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "no room for the weights")
    engine = VLLMEngine(folder, command=FAKE)

    def ask(number: int) -> str:
        with pytest.raises(ModelError) as caught:
            engine.complete(request(engine, str(number)))
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert engine.server.starts == 1
    monkeypatch.delenv("FAKE_VLLM_FAILS")
    assert engine.complete(request(engine)).text
    engine.close()
