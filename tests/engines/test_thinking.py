"""Reasoning models think first, within a bound, and answer under the schema after that."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import dspy
import pytest
import transformers.utils.chat_template_utils as chat_templates
from dspy._vendor.lm15.result import StreamAccumulator
from dspy.lm15 import Config, Message, Request, ThinkingDelta
from small_models import CHATML, VOCABULARY, byte_tokenizer, save_model

from bettertogether.engines import TransformersEngine
from bettertogether.engines.answers import FinishedAnswer
from bettertogether.engines.local.job import Job
from bettertogether.engines.local.thinking import ThinkingConstraint
from bettertogether.engines.rendering import PromptRenderer
from bettertogether.engines.structured import GrammarCompiler, after_thoughts, answer_grammar
from bettertogether.engines.thinking import ThoughtSplitter, split_thoughts
from bettertogether.errors import ModelError
from bettertogether.lm import engine_lm

EOS = 258
TOKENIZER = byte_tokenizer()
R1 = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
QWEN3 = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|im_end|>"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today Date: {{ date_string }}\n" + CHATML
)
CHAT: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"label": {"enum": ["good", "bad"]}},
        "required": ["label"],
        "additionalProperties": False,
    },
}


def renderer(template: str, **template_kwargs: Any) -> PromptRenderer:
    return PromptRenderer(byte_tokenizer(template), [EOS], template_kwargs or None)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("made", "tail", "answer"),
    [
        (renderer(R1), "assistant\n<think>\n", "\n</think>\n\nok<|im_end|>"),
        (renderer(QWEN3, enable_thinking=True), "assistant\n<think>\n", "\n</think>\n\nok<|im_end|>"),
        (renderer(QWEN3, thinking=True), "assistant\n<think>\n", "\n</think>\n\nok<|im_end|>"),
        (renderer(QWEN3), "assistant\n<think>\n\n</think>\n\n", "ok<|im_end|>"),
        (renderer(QWEN3, enable_thinking=False), "assistant\n<think>\n\n</think>\n\n", "ok<|im_end|>"),
        (renderer(HARMONY), "<|start|>assistant<|channel|>final<|message|>", "ok<|im_end|>"),
    ],
)
def test_a_learned_answer_follows_the_prompt_as_the_template_writes_it(
    made: PromptRenderer, tail: str, answer: str
) -> None:
    assert made.text(CHAT).endswith(tail)
    assert TOKENIZER.decode(made.completion_tokens("ok")) == answer


def test_a_learned_answer_may_hold_its_own_thoughts() -> None:
    tokens = renderer(R1).completion_tokens("hm\n</think>\n\nok")
    assert TOKENIZER.decode(tokens) == "hm\n</think>\n\nok<|im_end|>"


def test_a_tokenizer_that_drops_the_end_of_thinking_is_refused() -> None:
    tokenizer = byte_tokenizer(R1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "</think>"]})
    with pytest.raises(ModelError, match="thinks before it answers"):
        PromptRenderer(tokenizer, [EOS], None)


def test_a_template_that_writes_todays_date_writes_the_same_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    gpt_oss = 'Current date: {{ strftime_now("%Y-%m-%d") }}\n' + CHATML
    for day in (25, 26):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Self:
                return cls(2026, 11, day)  # noqa: B023

        monkeypatch.setattr(chat_templates, "datetime", Clock)
        texts.append(renderer(LLAMA).text(CHAT))
        assert renderer(gpt_oss).text(CHAT).startswith("Current date: 2024-07-26\n")
    assert texts[0] == texts[1]
    assert "Today Date: 26 Jul 2024" in texts[0]
    assert "Today Date: 1 May 2025" in renderer(LLAMA, date_string="1 May 2025").text(CHAT)


def text_of(token_ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(token_ids)))


def thinking(most: int = 1000, schema: Any = SCHEMA) -> ThinkingConstraint:
    answer = GrammarCompiler(TOKENIZER, VOCABULARY, [EOS]).constraint(schema) if schema else None
    return ThinkingConstraint(answer, most=most, encode=ids, decode=text_of, eos_ids=[EOS])


def write(constraint: ThinkingConstraint, text: str) -> None:
    for token_id in ids(text):
        assert constraint.allows(token_id), text
        constraint.advance(token_id)


def test_the_grammar_begins_after_the_end_of_thinking() -> None:
    constraint = thinking()
    write(constraint, 'so {"label": maybe\n</think>')
    assert TOKENIZER.decode(constraint.forced()) == '\n\n{\n  "label": "'
    write(constraint, "g")
    assert TOKENIZER.decode(constraint.forced()) == 'ood"\n}'
    assert constraint.ended


def test_thinking_ends_at_its_bound() -> None:
    constraint = thinking(most=5)
    write(constraint, "abcde")
    assert TOKENIZER.decode(constraint.forced()) == '\n</think>\n\n{\n  "label": "'


def test_thinking_can_not_end_the_answer() -> None:
    constraint = thinking(schema=None)
    assert not constraint.allows(EOS)
    write(constraint, "</think>\n\nfree text")
    assert constraint.allows(EOS)
    assert not constraint.ended


@pytest.mark.parametrize(("text", "allowed"), [("a", {97}), ("", set(range(261)) - {EOS})])
def test_the_mask_is_what_is_allowed(text: str, allowed: set[int]) -> None:
    import numpy as np

    constraint = thinking(most=1)
    write(constraint, text)
    bits = np.zeros(9, dtype=np.uint32)
    constraint.fill_mask(bits.ctypes.data, bits.nbytes)
    found = set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))) & set(range(261))
    assert found == ({ids("\n")[0]} if text else allowed)
    assert found == {token_id for token_id in range(261) if constraint.allows(token_id)}


TEXT = "one < two\n</thin\n</think>\n\nthe answer\n\n"


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_thoughts_are_split_off_text_that_comes_in_pieces_as_off_the_whole(size: int) -> None:
    splitter = ThoughtSplitter()
    pieces = [splitter.push(TEXT[start : start + size]) for start in range(0, len(TEXT), size)]
    assert "".join(thought for thought, _ in pieces).strip("\n") == split_thoughts(TEXT)[0] == "one < two\n</thin"
    assert "".join(answer for _, answer in pieces) == split_thoughts(TEXT)[1] == "the answer\n\n"


def test_text_without_an_end_of_thinking_is_all_thought() -> None:
    assert split_thoughts("still thinking") == ("still thinking", "")
    splitter = ThoughtSplitter()
    assert [splitter.push("2 <"), splitter.push(" 3 </thi"), splitter.finish()] == [("2 ", ""), ("< 3 ", ""), "</thi"]


def test_the_grammar_for_a_server_lets_thoughts_come_first() -> None:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    grammar = LLMatcher.grammar_from_lark(after_thoughts(answer_grammar(SCHEMA)))
    matcher = LLMatcher(from_tokenizer(TOKENIZER, n_vocab=VOCABULARY, eos_token=[EOS]), grammar, log_level=0)
    assert matcher.consume_tokens(ids('hm {\n</think>\n\n{\n  "label": "good"\n}'))
    assert matcher.is_stopped()


@pytest.fixture(scope="module")
def reasoning_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    made = TransformersEngine(save_model(tmp_path_factory.mktemp("models") / "r1", None, R1))
    yield made
    made.close()


def asked(engine: TransformersEngine, **config: Any) -> Request:
    config = {"max_tokens": 80, "temperature": 1.0, "seed": 3, "response_format": SCHEMA, **config}
    return Request(f"local/{engine.base_name}", (Message.user("Hi"),), config=Config(**config))


def test_an_answer_has_its_thoughts_apart_and_follows_the_schema(reasoning_engine: TransformersEngine) -> None:
    response = reasoning_engine.complete(asked(reasoning_engine))
    assert [part.type for part in response.message.parts] == ["thinking", "text"]
    assert json.loads(response.text or "")["label"] in ("good", "bad")
    assert response.finish_reason == "stop"


def test_a_stream_brings_thoughts_and_answer_as_parts_of_their_own(reasoning_engine: TransformersEngine) -> None:
    response = reasoning_engine.complete(asked(reasoning_engine))
    deltas = [event.delta for event in reasoning_engine.stream(asked(reasoning_engine)) if event.type == "delta"]
    texts = {kind: "".join(d.text for d in deltas if d.type == kind) for kind in ("thinking", "text")}
    assert texts["text"] == response.text
    assert texts["thinking"].strip("\n") == response.message.parts[0].text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_that_ends_within_the_thoughts_brings_all_of_them(
    asynchronous: bool, reasoning_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(job: Job) -> None:
        assert job.sink is not None
        job.sink("1 <", ())
        job.future.set_result(FinishedAnswer("1 <", "length", 1, 0, 3, (), cut=False))

    async def streamed() -> list[Any]:
        return [event async for event in reasoning_engine.stream_async(asked(reasoning_engine))]

    monkeypatch.setattr(reasoning_engine._scheduler, "submit", answer)
    events = asyncio.run(streamed()) if asynchronous else list(reasoning_engine.stream(asked(reasoning_engine)))
    assert [event.delta for event in events[1:-1]] == [ThinkingDelta("1 "), ThinkingDelta("<")]


def test_dspy_parses_the_answer_and_has_the_thoughts_beside_it(reasoning_engine: TransformersEngine) -> None:
    class Judge(dspy.Signature):
        text: str = dspy.InputField()
        label: Literal["good", "bad"] = dspy.OutputField()

    lm = engine_lm(reasoning_engine, cache=False, temperature=1.0, seed=3, max_tokens=80)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Judge)(text="x").label in ("good", "bad")
    assert lm.history[-1]["outputs"][0]["reasoning_content"]


def test_log_probabilities_come_with_thoughts_too(reasoning_engine: TransformersEngine) -> None:
    response = reasoning_engine.complete(asked(reasoning_engine, logprobs=0))
    assert response.logprobs is not None
    assert json.loads(response.text or "")["label"] in ("good", "bad")


@pytest.mark.parametrize("max_tokens", [80, 3])
def test_a_stream_has_the_log_probabilities_of_its_thoughts_too(
    max_tokens: int, reasoning_engine: TransformersEngine
) -> None:
    request = asked(reasoning_engine, logprobs=0, max_tokens=max_tokens, response_format=None)
    accumulator = StreamAccumulator(request)
    for event in reasoning_engine.stream(request):
        accumulator.push(event)
    streamed, whole = accumulator.response(), reasoning_engine.complete(request)
    assert streamed.logprobs == whole.logprobs
    assert len(whole.logprobs or ()) == whole.usage.output_tokens
    assert [part.type for part in streamed.message.parts] == [part.type for part in whole.message.parts]


def test_a_model_folder_is_enough(tmp_path: Path) -> None:
    engine = TransformersEngine(
        save_model(tmp_path / "qwen3", None, QWEN3), chat_template_kwargs={"enable_thinking": True}
    )
    assert engine.complete(asked(engine)).message.parts[0].type == "thinking"
    engine.close()
