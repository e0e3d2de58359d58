"""What must not hang, abort or hit others: streams given up, callbacks that ask, exits, forks, NaN."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import wait_for
from forking import Programs, programs_that_import
from small_models import save_adapter
from tiny_requests import ask

import bettertogether.engines.local.packed_decoder as packed_decoder
from bettertogether import LoRAConfig, TrainingConfig, local_lm
from bettertogether.engines import TrainingProgress, TrainingRow, TransformersEngine
from bettertogether.engines.answers import SamplingOptions
from bettertogether.engines.local.decoder import BatchRow
from bettertogether.engines.local.sampling import decide
from bettertogether.errors import EngineBusyError, EngineClosedError, NumericsError, UnknownAdapterError

ROWS = [TrainingRow(({"role": "user", "content": f"q{number}"},), "yes") for number in range(4)]
SHORT: dict[str, Any] = {"lora": LoRAConfig(rank=2), "training": TrainingConfig(epochs=1, dtype="float32")}


def text(engine: TransformersEngine, *args: Any, **config: Any) -> str | None:
    return engine.complete(ask(*args, **config)).text


def in_time(work: Any, timeout_s: float = 60.0) -> Any:
    """What `work` returns; fails where it hangs."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert results, "it hangs"
    return results[0]


def test_streams_that_are_given_up_with_their_loop_trouble_no_one(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine._scheduler._eos_ids = frozenset()
    alone = text(engine, "bystander", max_tokens=150)

    async def give_up(number: int) -> None:
        async for event in engine.asynchronous.stream(ask(f"stream {number}", max_tokens=3000)):
            if event.type == "delta":
                return

    with ThreadPoolExecutor(4) as pool, caplog.at_level(logging.ERROR):
        bystanders = [pool.submit(text, engine, "bystander", max_tokens=150) for _ in range(8)]
        for number in range(10):
            in_time(lambda number=number: asyncio.run(give_up(number)) or True)
        assert [future.result(timeout=60) for future in bystanders] == [alone] * 8
    assert caplog.text == ""
    assert in_time(lambda: text(engine, max_tokens=2)) is not None
    assert not engine._scheduler._running


@pytest.mark.parametrize("streamed", [False, True])
def test_the_event_loop_stays_free_while_a_prompt_is_made_ready(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    answer, side, loop_went_on = text(engine), engine.asynchronous, threading.Event()
    prompt_tokens = engine.prompt_tokens

    def slow(messages: Any) -> list[int]:
        assert loop_went_on.wait(10)
        return prompt_tokens(messages)

    async def answered() -> str | None:
        asyncio.get_running_loop().call_later(0.01, loop_went_on.set)
        if not streamed:
            return (await side.complete(ask())).text
        return "".join([event.delta.text async for event in side.stream(ask()) if event.type == "delta"])

    monkeypatch.setattr(engine, "prompt_tokens", slow)
    assert asyncio.run(answered()) == answer


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_that_is_given_up_before_its_prompt_is_ready_is_not_sent(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    given_up, side = threading.Event(), engine.asynchronous
    prompt_tokens = engine.prompt_tokens

    def slow(messages: Any) -> list[int]:
        assert given_up.wait(10)
        return prompt_tokens(messages)

    async def give_up() -> None:
        waiting = anext(aiter(side.stream(ask()))) if streamed else side.complete(ask())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.05)
        given_up.set()

    monkeypatch.setattr(engine, "prompt_tokens", slow)
    asyncio.run(give_up())
    assert engine.counters()["requests"] == 0


def test_awaiting_no_longer_than_a_time_takes_the_request_back(engine: TransformersEngine) -> None:
    engine._scheduler._eos_ids = frozenset()
    text(engine)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.asynchronous.complete(ask(max_tokens=4000)), 0.05)

    asyncio.run(impatient())
    assert in_time(lambda: text(engine, max_tokens=2)) is not None
    assert not engine._scheduler._running


def test_removing_an_adapter_fails_its_requests_at_once_and_no_pass_of_the_others(
    engine: TransformersEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine._scheduler._eos_ids = frozenset()
    name = engine.add_adapter(save_adapter(tmp_path / "a", 1))
    alone = text(engine, "bystander", max_tokens=150)
    with ThreadPoolExecutor(8) as pool, caplog.at_level(logging.WARNING):
        removed = pool.submit(text, engine, "q", name, max_tokens=3000)
        bystanders = [pool.submit(text, engine, "bystander", max_tokens=150) for _ in range(7)]
        assert wait_for(lambda: any(row.adapter for row in list(engine._scheduler._running)))
        engine.remove_adapter(name)
        with pytest.raises(UnknownAdapterError, match=name):
            removed.result(timeout=60)
        assert [future.result(timeout=60) for future in bystanders] == [alone] * 7
    assert caplog.text == ""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_row_alone(temperature: float, number: float) -> None:
    logits_B_V = torch.arange(12.0, dtype=torch.float16).reshape(3, 4)
    logits_B_V[1, 2] = number
    rows = [BatchRow([1], 4, sampling=SamplingOptions(temperature=temperature, seed=0, top_k=1)) for _ in range(3)]
    decisions = decide(logits_B_V, rows)
    assert [decision.token_ids for decision in decisions] == [(3,), (), (3,)]
    assert isinstance(decisions[1].error, NumericsError)
    assert "dtype='float16'" in str(decisions[1].error)


def test_a_request_whose_logits_are_no_numbers_is_an_error_and_its_neighbours_are_answered(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {number: text(engine, f"q{number}") for number in range(8)}
    bad = engine.prompt_tokens(engine.messages(ask("q3")))

    def overflowing(logits_B_V: torch.Tensor, rows: Sequence[BatchRow]) -> Any:
        logits_B_V = logits_B_V.clone()
        for place, row in enumerate(rows):
            if row.prompt_ids == bad:
                logits_B_V[place] = float("nan")
        return decide(logits_B_V, rows)

    monkeypatch.setattr(packed_decoder, "decide", overflowing)
    with ThreadPoolExecutor(8) as pool:
        futures = {number: pool.submit(text, engine, f"q{number}") for number in range(8)}
        with pytest.raises(NumericsError, match="dtype='float32'"):
            futures.pop(3).result(timeout=60)
        assert {number: future.result(timeout=60) for number, future in futures.items()} == {
            number: answer for number, answer in expected.items() if number != 3
        }


@pytest.mark.parametrize("fused", [False, True])
def test_a_callback_may_ask_the_base_and_adapters_while_another_is_trained(
    engine: TransformersEngine, tmp_path: Path, fused: bool
) -> None:
    adapter = engine.add_adapter(save_adapter(tmp_path / "adapter", 1))
    before = [text(engine), text(engine, model=adapter)]
    answers: list[Any] = []

    def asking(line: TrainingProgress) -> None:
        answers.append([text(engine), text(engine, model=adapter)])
        with ThreadPoolExecutor(2) as pool:
            answers.append(list(pool.map(lambda model: text(engine, model=model), ["local/tiny", adapter])))

    options = {**SHORT, "lora": LoRAConfig(rank=2, dropout=0.0 if fused else 0.1)}
    result = in_time(lambda: engine.finetune(ROWS, folder=tmp_path, on_progress=asking, **options))
    silent = engine.finetune(ROWS, folder=tmp_path, **options)
    assert answers == [before] * (2 * len(result.history))
    assert result.model == silent.model
    assert [text(engine), text(engine, model=adapter)] == before


def test_an_adapter_that_is_added_during_a_training_is_served(engine: TransformersEngine, tmp_path: Path) -> None:
    text(engine)
    folder, names = save_adapter(tmp_path / "adapter", 1), []
    train_adapter = TransformersEngine._reporting

    def adding(self: TransformersEngine, model: Any, on_progress: Any) -> Any:
        report = train_adapter(self, model, on_progress)

        def add(line: TrainingProgress) -> None:
            names.append(self.add_adapter(folder))
            report(line)

        return add

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_reporting", adding)
        engine.finetune(ROWS, folder=tmp_path, **SHORT)
    after = text(engine, model=names[0])
    other = TransformersEngine(engine.dump_state()["model"])
    assert after == text(other, model=other.add_adapter(folder)) != text(other)
    other.close()


def test_a_callback_that_asks_for_another_training_is_an_error(engine: TransformersEngine, tmp_path: Path) -> None:
    def nested(line: TrainingProgress) -> None:
        engine.finetune(ROWS, folder=tmp_path, **SHORT)

    def work() -> BaseException:
        with pytest.raises(EngineBusyError, match="has ended") as caught:
            engine.finetune(ROWS, folder=tmp_path, on_progress=nested, **SHORT)
        return caught.value

    in_time(work)
    assert engine.finetune(ROWS, folder=tmp_path, **SHORT).model


def test_trainings_of_two_threads_come_one_after_the_other(engine: TransformersEngine, tmp_path: Path) -> None:
    def train(number: int) -> str:
        lines: list[str | None] = []
        rows = [TrainingRow(row.messages, f"{row.completion} {number}") for row in ROWS]
        return engine.finetune(
            rows, folder=tmp_path / str(number), on_progress=lambda line: lines.append(text(engine)), **SHORT
        ).model

    with ThreadPoolExecutor(2) as pool:
        together = [future.result(timeout=120) for future in [pool.submit(train, number) for number in (0, 1)]]
    assert together == [train(0), train(1)]


def test_closing_an_engine_ends_its_training_at_the_next_step(engine: TransformersEngine, tmp_path: Path) -> None:
    def work() -> bool:
        with pytest.raises(EngineClosedError, match="closed"):
            engine.finetune(
                ROWS,
                folder=tmp_path,
                on_progress=lambda line: engine.close(),
                lora=LoRAConfig(rank=2),
                training=TrainingConfig(epochs=3, dtype="float32"),
            )
        return True

    assert in_time(work)


SCRIPT = """
import os, threading, time
os.environ["BETTERTOGETHER_CACHE"] = {scratch!r}
os.dup2(os.open({scratch!r} + "/errors", os.O_WRONLY | os.O_CREAT), 2)
from dspy.lm15 import Config, Message, Request
from bettertogether import LoRAConfig, TrainingConfig
from bettertogether.engines import TrainingRow, TransformersEngine
engine = TransformersEngine({folder!r})
engine._scheduler._eos_ids = frozenset()
ask = lambda text, count: Request("local/tiny", (Message.user(text),), config=Config(max_tokens=count))
engine.complete(ask("warm", 1))
rows = [TrainingRow(engine.messages(ask(f"q{{n}}", 1)), "x" * 50) for n in range(16)]
def train():
    engine.finetune(rows, training=TrainingConfig(epochs=400, dtype="float32"), lora=LoRAConfig(rank=2))
def later(*works):
    for work in works: threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)
print("READY", flush=True)
{body}
"""
BODIES = {
    "plain": ("later(*[lambda n=n: engine.complete(ask(str(n), 3500)) for n in range(8)])", 0),
    "error": ("later(lambda: engine.complete(ask('q', 3500))); raise ValueError('mine')", 1),
    "training": ("later(train)", 0),
    "training about to begin": ("threading.Thread(target=train, daemon=True).start()", 0),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with programs_that_import("bettertogether.engines.local.transformers_engine") as running:
        yield running


def start(programs: Programs, folder: Path, scratch: Path, body: str) -> int:
    """The number of the process of a program that goes on after `SCRIPT`."""
    number = programs.start(SCRIPT.format(folder=str(folder), scratch=str(scratch), body=body))
    assert programs.line() == "READY"
    return number


@pytest.mark.parametrize("name", BODIES)
def test_a_program_that_ends_while_the_engine_works_ends_with_its_own_exit_code(
    programs: Programs, folder: Path, tmp_path: Path, name: str
) -> None:
    body, code = BODIES[name]
    start(programs, folder, tmp_path, body)
    assert programs.exit_code() == code
    assert "terminate called" not in (tmp_path / "errors").read_text()


@pytest.mark.parametrize(
    "body",
    ["engine.complete(ask('q', 3500))", "list(engine.stream(ask('q', 3500)))"],
    ids=["complete", "stream"],
)
def test_ctrl_c_ends_a_program_as_it_ends_any_other(
    programs: Programs, folder: Path, tmp_path: Path, body: str
) -> None:
    number = start(programs, folder, tmp_path, f"while True: {body}")
    time.sleep(0.5)
    os.kill(number, signal.SIGINT)
    # A shell shows a death by SIGINT as exit code 130.
    assert programs.exit_code() == -signal.SIGINT
    assert (tmp_path / "errors").read_text().strip().splitlines()[-1] == "KeyboardInterrupt"


def _in_child(folder: Path, lm: Any, queue: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, work in (
        ("inherited", lambda: lm("hello")),
        ("finetune", lambda: lm.engine.finetune(ROWS, folder=tmp_path, **SHORT)),
        ("add", lambda: lm.engine.add_adapter(tmp_path)),
        ("close", lambda: lm.engine.close()),
        ("fresh", lambda: local_lm(folder, cache=False, max_tokens=8)("hello")),
        ("fresh trains", lambda: local_lm(folder).engine.finetune(ROWS, folder=tmp_path, **SHORT).model),
    ):
        try:
            queue.put((name, work()))
        except Exception as error:
            queue.put((name, f"{type(error).__name__}: {error}"))


def fork_and_compare(folder: Path, tmp_path: Path) -> None:
    """What a forked child can and can't do with its parent's engine and with its own."""
    lm = local_lm(folder, cache=False, max_tokens=8)
    answer = lm("hello")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(folder, lm, queue, tmp_path))
    child.start()
    found = dict(queue.get(timeout=120) for _ in range(6))
    child.join(60)
    assert child.exitcode == 0
    assert all("local_lm(...)" in found[name] for name in ("inherited", "finetune", "add"))
    assert (found["close"], found["fresh"]) == (None, answer)
    assert found["fresh trains"] == lm.engine.finetune(ROWS, folder=tmp_path / "parent", **SHORT).model
    assert lm("hello") == answer
    lm.engine.close()


def test_a_forked_child_gets_an_engine_of_its_own(programs: Programs, folder: Path, tmp_path: Path) -> None:
    # Of a process that has computed gradients and seen a GPU, or a test's fake one, torch lets no child compute any.
    folders = f"Path({str(folder)!r}), Path({str(tmp_path)!r})"
    programs.start(f"from pathlib import Path; from test_robustness import *; fork_and_compare({folders})")
    assert programs.exit_code() == 0


def test_the_name_of_a_base_is_the_same_in_another_process(programs: Programs, folder: Path) -> None:
    lm = local_lm(folder)
    programs.start(f"from bettertogether import local_lm; print(local_lm({str(folder)!r}).model)")
    assert programs.line() == lm.model
    assert programs.exit_code() == 0
    lm.engine.close()
