"""The vLLM engine against a stand-in for the server, in processes of its own; and against the real one where the
environment names it (BETTERTOGETHER_TEST_VLLM: the program, BETTERTOGETHER_TEST_MODEL: a SmolLM2-135M-Instruct)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dspy
import httpx
import psutil
import pytest
from dspy.lm15 import ContextLengthError, ServerError, StreamDeltaEvent, TextDelta
from running_vllm import FAKE, Running
from small_models import SIZES, save_model
from transformers import Phi3Config
from vllm_requests import SHORT, request, seen, told, train

from bettertogether import vllm_lm
from bettertogether.engines import VLLMEngine
from bettertogether.engines.answers import SampledAnswer
from bettertogether.engines.protocol import RewardedAnswer
from bettertogether.engines.vllm.server import free_port
from bettertogether.errors import ConfigError, EngineBusyError, ModelError, UnknownAdapterError
from bettertogether.testing import EngineContract
from bettertogether.training.config import LoRAConfig

REAL = os.environ.get("BETTERTOGETHER_TEST_VLLM")
MODEL = os.environ.get("BETTERTOGETHER_TEST_MODEL")


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
        predict.set_lm(vllm_lm(str(MODEL), cache=False, engine_options=engine.options.saved()))
        with dspy.context(adapter=dspy.JSONAdapter()):
            prediction = predict(thing="a ripe strawberry")
        assert prediction.colour in ("red", "blue")


def test_the_base_and_adapters_share_no_batch_where_vllm_mixes_them_up(served: VLLMEngine, folder: Path) -> None:
    """vllm-project/vllm#48421: on the CPU, base answers in a batch with an adapter's come out as the adapter's."""
    assert served._kind(f"local/{served.base_name}") != served._kind("an adapter")
    elsewhere = VLLMEngine(folder, command=FAKE, mixed_batches=True)
    assert elsewhere._kind(f"local/{served.base_name}") == elsewhere._kind("an adapter")
    elsewhere.close()


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


def test_nothing_is_left_to_the_generation_config_of_the_server(served: VLLMEngine) -> None:
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
    neutral["skip_special_tokens"] = True
    given: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0})
    for options in given:
        served.complete(request(served, **options))
        assert {name: seen(served)[-1].get(name) for name in neutral} == neutral
    assert {name: seen(served)[-1].get(name) for name in ("top_p", "top_k")} == {"top_p": 1.0, "top_k": 0}


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


def test_an_answer_that_is_to_be_stored_comes_in_tokens(served: VLLMEngine) -> None:
    asked = request(served, store=True, temperature=1.0, seed=4)
    response = served.complete(asked)
    numbers = [int(word[1:]) for word in (response.text or "").split()]
    assert response.provider_data == {
        "prompt_token_ids": served.prompt_tokens(served.messages(asked)),
        "token_ids": [*numbers, min(served._eos_ids)],
        "forced": [False] * (len(numbers) + 1),
        "response_format": None,
        "temperature": 1.0,
    }


def test_what_learns_from_rewards_is_loaded_by_the_server_after_each_update(served: VLLMEngine, tmp_path: Path) -> None:
    def rewarded(model: str, advantage: float) -> RewardedAnswer:
        response = served.complete(request(served, model=model, store=True, temperature=1.0, seed=int(advantage)))
        return RewardedAnswer(SampledAnswer(**response.provider_data or {}), advantage)

    with served.policy_session(folder=tmp_path / "adapters", lora=LoRAConfig(rank=4), training=SHORT) as session:
        first = session.model
        session.update([rewarded(first, 1.0), rewarded(first, -1.0)])
        second = session.model
        served.complete(request(served, model=second))
        name, _ = session.finish()
    assert first != second == name
    assert served.complete(request(served, model=name)).text
    with pytest.raises(UnknownAdapterError):
        served.complete(request(served, model=first))
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [name.partition("/")[2]]


def test_an_adapter_that_is_removed_is_unloaded_where_it_was_loaded(alone: VLLMEngine, tmp_path: Path) -> None:
    name = train(alone, tmp_path)
    alone.remove_adapter(name)
    alone.add_adapter(tmp_path / name.partition("/")[2])
    alone.complete(request(alone, model=name))
    alone.remove_adapter(name)
    assert told(alone) == [f"load {name}", f"unload {name}"]


def test_an_adapter_is_loaded_anew_from_the_folder_that_it_has_now(alone: VLLMEngine, tmp_path: Path) -> None:
    name = train(alone, tmp_path / "first")
    alone.complete(request(alone, model=name))
    shutil.move(tmp_path / "first", tmp_path / "second")
    alone.add_adapter(tmp_path / "second" / name.partition("/")[2])
    for _ in range(2):
        alone.complete(request(alone, model=name))
    assert told(alone) == [f"load {name}", f"unload {name}", f"load {name}"]


@pytest.mark.parametrize("is_closed", [False, True])
def test_an_adapter_of_a_server_that_stopped_is_removed_without_it(
    alone: VLLMEngine, tmp_path: Path, is_closed: bool
) -> None:
    name = train(alone, tmp_path)
    alone.complete(request(alone, model=name))
    alone.close() if is_closed else alone.server.stop()
    alone.remove_adapter(name)
    assert (alone.server.starts, alone.adapter_folders()) == (1, [])


def test_a_server_that_gives_no_tokens_is_an_error_with_the_ways_out(
    alone: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_IS_OLD", "1")
    with pytest.raises(ModelError, match=r"use vLLM 0\.32 or later, or local_lm"):
        alone.complete(request(alone, store=True))


def test_requests_of_an_event_loop_are_answered_together(served: VLLMEngine) -> None:
    async def ask() -> list[str | None]:
        asked = (served.asynchronous.complete(request(served, word)) for word in ("red", "blue"))
        return [response.text for response in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [served.complete(request(served, word)).text for word in ("red", "blue")]


def test_a_stream_of_an_event_loop_is_the_answer(served: VLLMEngine) -> None:
    async def ask() -> str:
        events = [event async for event in served.asynchronous.stream(request(served))]
        return "".join(e.delta.text for e in events if isinstance(e, StreamDeltaEvent))

    assert asyncio.run(ask()) == served.complete(request(served)).text


def test_a_stream_has_the_log_probabilities_that_come_without_text(served: VLLMEngine) -> None:
    deltas = [e.delta for e in served.stream(request(served, logprobs=2)) if isinstance(e, StreamDeltaEvent)]
    streamed = [score for delta in deltas if isinstance(delta, TextDelta) for score in delta.logprobs]
    assert tuple(streamed) == served.complete(request(served, logprobs=2)).logprobs


def test_a_prompt_that_is_too_long_never_leaves(folder: Path) -> None:
    engine = VLLMEngine(folder, command=FAKE, server_options={"max_model_len": 64})
    with pytest.raises(ContextLengthError, match="takes 64 for prompt"):
        engine.complete(request(engine, "red " * 100))
    assert engine.server.process is None
    engine.close()


def test_a_proxy_of_the_environment_is_not_for_a_server_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    engine = VLLMEngine(folder, command=FAKE, startup_timeout_s=20)
    assert engine.complete(request(engine)).text
    engine.close()


def test_a_server_of_ours_has_a_random_key_that_is_neither_an_argument_nor_saved(served: VLLMEngine) -> None:
    served.complete(request(served))
    address, key = served.server.address()[0], served.server.api_key
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert key is not None
    assert len(key) > 30
    process = served.server.process
    assert process is not None
    watcher = psutil.Process(process.pid)
    for each in (watcher, *watcher.children(recursive=True)):
        assert key not in str(each.cmdline())
    assert key not in json.dumps(served.dump_state())
    assert key not in served.server.log.read_text()


def test_a_server_of_somebody_elses_at_our_port_is_not_taken_for_ours(
    folder: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(port)
    monkeypatch.setattr("bettertogether.engines.vllm.server.free_port", lambda: port)
    engine = VLLMEngine(folder, command=FAKE)
    with pytest.raises(ModelError, match="ended with code 1 before it could answer"):
        engine.complete(request(engine))
    engine.close()
    running.stop()


def test_a_server_that_wants_a_key_is_used_with_it(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(port, VLLM_API_KEY="open sesame")
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(ModelError, match="wants api_key="):
        vllm_lm(folder, url=url)
    lm = vllm_lm(folder, url=url, api_key="open sesame", cache=False)
    assert lm("What is red?")[0].startswith("w")
    assert "sesame" not in json.dumps(lm.dump_state())
    with pytest.raises(ConfigError, match="Another api_key") as caught:
        vllm_lm(folder, url=url, api_key="another")
    assert "sesame" not in str(caught.value)
    lm.engine.close()
    monkeypatch.setenv("VLLM_API_KEY", "open sesame")
    lm = vllm_lm(folder, url=url, cache=False)
    assert lm("What is red?")[0].startswith("w")
    lm.engine.close()
    running.stop()


LONGROPE = Phi3Config(
    **{**SIZES, "max_position_embeddings": 512, "original_max_position_embeddings": 256},
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    },
)  # fmt: skip


def test_a_model_whose_rotary_factors_change_with_the_length_is_served_at_the_length_it_is_trained_at(
    tmp_path: Path,
) -> None:
    engine = VLLMEngine(save_model(tmp_path / "longrope", LONGROPE), command=FAKE)
    assert engine.max_length == 256
    assert engine.server.options["max_model_len"] == 256
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"url": 5}, {"url": "node7:8000"}, {"url": ""}, {"url": "http://x", "api_key": 5}, {"api_key": "x"},
        {"url": []}, {"url": "https://"}, {"url": ["http://x", "node7"]}, {"url": ["http://x/v1", "http://x"]},
        {"engine_options": {"max_adapters": 0}},
        {"engine_options": {"concurrency": 0}}, {"engine_options": {"command": 5}},
        {"engine_options": {"server_options": 5}}, {"engine_options": {"server_options": {"api_key": "x"}}},
        {"engine_options": {"startup_timeout_s": -1}}, {"engine_options": {"stop_while_training": "no"}},
        {"engine_options": {"mixed_batches": 5}}, {"engine_options": {"chat_template_kwargs": 5}},
        {"engine_options": {"colour": "red"}}, {"engine_options": 5},
    ],
)  # fmt: skip
def test_arguments_that_can_not_be_are_refused_at_once(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        vllm_lm(folder, **options)


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
    for client in (served._client, served._unkept):
        monkeypatch.setattr(client, "send", lambda *args, **options: httpx.Response(503, text="overloaded"))
    for ask in (served.complete, lambda asked: list(served.stream(asked))):
        with pytest.raises(ServerError, match="vLLM answered 503: overloaded"):
            ask(request(served))


@pytest.mark.parametrize("awaited", [False, True])
def test_a_callback_that_asks_while_the_server_is_stopped_for_the_training_is_an_error(
    alone: VLLMEngine, tmp_path: Path, awaited: bool
) -> None:
    async def ask() -> None:
        await asyncio.wait_for(alone.complete_async(request(alone)), 60)

    with pytest.raises(EngineBusyError, match="stop_while_training=False"):
        train(alone, tmp_path, on_progress=lambda _: asyncio.run(ask()) if awaited else alone.complete(request(alone)))
