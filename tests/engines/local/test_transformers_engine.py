"""The engine over a real tiny model: answers, seeds, threads, labels in one pass, streams, and its end."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import math
import pickle
import re
import shutil
import threading
import weakref
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
import torch
from dspy._vendor.lm15.result import StreamAccumulator
from dspy.clients.engines.stream_guard import checked_stream
from dspy.lm15 import ContextLengthError, UnsupportedFeatureError
from small_models import PACKED, byte_tokenizer, generated, save_adapter, save_model
from tiny_requests import ask, labels
from transformers import AutoModelForCausalLM, LlamaConfig

from bettertogether.engines import LocalEngine, TransformersEngine
from bettertogether.engines.loading import load_model
from bettertogether.engines.local import transformers_engine as engine_module
from bettertogether.errors import ConfigError, EngineClosedError, UnknownAdapterError
from bettertogether.lm import engine_lm, local_lm

TOKENIZER = byte_tokenizer()


def test_it_is_a_local_engine(engine: TransformersEngine) -> None:
    assert isinstance(engine, LocalEngine)
    assert (engine.short_name, engine.max_length, engine.concurrency) == ("tiny", 4096, 64)
    assert re.fullmatch("tiny-[0-9a-f]{8}", engine.base_name)


def test_weights_are_loaded_at_the_first_request(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def counted(*args: Any) -> Any:
        loaded.append(1)
        return load_model(*args)

    monkeypatch.setattr(engine_module, "load_model", counted)
    assert loaded == []
    engine.complete(ask())
    engine.complete(ask())
    assert loaded == [1]


def test_the_answer_is_the_one_of_generate(engine: TransformersEngine, folder: Path) -> None:
    request = ask(max_tokens=12)
    prompt_ids = engine.prompt_tokens(engine.messages(request))
    expected = generated(AutoModelForCausalLM.from_pretrained(folder), prompt_ids, 12)
    end = next((place for place, token in enumerate(expected) if token in (258, 260)), None)
    response = engine.complete(request)
    assert response.text == TOKENIZER.decode(expected[:end], skip_special_tokens=True)
    assert response.finish_reason == ("length" if end is None else "stop")
    assert response.usage.input_tokens == len(prompt_ids)
    assert response.model == "local/tiny"


def test_many_threads_get_the_answers_that_one_gets(engine: TransformersEngine, folder: Path) -> None:
    texts = [f"What is {number} times {number}?" for number in range(24)]
    answers: dict[str, str | None] = {}

    def work(text: str) -> None:
        answers[text] = engine.complete(ask(text)).text

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = TransformersEngine(folder, max_batch_size=1)
    assert answers == {text: alone.complete(ask(text)).text for text in texts}
    assert engine.counters()["forward_passes"] < 24 * 8
    alone.close()


def test_the_same_seed_gives_the_same_text(engine: TransformersEngine) -> None:
    texts = [engine.complete(ask(temperature=1.0, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_template_a_turn_that_the_model_opens_ends_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = TransformersEngine(save_model(tmp_path / "tiny", template=None))
    request = ask(model=f"local/{made.base_name}", max_tokens=16)
    monkeypatch.setattr(made._renderer, "stop", ())
    whole = made.complete(request).text
    monkeypatch.setattr(made._renderer, "stop", (whole[5:9],))
    assert made.complete(request).text == whole[: whole.index(whole[5:9])]
    made.close()


def test_without_a_template_an_answer_in_json_ends_where_it_is_complete(tmp_path: Path) -> None:
    made = TransformersEngine(save_model(tmp_path / "tiny", template=None))
    response = made.complete(ask(model=f"local/{made.base_name}", max_tokens=30, response_format=labels("x", "y")))
    assert json.loads(response.text or "")["label"] in ("x", "y")
    assert response.finish_reason == "stop"
    made.close()


def test_a_label_costs_one_forward_pass(engine: TransformersEngine) -> None:
    engine.complete(ask())
    before = engine.counters()
    response = engine.complete(ask("Which?", response_format=labels("setosa", "virginica"), max_tokens=100))
    after = engine.counters()
    assert json.loads(response.text or "")["label"] in ("setosa", "virginica")
    assert response.finish_reason == "stop"
    assert after["forward_passes"] - before["forward_passes"] == 1
    assert after["forced_tokens"] - before["forced_tokens"] == (response.usage.output_tokens or 0) - 1


def test_an_answer_that_has_no_choice_costs_none(engine: TransformersEngine) -> None:
    response = engine.complete(ask(response_format=labels("only"), max_tokens=100))
    assert response.text == '{\n  "label": "only"\n}'
    assert engine.counters()["forward_passes"] == 0


def test_free_text_in_json_may_run_to_the_limit(engine: TransformersEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    response = engine.complete(ask(response_format={"type": "json_schema", "schema": schema}, max_tokens=20))
    assert (response.finish_reason, response.usage.output_tokens) == ("length", 20)
    assert (response.text or "").startswith('{\n  "a": "')


def test_log_probabilities_are_the_models(engine: TransformersEngine, folder: Path) -> None:
    request = ask(logprobs=2, max_tokens=3)
    response = engine.complete(request)
    prompt_ids = engine.prompt_tokens(engine.messages(request))
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt_ids])).logits[0, -1]
    values, ids = torch.log_softmax(logits, -1).topk(2)
    assert response.logprobs is not None
    first = response.logprobs[0]
    assert [top.token_id for top in first.top] == ids.tolist()
    assert [top.logprob for top in first.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert (first.token_id, first.logprob) == (first.top[0].token_id, first.top[0].logprob)
    assert all(math.isfinite(score.logprob) for score in response.logprobs)


def test_the_stream_is_the_answer_in_pieces(engine: TransformersEngine) -> None:
    request = ask(logprobs=0)
    events = list(checked_stream(engine.stream(request)))
    accumulator = StreamAccumulator(request)
    for event in events:
        accumulator.push(event)
    streamed, whole = accumulator.response(), engine.complete(request)
    assert (streamed.text, streamed.finish_reason) == (whole.text, whole.finish_reason)
    assert [score.token_id for score in streamed.logprobs or ()] == [score.token_id for score in whole.logprobs or ()]
    assert len(streamed.logprobs or ()) == whole.usage.output_tokens
    assert sum(event.type == "delta" for event in events) > 2


def test_a_stream_that_is_given_up_leaves_the_engine_free(engine: TransformersEngine) -> None:
    stream = engine.stream(ask(max_tokens=3000))
    next(stream)
    assert isinstance(stream, Generator)
    stream.close()
    assert engine.complete(ask(max_tokens=1)).usage.output_tokens in (0, 1)


def test_awaited_requests_are_decoded_together(engine: TransformersEngine) -> None:
    async def all_of_them() -> list[str | None]:
        requests = [engine.asynchronous.complete(ask(f"{number}")) for number in range(8)]
        return [response.text for response in await asyncio.gather(*requests)]

    answers = asyncio.run(all_of_them())
    assert answers == [engine.complete(ask(f"{number}")).text for number in range(8)]


def test_awaited_requests_need_no_thread_of_the_loops_own(engine: TransformersEngine) -> None:
    async def from_the_only_thread() -> str | None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
        answer = engine.complete_async(ask())
        response = await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(answer, loop).result(60))
        return response.text

    assert asyncio.run(from_the_only_thread()) == engine.complete(ask()).text


def test_an_awaited_stream_is_the_answer(engine: TransformersEngine) -> None:
    async def text() -> str:
        events = [event async for event in engine.asynchronous.stream(ask())]
        return "".join(event.delta.text for event in events if event.type == "delta")

    assert asyncio.run(text()) == engine.complete(ask()).text


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_lengths(tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", LlamaConfig(**{**PACKED["llama"].to_dict(), "max_position_embeddings": 64}))
    engine = TransformersEngine(short)
    with pytest.raises(ContextLengthError, match=r"The prompt has 1\d\d tokens; short takes 64"):
        engine.complete(ask("x" * 90, model="local/short"))
    room = 64 - len(engine.prompt_tokens([{"role": "user", "content": "x"}]))
    response = engine.complete(ask("x", model="local/short", max_tokens=1000, temperature=0.0))
    assert (response.usage.output_tokens or 0) <= room
    with pytest.raises(ContextLengthError, match="The prompt has 64 tokens; short takes 64"):
        engine.complete(ask("x" * (1 + room), model="local/short"))
    engine.close()


def test_an_adapter_answers_under_its_name_and_the_base_under_its_own(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    before = engine.complete(ask()).text
    where = save_adapter(tmp_path / "adapter", 1)
    name = engine.add_adapter(where)
    assert engine.complete(ask(model=name)).text != before
    assert engine.complete(ask()).text == before
    assert (engine.adapter_folder(name), engine.adapter_folder("local/tiny")) == (where, None)


def test_an_adapter_may_be_added_before_the_weights_are_loaded(folder: Path, tmp_path: Path) -> None:
    where = save_adapter(tmp_path / "adapter", 1)
    early, late = TransformersEngine(folder, adapters=[where]), TransformersEngine(folder)
    late.complete(ask())
    name = late.add_adapter(where)
    assert early.complete(ask(model=name)).text == late.complete(ask(model=name)).text
    early.close()
    late.close()


def test_a_model_name_that_is_not_served_is_an_error(engine: TransformersEngine) -> None:
    with pytest.raises(UnknownAdapterError, match="Held: local/tiny"):
        engine.complete(ask(model="local/other"))


def test_a_tokenizer_without_a_fast_version_leaves_answers_without_a_schema(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "slow", template=None)
    (folder / "tokenizer.json").unlink()
    tokens = ["<unk>", *(chr(code) + end for code in range(33, 127) for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CTRLTokenizer", "eos_token": "<unk>"})
    )
    slow = local_lm(str(folder), max_tokens=2, cache=False)
    assert not slow.engine.supports_response_schema
    assert "slow has no fast tokenizer: its answers can't be held to a schema." in caplog.text
    assert slow("hello there")


def test_an_unknown_option_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UnsupportedFeatureError, match="frequency_penalty"):
        engine.complete(ask(frequency_penalty=1.0))


def test_dspy_asks_for_structured_answers(engine: TransformersEngine) -> None:
    class Species(dspy.Signature):
        """Name the species."""

        length: float = dspy.InputField()
        species: Literal["setosa", "virginica"] = dspy.OutputField()

    lm = engine_lm(engine, max_tokens=100, cache=False)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Species)(length=1.4).species in ("setosa", "virginica")
    # One pass for the prompt, which is longer than a slot, and one for the label.
    assert engine.counters()["forward_passes"] == 2


def test_errors_reach_dspy_without_a_second_try(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = engine_lm(engine, cache=False, num_retries=3)
    monkeypatch.setattr(engine_module, "load_model", lambda *args: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(dspy.LMError, match="broken"):
        lm("Hello")
    assert engine.counters()["requests"] == 1


def test_copies_and_pickles_are_the_same_engine(folder: Path) -> None:
    engine = TransformersEngine.shared(folder)
    assert copy.copy(engine) is engine
    assert copy.deepcopy({"engine": engine})["engine"] is engine
    assert pickle.loads(pickle.dumps(engine)) is engine
    assert copy.deepcopy(engine_lm(engine)).engine is engine
    engine.close()


def test_one_engine_for_one_model_in_a_process(folder: Path, tmp_path: Path) -> None:
    engine = TransformersEngine.shared(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert TransformersEngine.shared(str(folder), dtype="float32") is engine
    assert TransformersEngine.shared(link) is engine
    other = TransformersEngine.shared(folder, dtype="bfloat16")
    assert other is not engine
    engine.close()
    again = TransformersEngine.shared(folder)
    assert again is not engine
    for made in (other, again):
        made.close()


def test_sharing_with_other_options_is_an_error(folder: Path) -> None:
    engine = TransformersEngine.shared(folder, max_batch_size=4)
    with pytest.raises(ConfigError, match=r"max_batch_size=5 was asked for.*max_batch_size=4"):
        TransformersEngine.shared(folder, max_batch_size=5)
    assert TransformersEngine.shared(folder) is engine
    engine.close()


def test_sharing_an_engine_whose_options_change_its_answers_without_naming_them_is_an_error(folder: Path) -> None:
    engine = TransformersEngine.shared(folder, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ConfigError, match=r"chat_template_kwargs=None was asked for.*{'enable_thinking': True}"):
        TransformersEngine.shared(folder)
    engine.close()


def test_the_state_is_json_and_gives_the_engine_with_its_adapters(folder: Path, tmp_path: Path) -> None:
    engine = TransformersEngine.shared(folder, chat_template_kwargs={"x": 1})
    name = engine.add_adapter(save_adapter(tmp_path / "adapter", 1))
    state = json.loads(json.dumps(engine.dump_state()))
    assert TransformersEngine.load_state(state) is engine
    engine.close()
    fresh = TransformersEngine.load_state(state)
    assert fresh.adapter_folder(name) == tmp_path / "adapter"
    assert fresh.dump_state() == state
    assert fresh.asynchronous.load_state(state).engine is fresh
    fresh.close()


def test_the_state_of_an_lm_names_its_own_adapter_alone(folder: Path, tmp_path: Path) -> None:
    engine = TransformersEngine.shared(folder)
    engine.add_adapter(save_adapter(tmp_path / "other", 1))
    own = engine_lm(engine, engine.add_adapter(save_adapter(tmp_path / "own", 2)))
    named = [own.dump_state()[side]["state"]["adapters"] for side in ("engine", "async_engine")]
    assert named == [[str(tmp_path / "own")]] * 2
    assert engine_lm(engine).dump_state()["engine"]["state"]["adapters"] == []
    assert len(engine.dump_state()["adapters"]) == 2
    shutil.rmtree(tmp_path / "other")
    engine.close()
    program = dspy.Predict("q -> a")
    program.load_state({**program.dump_state(), "lm": own.dump_state()}, allow_unsafe_lm_state=True)
    assert program.lm.engine.adapter_folder(own.model) == tmp_path / "own"
    program.lm.engine.close()


def test_a_pickle_is_read_without_the_adapters_that_were_deleted_since(folder: Path, tmp_path: Path) -> None:
    engine = TransformersEngine.shared(folder)
    engine.add_adapter(save_adapter(tmp_path / "other", 1))
    own = engine.add_adapter(save_adapter(tmp_path / "own", 2))
    pickled = pickle.dumps(engine_lm(engine, own))
    shutil.rmtree(tmp_path / "other")
    engine.close()
    found = pickle.loads(pickled)
    assert found.engine.adapter_folders() == [tmp_path / "own"]
    found.engine.close()


def test_a_closed_engine_says_so(folder: Path) -> None:
    engine = TransformersEngine(folder)
    engine.complete(ask())
    engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        engine.complete(ask())


def test_after_close_a_new_lm_loads_the_model_anew(folder: Path) -> None:
    first = local_lm(folder, cache=False, max_tokens=4)
    answer = first("Hello")
    first.engine.close()
    second = local_lm(folder, cache=False, max_tokens=4)
    assert second("Hello") == answer
    with pytest.raises(dspy.LMError, match="closed") as caught:
        first("Hello")
    assert isinstance(caught.value.__cause__, EngineClosedError)
    second.engine.close()


def test_a_closed_engine_frees_all_weights_and_knows_its_adapters_still(folder: Path, tmp_path: Path) -> None:
    where = save_adapter(tmp_path / "adapter", 1)
    engine = TransformersEngine(folder, adapters=[where])
    lm = engine_lm(engine, engine.add_adapter(where), cache=False, max_tokens=2)
    lm("Hello")
    matrices = [each for pair in engine._adapters._weights[lm.model].values() for each in pair]
    held = [weakref.ref(each) for each in (engine._model, *matrices)]
    del matrices
    engine.close()
    gc.collect()
    assert (len(held), sum(each() is not None for each in held)) == (1 + 2 * 14, 0)
    assert (engine.adapter_folder(lm.model), engine.adapter_folders()) == (where, [where])
    assert lm.dump_state()["engine"]["state"]["adapters"] == [str(where)]


def test_an_interrupted_thread_takes_its_request_back(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.complete(ask())

    def interrupt(futures: Any, timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_module, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.complete(ask(max_tokens=4000))
    monkeypatch.undo()
    assert engine.complete(ask(max_tokens=2)).usage.output_tokens in (0, 1, 2)


def test_bfloat16_answers_on_the_cpu(folder: Path) -> None:
    engine = TransformersEngine(folder, dtype="bfloat16")
    assert engine.complete(ask(max_tokens=4)).usage.output_tokens in range(5)
    engine.close()
