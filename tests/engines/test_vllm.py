"""The vLLM engine against a stand-in for the server, in processes of its own; and against the real one where the
environment names it (BETTERTOGETHER_TEST_VLLM: the program, BETTERTOGETHER_TEST_MODEL: a SmolLM2-135M-Instruct)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dspy
import httpx
import pytest
from dspy.lm15 import Config, ContextLengthError, Message, Request, ServerError, StreamDeltaEvent, TransportError
from fakes import wait_for

from bettertogether import vllm_lm
from bettertogether.engines import VLLMEngine
from bettertogether.engines.base import TrainingRow
from bettertogether.engines.vllm_server import free_port
from bettertogether.errors import ConfigError, EngineClosedError, MissingExtraError, ModelError
from bettertogether.testing import EngineContract
from bettertogether.training.config import LoRAConfig, TrainingConfig

FAKE = (sys.executable, str(Path(__file__).with_name("fake_vllm.py")))
REAL = os.environ.get("BETTERTOGETHER_TEST_VLLM")
MODEL = os.environ.get("BETTERTOGETHER_TEST_MODEL")
SHORT = TrainingConfig(epochs=1, learning_rate=1e-2)


class TestVLLMEngine(EngineContract):
    training = SHORT

    @pytest.fixture
    def engine(self, served: VLLMEngine) -> VLLMEngine:
        return served


@pytest.mark.skipif(not (REAL and MODEL), reason="BETTERTOGETHER_TEST_VLLM and _TEST_MODEL name no vLLM and no model")
class TestRealVLLM(EngineContract):
    lora = LoRAConfig(rank=8)
    training = SHORT

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[VLLMEngine]:
        options = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True, "max_lora_rank": 16}
        made = VLLMEngine.shared(str(MODEL), command=str(REAL), server_options=options, stop_while_training=False)
        yield made
        made.close()

    def test_an_answer_follows_the_grammar(self, engine: VLLMEngine) -> None:
        class Colour(dspy.Signature):
            thing: str = dspy.InputField()
            colour: Literal["red", "blue"] = dspy.OutputField()

        predict = dspy.Predict(Colour)
        predict.set_lm(vllm_lm(str(MODEL), cache=False, engine_options=dict(engine._options)))
        with dspy.context(adapter=dspy.JSONAdapter()):
            prediction = predict(thing="a ripe strawberry")
        assert prediction.colour in ("red", "blue")


def test_the_base_and_adapters_share_no_batch_where_vllm_mixes_them_up(served: VLLMEngine, folder: Path) -> None:
    """vllm-project/vllm#48421: on the CPU, base answers in a batch with an adapter's come out as the adapter's."""
    assert served._kind(f"local/{served.base_name}") != served._kind("an adapter")
    elsewhere = VLLMEngine(folder, command=FAKE, mixed_batches=True)
    assert elsewhere._kind(f"local/{served.base_name}") == elsewhere._kind("an adapter")
    elsewhere.close()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine.shared(folder, command=FAKE)
    yield engine
    engine.close()


@pytest.fixture
def alone(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(folder, command=FAKE)
    yield engine
    engine.close()


def request(engine: VLLMEngine, word: str = "red", model: str | None = None, **config: Any) -> Request:
    message = Message.user(f"What is {word}?")
    return Request(model or f"local/{engine.base_name}", (message,), config=Config(**{"max_tokens": 8, **config}))


def seen(engine: VLLMEngine) -> list[dict[str, Any]]:
    return httpx.get(f"{engine._server.address()[0]}/seen").json()


def rows(engine: VLLMEngine) -> list[TrainingRow]:
    return [TrainingRow(engine.messages(request(engine, word)), "a colour") for word in ("red", "blue")]


def train(engine: VLLMEngine, folder: Path, **options: Any) -> str:
    options = {"lora": LoRAConfig(rank=4), "training": SHORT, **options}
    return engine.finetune(rows(engine), folder=folder, **options).model


def test_the_prompt_goes_out_as_the_tokens_that_training_sees(served: VLLMEngine) -> None:
    asked = request(served, "violet", seed=3, temperature=0.5, top_p=0.9, top_k=7, stop=("\n",))
    served.complete(asked)
    body = seen(served)[-1]
    assert body["prompt"] == served.prompt_tokens(served.messages(asked))
    assert served.completion_tokens("x")[-1] in body["stop_token_ids"]
    expected = {"model": f"local/{served.base_name}", "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    assert expected | {"seed": 3, "stop": ["\n"]} == {key: body[key] for key in (*expected, "seed", "stop")}


def test_greedy_is_asked_for_as_temperature_zero_alone(served: VLLMEngine) -> None:
    served.complete(request(served, temperature=0.7, top_k=1))
    assert {key: seen(served)[-1].get(key) for key in ("temperature", "top_p", "top_k")} == {
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
    }


def test_a_schema_goes_out_as_the_grammar_of_this_librarys_layout(served: VLLMEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    served.complete(request(served, response_format={"type": "json_schema", "schema": schema}))
    grammar = seen(served)[-1]["structured_outputs"]["grammar"]
    assert grammar.startswith("start:")
    assert r"{\n  \"a\": " in grammar


def test_log_probabilities_and_usage_come_back(served: VLLMEngine) -> None:
    response = served.complete(request(served, logprobs=2))
    assert response.logprobs is not None
    assert [(score.logprob, len(score.top)) for score in response.logprobs] == [(-0.5, 2)] * 5
    assert response.logprobs[0].top[0].token_id == response.logprobs[0].token_id
    assert (response.usage.output_tokens, response.usage.cache_read_tokens) == (5, 2)


def test_requests_of_an_event_loop_are_answered_together(served: VLLMEngine) -> None:
    async def ask() -> list[str | None]:
        asked = (served.asynchronous.complete(request(served, word)) for word in ("red", "blue"))
        return [response.text for response in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [served.complete(request(served, word)).text for word in ("red", "blue")]


def test_a_stream_of_an_event_loop_is_the_answer(served: VLLMEngine) -> None:
    async def ask() -> str:
        events = [event async for event in served.asynchronous.stream(request(served))]
        return "".join(e.delta.text for e in events if isinstance(e, StreamDeltaEvent))  # type: ignore[union-attr]

    assert asyncio.run(ask()) == served.complete(request(served)).text


def test_a_prompt_that_is_too_long_never_leaves(folder: Path) -> None:
    engine = VLLMEngine(folder, command=FAKE, server_options={"max_model_len": 64})
    with pytest.raises(ContextLengthError, match="takes 64 for prompt"):
        engine.complete(request(engine, "red " * 100))
    assert engine._server._process is None
    engine.close()


def test_the_server_is_stopped_for_a_training_and_serves_its_adapter_after(alone: VLLMEngine, tmp_path: Path) -> None:
    before = alone.complete(request(alone)).text
    process = alone._server._process
    assert process is not None
    states: list[int | None] = []
    name = train(alone, tmp_path, on_progress=lambda line: states.append(process.exit_code))
    assert states
    assert None not in states
    assert alone.complete(request(alone)).text == before
    assert alone.complete(request(alone, model=name)).text != before
    assert alone._server.address()[1] == 2


def test_the_server_may_run_on_while_an_adapter_is_trained(folder: Path, tmp_path: Path) -> None:
    engine = VLLMEngine(folder, command=FAKE, stop_while_training=False)
    engine.complete(request(engine))
    engine.complete(request(engine, model=train(engine, tmp_path)))
    assert engine._server.address()[1] == 1
    engine.close()


def test_a_rank_that_the_server_does_not_take_is_refused_before_training(alone: VLLMEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora has rank 128, and the server takes 64 at most"):
        train(alone, tmp_path, lora=LoRAConfig(rank=128))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_ended_is_an_error_with_its_log_and_the_next_request_starts_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_DIES_AFTER", "2")
    engine = VLLMEngine(folder, command=FAKE)
    answer = engine.complete(request(engine)).text
    with pytest.raises(TransportError, match="No answer from the vLLM server") as error:
        engine.complete(request(engine))
    assert wait_for(lambda: bool(engine._server.why_gone()))
    assert "code 3" in engine._server.why_gone() or "code 3" in str(error.value)
    assert "out of memory, said the fake" in engine._server.why_gone()
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


class Running:
    """A server that somebody else started."""

    def __init__(self, port: int, **environment: str) -> None:
        command = [*FAKE, "serve", "some/model", "--port", str(port)]
        self.process = subprocess.Popen(command, env={**os.environ, **environment})
        assert wait_for(lambda: self.answers(port), seconds=20)

    def answers(self, port: int) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_server_that_runs_already_is_used_under_its_own_name_and_found_again_after_a_restart(
    folder: Path, tmp_path: Path, port: int
) -> None:
    running = Running(port, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    lm = vllm_lm(folder, url=f"http://127.0.0.1:{port}/v1", cache=False)
    engine = lm.engine
    assert lm("What is red?")[0].startswith("w")
    assert seen(engine)[-1]["model"] == "some/model"
    name = train(engine, tmp_path)
    answer = engine.complete(request(engine, model=name)).text
    running.stop()
    running = Running(port, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    assert engine.complete(request(engine, model=name)).text == answer
    running.stop()
    running = Running(port, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    assert list(engine.stream(request(engine, model=name)))[-1].type == "end"
    engine.close()
    assert running.process.poll() is None
    running.stop()


def test_a_server_that_takes_no_adapters_is_an_error_that_says_how_to_start_it(
    folder: Path, tmp_path: Path, port: int
) -> None:
    running = Running(port)
    engine = VLLMEngine(folder, url=f"http://127.0.0.1:{port}")
    name = train(engine, tmp_path)
    with pytest.raises(ModelError, match="needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"):
        engine.complete(request(engine, model=name))
    engine.close()
    running.stop()


def test_a_url_where_nothing_answers_is_an_error(folder: Path, port: int) -> None:
    with pytest.raises(ModelError, match="No vLLM server answers at"):
        VLLMEngine(folder, url=f"http://127.0.0.1:{port}")


def test_what_the_server_refuses_is_an_error_of_dspys(served: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served._client, "send", lambda *args, **options: httpx.Response(503, text="overloaded"))
    for ask in (served.complete, lambda asked: list(served.stream(asked))):
        with pytest.raises(ServerError, match="vLLM answered 503: overloaded"):
            ask(request(served))
