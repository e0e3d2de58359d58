"""Several servers of one model, each a stand-in in a process of its own: who answers what, and who loads what."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest
import torch
from dspy.lm15 import Config, Message, RateLimitError, Request, ServerError, TransportError
from fakes import wait_for
from running_vllm import Running
from safetensors.torch import save_file

from bettertogether import vllm_lm
from bettertogether.engines import VLLMEngine
from bettertogether.engines.vllm import fleet
from bettertogether.engines.vllm.member import Adapter
from bettertogether.errors import AnswerTimeoutError, ModelError
from bettertogether.rollouts.evaluation import evaluate

UPDATING: dict[str, Any] = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
WORDS = ("red", "green", "blue", "white", "black")


@pytest.fixture
def servers() -> Iterator[list[Running]]:
    """Those that a test starts, ended after it."""
    started: list[Running] = []
    yield started
    for each in started:
        each.stop()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One for tests that leave it as it was."""
    started = Running()
    yield started
    started.stop()


@pytest.fixture
def pair(servers: list[Running]) -> list[Running]:
    servers += [Running(**UPDATING), Running(**UPDATING)]
    return servers


@pytest.fixture
def engines(folder: Path) -> Iterator[Any]:
    made: list[VLLMEngine] = []

    def make(servers: list[Running], **options: Any) -> VLLMEngine:
        made.append(VLLMEngine(folder, url=[each.url for each in servers], **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FIRST_REST_S", 0.01)
    monkeypatch.setattr(fleet, "LONGEST_REST_S", 0.01)


def request(engine: VLLMEngine, predictor: str, word: str = "red", model: str | None = None, **config: Any) -> Request:
    """A request of a predictor, which is known by its instructions."""
    options = Config(**{"max_tokens": 8, **config})
    messages = (Message.user(f"What is {word}?"),)
    return Request(model or f"local/{engine.base_name}", messages, system=predictor, config=options)


def homed(engine: VLLMEngine, server: Running, count: int, model: str | None = None) -> list[str]:
    """Predictors whose prompts meet at this server."""
    keys = {f"Predictor {n}.": engine._key(request(engine, f"Predictor {n}.", model=model)) for n in range(200)}
    return [name for name, key in keys.items() if engine.fleet.order(key)[0].server.url == server.url][:count]


def adapter(folder: Path, rank: int = 4) -> Path:
    """The folder of an adapter, whose weights are those of no other rank."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"weight": torch.full((rank, 1), 0.5)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def answers_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have what an engine asks at addresses that end in `end` answered with a status and a text."""

    def patch(engine: VLLMEngine, end: str, status: int, text: str = "") -> None:
        for client in (engine._client, engine._unkept):

            def answer(asked: httpx.Request, send: Any = client.send, **options: Any) -> httpx.Response:
                refused = str(asked.url).endswith(end)
                return httpx.Response(status, text=text, request=asked) if refused else send(asked, **options)

            monkeypatch.setattr(client, "send", answer)

    return patch


def test_the_prompts_of_a_predictor_are_answered_by_one_server(pair: list[Running], engines: Any) -> None:
    engine = engines(pair)
    predictors = [*homed(engine, pair[0], 2), *homed(engine, pair[1], 1)]
    for word in WORDS:
        for predictor in predictors:
            engine.complete(request(engine, predictor, word))
    assert [len(each.seen) for each in pair] == [10, 5]
    firsts = [{tuple(body["prompt"]) for body in each.seen} for each in pair]
    assert not firsts[0] & firsts[1]
    assert engine.counters()["requests"] == 15
    assert engine.concurrency == 128


def test_an_ended_servers_requests_are_answered_by_the_others_and_it_is_used_again_when_it_is_back(
    pair: list[Running], engines: Any, short_rests: None, tmp_path: Path
) -> None:
    engine = engines(pair)
    name = engine.add_adapter(adapter(tmp_path / "a"))
    [predictor] = homed(engine, pair[0], 1, name)
    asked = [request(engine, predictor, word, name) for word in WORDS]
    answers = [engine.complete(each).text for each in asked]
    assert [len(each.seen) for each in pair] == [5, 0]
    pair[0].stop()
    assert [engine.complete(each).text for each in asked] == answers
    assert len(pair[1].seen) == 5
    pair[0] = Running(pair[0].port, **UPDATING)
    time.sleep(0.05)
    assert [engine.complete(each).text for each in asked] == answers
    assert [len(each.seen) for each in pair] == [5, 5]
    assert [each.told for each in pair] == [[f"load {name}"]] * 2
    assert engine.counters()["requests"] == 15


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_server_ends_over_it_is_answered_by_another_and_counted_once(
    servers: list[Running], engines: Any, stream: bool
) -> None:
    servers += [Running(FAKE_VLLM_DIES_AFTER="2"), Running()]
    engine = engines(servers)
    [predictor] = homed(engine, servers[0], 1)
    for word in ("red", "green", "blue"):
        if stream:
            assert [event.type for event in engine.stream(request(engine, predictor, word))][-1] == "end"
        else:
            assert engine.complete(request(engine, predictor, word)).text
    assert len(servers[1].seen) == 2
    assert {name: engine.counters()[name] for name in ("requests", "generated_tokens")} == {
        "requests": 3,
        "generated_tokens": 15,
    }


def test_a_server_that_has_nobody_to_answer_is_left_out(
    servers: list[Running], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "FIRST_REST_S", 600.0)
    monkeypatch.setattr(fleet, "LONGEST_REST_S", 600.0)
    servers += [Running(FAKE_VLLM_STATUS="503"), Running()]
    engine = engines(servers)
    [predictor] = homed(engine, servers[0], 1)
    for word in ("red", "green"):
        engine.complete(request(engine, predictor, word))
    assert [len(each.seen) for each in servers] == [1, 2]


def test_a_server_that_has_nobody_to_load_an_adapter_is_left_out(
    pair: list[Running], engines: Any, answers_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "FIRST_REST_S", 600.0)
    engine = engines(pair)
    name = engine.add_adapter(adapter(tmp_path / "a"))
    [predictor] = homed(engine, pair[0], 1, name)
    answers_with(engine, f":{pair[0].port}/v1/load_lora_adapter", 503)
    for word in ("red", "green"):
        assert engine.complete(request(engine, predictor, word, name)).text
    assert [len(each.seen) for each in pair] == [0, 2]
    assert [each.told for each in pair] == [[], [f"load {name}"]]
    assert [each.failures for each in engine.fleet.members] == [1, 0]


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize(("status", "error"), [(503, ServerError), (429, RateLimitError), (500, ModelError)])
def test_a_server_that_is_gone_or_busy_when_an_adapter_is_loaded_or_unloaded_is_what_it_is_at_an_answer(
    servers: list[Running], engines: Any, answers_with: Any, tmp_path: Path, action: str, status: int, error: Any
) -> None:
    servers.append(Running(**UPDATING))
    engine = engines(servers, max_adapters=1)
    a, b = (engine.add_adapter(adapter(tmp_path / str(rank), rank)) for rank in (2, 4))
    engine.complete(request(engine, "Predictor.", model=a))
    answers_with(engine, f"/v1/{action}_lora_adapter", status)
    with pytest.raises(error) as caught:
        engine.complete(request(engine, "Predictor.", model=b))
    assert type(caught.value) is error
    assert servers[0].url in str(caught.value)


ONE = {"text": "w1", "finish_reason": "stop"}


@pytest.mark.parametrize(
    "text",
    [
        "<html>busy</html>", "", "null", '{"error": {"message": "cuda"}}', '{"choices": [], "usage": {}}',
        json.dumps({"choices": [ONE], "usage": None}), json.dumps({"choices": [ONE], "usage": {"prompt_tokens": 1}}),
        "data: <html>", "data: null", 'data: {"error": {"message": "cuda"}}', 'data: {"usage": null}',
        f"data: {json.dumps({'choices': [ONE]})}", 'data: {"choices": [{"text": "w1", "finish_reason": null}]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_answer_of_vllms_is_an_error_of_the_server_that_names_it(
    running: Running, engines: Any, answers_with: Any, text: str, stream: bool
) -> None:
    engine = engines([running])
    answers_with(engine, "/v1/completions", 200, text)
    with pytest.raises(ServerError, match=f"{running.url}/v1/completions"):
        list(engine.stream(request(engine, "P."))) if stream else engine.complete(request(engine, "P."))
    assert engine.counters()["requests"] == 0


@pytest.mark.parametrize(("status", "text"), [(500, ""), (200, "<html>busy</html>"), (200, '{"data": []}')])
def test_a_server_that_does_not_say_which_adapters_it_lost_is_an_error_of_the_server(
    servers: list[Running], engines: Any, answers_with: Any, tmp_path: Path, status: int, text: str
) -> None:
    servers.append(Running(**UPDATING))
    engine = engines(servers)
    name = engine.add_adapter(adapter(tmp_path / "a"))
    engine.complete(request(engine, "Predictor.", model=name))
    engine.fleet.members[0]._send("/v1/unload_lora_adapter", {"lora_name": name})
    answers_with(engine, "/v1/models", status, text)
    with pytest.raises(ServerError, match=servers[0].url):
        engine.complete(request(engine, "Predictor.", model=name))


def test_when_no_server_answers_the_error_names_each(servers: list[Running], engines: Any) -> None:
    servers += [Running(), Running()]
    engine = engines(servers)
    for each in servers:
        each.stop()
    with pytest.raises(TransportError, match="None of the 2 servers answers") as caught:
        engine.complete(request(engine, "Predictor."))
    assert all(each.url in str(caught.value) for each in servers)
    assert engine.counters()["requests"] == 0


def test_an_adapter_is_loaded_once_on_each_server_whoever_asks_at_the_same_time(
    pair: list[Running], engines: Any, tmp_path: Path
) -> None:
    engine = engines(pair)
    name = engine.add_adapter(adapter(tmp_path / "a"))
    predictors = [predictor for each in pair for predictor in homed(engine, each, 8, name)]
    asked = [request(engine, predictor, model=name) for predictor in predictors]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(engine.complete, asked))
    assert sum(len(each.seen) for each in pair) == 16
    assert [each.told for each in pair] == [[f"load {name}"]] * 2


def test_beyond_the_limit_the_adapter_that_was_asked_for_longest_ago_is_unloaded(
    servers: list[Running], engines: Any, tmp_path: Path
) -> None:
    servers.append(Running(**UPDATING))
    engine = engines(servers, max_adapters=2)
    a, b, c = (engine.add_adapter(adapter(tmp_path / str(rank), rank)) for rank in (2, 4, 8))
    for name in (a, b, a, c, b):
        engine.complete(request(engine, "Predictor.", model=name))
    assert servers[0].told == [f"load {a}", f"load {b}", f"unload {b}", f"load {c}", f"unload {a}", f"load {b}"]


def test_an_adapter_that_a_request_is_in_flight_for_is_not_unloaded(
    servers: list[Running], engines: Any, tmp_path: Path
) -> None:
    servers.append(Running(**UPDATING))
    engine = engines(servers, max_adapters=1)
    a, b, c = (engine.add_adapter(adapter(tmp_path / str(rank), rank)) for rank in (2, 4, 8))
    with engine.fleet.members[0].holding(Adapter(a, tmp_path / "2")):
        engine.complete(request(engine, "Predictor.", model=b))
    engine.complete(request(engine, "Predictor.", model=c))
    assert servers[0].told == [f"load {a}", f"load {b}", f"unload {a}", f"unload {b}", f"load {c}"]


def test_an_adapter_that_somebody_else_unloaded_is_loaded_again(
    servers: list[Running], engines: Any, tmp_path: Path
) -> None:
    servers.append(Running(**UPDATING))
    first, second = engines(servers), engines(servers, max_adapters=1)
    a = first.add_adapter(adapter(tmp_path / "2", 2))
    b = second.add_adapter(adapter(tmp_path / "4", 4))
    second.add_adapter(tmp_path / "2")
    first.complete(request(first, "Predictor.", model=a))
    second.complete(request(second, "Predictor.", model=a))
    second.complete(request(second, "Predictor.", model=b))
    first.complete(request(first, "Predictor.", model=a))
    assert servers[0].told == [f"load {a}", f"load {a}", f"unload {a}", f"load {b}", f"load {a}"]


def test_a_metric_costs_the_same_when_a_server_ends_in_the_middle(servers: list[Running], folder: Path) -> None:
    answer: dict[str, Any] = {"FAKE_VLLM_ANSWER": "[[ ## answer ## ]]\nred\n\n[[ ## completed ## ]]"}
    servers += [Running(FAKE_VLLM_DIES_AFTER="4", **answer), Running(FAKE_VLLM_DIES_AFTER="4", **answer)]
    servers.append(Running(**answer))
    lm = vllm_lm(folder, url=[each.url for each in servers], cache=False)
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    examples = [dspy.Example(question=f"Number {n}?", answer="red").with_inputs("question") for n in range(24)]
    calls: list[str] = []

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        calls.append(example.question)
        return bool(prediction.answer == example.answer)

    result = evaluate(program, examples, metric, num_threads=12)
    counters = lm.engine.counters()
    assert result.scores == (1.0,) * 24
    assert (result.ledger.lm_calls, result.ledger.metric_calls, len(calls)) == (24, 24, 24)
    assert counters["requests"] == 24
    assert result.ledger.generated_tokens == counters["generated_tokens"] == 24
    assert result.ledger.prompt_tokens == counters["prompt_tokens"]
    lm.engine.close()


def test_an_answer_that_takes_too_long_is_told_to_stop_and_not_asked_for_again(
    servers: list[Running], folder: Path
) -> None:
    servers += [Running(FAKE_VLLM_PAUSES="60"), Running(FAKE_VLLM_PAUSES="60")]
    urls = [each.url for each in servers]
    lm = vllm_lm(folder, url=urls, cache=False, engine_options={"request_timeout_s": 2})
    with pytest.raises(AnswerTimeoutError, match=r"127\.0\.0\.1:\d+ is well, but took longer than request_timeout_s=2"):
        lm("What is red?")
    assert sum(len(each.seen) for each in servers) == 1
    lm.engine.close()


def test_an_awaited_answer_that_is_cancelled_is_no_fault_of_its_server(servers: list[Running], engines: Any) -> None:
    servers += [Running(FAKE_VLLM_PAUSES="60"), Running(FAKE_VLLM_PAUSES="60")]
    engine = engines(servers)

    async def give_up() -> None:
        answer = asyncio.ensure_future(engine.complete_async(request(engine, "Predictor.")))
        assert await asyncio.to_thread(wait_for, lambda: any(each.seen for each in servers))
        answer.cancel()

    asyncio.run(give_up())
    assert wait_for(lambda: engine._gate.inside == 0)
    assert [(member.failures, member.in_flight) for member in engine.fleet.members] == [(0, 0), (0, 0)]
    assert sorted((each.told, len(each.seen)) for each in servers) == [([], 0), (["broken off"], 1)]


def test_servers_of_different_models_are_an_error_that_names_each(servers: list[Running], engines: Any) -> None:
    servers += [Running(model="one/model"), Running(model="another/model")]
    with pytest.raises(ModelError, match="different base models") as caught:
        engines(servers)
    for each, model in zip(servers, ("one/model", "another/model"), strict=True):
        assert f"{each.url} serves '{model}'" in str(caught.value)
    assert "--served-model-name" in str(caught.value)


def test_an_unreachable_server_is_an_error_that_names_it_and_not_the_others(
    servers: list[Running], engines: Any
) -> None:
    servers += [Running(), Running()]
    servers[1].stop()
    with pytest.raises(ModelError, match=f"No vLLM server answers at {servers[1].url}: .*leave that address out") as e:
        engines(servers)
    assert servers[0].url not in str(e.value)


def test_a_rank_that_one_of_the_servers_does_not_take_is_an_error_that_names_it(
    servers: list[Running], engines: Any, tmp_path: Path
) -> None:
    servers.append(Running(None, "--max-lora-rank", "8", **UPDATING))
    engine = engines(servers)
    name = engine.add_adapter(adapter(tmp_path / "a", 16))
    with pytest.raises(
        ModelError, match=r"(?s)at http://127.*does not load.*Its rank \(16\) must be within that .*rank"
    ):
        engine.complete(request(engine, "Predictor.", model=name))


def test_several_servers_are_saved_with_a_program_and_found_again(pair: list[Running], folder: Path) -> None:
    lm = vllm_lm(folder, url=[pair[0].url, f"{pair[1].url}/v1"])
    assert lm.engine.dump_state()["url"] == [each.url for each in pair]
    assert vllm_lm(folder, url=[each.url for each in pair]).engine is lm.engine
    assert pickle.loads(pickle.dumps(lm.engine)) is lm.engine
    lm.engine.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, which makes the certificate")
def test_a_server_behind_https_with_a_key_and_a_certificate_of_ones_own(
    servers: list[Running], engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate, both = tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "both.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    command = ["openssl", "req", "-x509", *made, "-out", str(certificate), "-days", "2", *subject]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    servers.append(Running(FAKE_VLLM_CERTIFICATE=str(both), VLLM_API_KEY="open sesame"))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ModelError, match=r"No vLLM server answers at https://.*SSL_CERT_FILE=FILE"):
        engines(servers, api_key="open sesame")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(ModelError, match=r"answered 401.*Unauthorized.*wants api_key="):
        engines(servers, api_key="another")
    engine = engines(servers, api_key="open sesame")
    assert engine.complete(request(engine, "Predictor.")).text
