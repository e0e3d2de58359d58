"""The engine contract over the fake and a tiny real engine, and what the fake can be taught."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.lm15 import Config, ImagePart, Message, Request, TextPart, UnsupportedFeatureError
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether.engines.protocol import LocalEngine, TrainingRow
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import EngineContract, FakeEngine
from bettertogether.training.config import TrainingConfig


class TestFakeEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> FakeEngine:
        return FakeEngine(lambda request: request.learned or f"{request.user} {request.model}")


class TestTransformersEngine(EngineContract):
    training = TrainingConfig(epochs=1, learning_rate=1e-2)

    @pytest.fixture
    def engine(self, tiny_engine: LocalEngine) -> LocalEngine:
        return tiny_engine


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    import transformers

    from bettertogether.engines import TransformersEngine

    engine = TransformersEngine.shared(tiny_model(transformers, tmp_path_factory.mktemp("models") / "tiny"))
    yield engine
    engine.close()


def tiny_model(transformers: Any, folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<bos>"],
        eos_token_id=vocabulary["<eos>"],
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def ask(engine: FakeEngine, text: str = "q", model: str = "local/fake", **config: Any) -> str | None:
    return engine.complete(Request(model, (Message.user(text),), config=Config(**config))).text


def test_the_answer_function_sees_model_messages_temperature_and_seed() -> None:
    engine = FakeEngine(lambda request: "yes")
    assert ask(engine, "hello", temperature=0.5, seed=3) == "yes"
    (request,) = engine.requests
    assert (request.model, request.user, request.temperature, request.seed) == ("local/fake", "hello", 0.5, 3)
    assert (request.system, request.demos, request.round, request.learned, request.trained_on) == ("", 0, 0, None, 0)


def test_the_text_parts_of_a_message_are_joined_and_an_image_is_refused_as_by_other_engines() -> None:
    engine = FakeEngine(lambda request: "ok")
    user = Message("user", (TextPart("Which "), TextPart("one?")))
    request = Request(model="local/fake", messages=(user,), system=(TextPart("Be "), TextPart("brief.")))
    engine.complete(request)
    assert (engine.requests[0].system, engine.requests[0].user) == ("Be brief.", "Which one?")
    shown = Message("user", (TextPart("What is this?"), ImagePart(url="https://a.test/b.png")))
    with pytest.raises(UnsupportedFeatureError, match="a part of type 'image'"):
        engine.complete(Request(model="local/fake", messages=(shown,)))


def test_a_mapping_as_answer_becomes_json() -> None:
    assert ask(FakeEngine(lambda request: {"a": 1})) == '{"a": 1}'


def test_training_remembers_each_rows_answer_to_its_prompt() -> None:
    engine = FakeEngine(lambda request: request.learned or "?")
    row = TrainingRow(({"role": "user", "content": "q"},), "a")
    model = engine.finetune([row]).model
    assert [ask(engine, "q", model), ask(engine, "other", model), ask(engine, "q")] == ["a", "?", "?"]
    assert engine.trainings == [(row,)]


def test_a_program_sees_demos_schema_and_rounds() -> None:
    engine = parity_engine(lambda *_: True)
    program = parity_program(engine)
    program.demos = numbers(2)
    with dspy.context(adapter=dspy.JSONAdapter()):
        compiled = LoRAFinetune(parity_match, train_prompt="optimized").compile(program, trainset=numbers(4, start=10))
        compiled(number=11)
    request = engine.requests[-1]
    assert (request.demos, request.round, request.trained_on) == (2, 1, 4)
    assert request.learned == '{\n  "parity": "odd"\n}'
    assert request.schema is not None


def test_delays_pass_in_parallel() -> None:
    engine = FakeEngine(lambda request: "yes", delay_s=lambda request: 0.3)
    threads = [threading.Thread(target=ask, args=(engine,)) for _ in range(5)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 <= time.monotonic() - started < 1.5
    assert len(engine.requests) == 5


def test_a_fake_engine_is_a_local_engine() -> None:
    assert isinstance(FakeEngine(lambda request: ""), LocalEngine)


def test_two_engines_of_one_name_are_not_mixed_up_by_their_states() -> None:
    engines = [FakeEngine(lambda request: "") for _ in range(2)]
    states = [engine.dump_state() for engine in engines]
    assert [FakeEngine.load_state(state) for state in states] == engines


@pytest.mark.parametrize("form", [pickle, cloudpickle])
def test_a_pickled_program_has_the_living_engine_again(form: Any) -> None:
    program = parity_program(parity_engine(lambda *_: True))
    assert form.loads(form.dumps(program)).lm.engine is program.lm.engine
