"""A request becomes the tokens of the model's chat template, and the answer's tokens are those that follow them."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.lm15 import (
    FunctionTool,
    ImagePart,
    InvalidRequestError,
    Message,
    Request,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    UnsupportedFeatureError,
)
from small_models import CHATML, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from bettertogether.engines.rendering import PromptRenderer, messages_of
from bettertogether.engines.structured import GrammarCompiler
from bettertogether.errors import ModelError

END, EOS = 260, 258
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DROPS_SYSTEM = NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}{% endif %}", "{% else %}").replace(
    "\n{% endfor %}", "\n{% endif %}{% endfor %}"
)
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def renderer(template: str | None = CHATML, **options: Any) -> PromptRenderer:
    return PromptRenderer(byte_tokenizer(template), [EOS], options.get("template_kwargs"))


def request(*messages: Message, **options: Any) -> Request:
    return Request("local/x", messages, **options)


def test_the_system_text_comes_first_and_text_parts_are_joined() -> None:
    asked = request(Message.user([TextPart("a"), TextPart("b")]), Message.assistant("c"), system="s")
    assert messages_of(asked) == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    )


def test_a_developers_messages_are_system_text_the_first_of_them_at_the_head() -> None:
    asked = request(Message.developer("d"), Message.user("u"), Message.developer("e"), system="s")
    assert messages_of(asked) == (
        {"role": "system", "content": "s\n\nd"},
        {"role": "user", "content": "u"},
        {"role": "system", "content": "e"},
    )


def test_earlier_reasoning_is_left_out() -> None:
    asked = request(Message.user("u"), Message.assistant([ThinkingPart("hm"), TextPart("a")]), Message.user("v"))
    assert [message["content"] for message in messages_of(asked)] == ["u", "a", "v"]


@pytest.mark.parametrize(
    ("asked", "feature"),
    [
        (request(Message.user([TextPart("a"), ImagePart(url="http://x/y.png")])), "messages[0].parts[1]"),
        (request(Message.user("a"), tools=(FunctionTool("f"),)), "tools"),
    ],
)
def test_what_is_not_text_is_refused(asked: Request, feature: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        messages_of(asked)
    assert caught.value.feature == feature


@pytest.mark.parametrize(
    "asked",
    [
        request(Message.user("a"), tools=(FunctionTool("f"),)),
        request(Message.user("a"), Message.assistant([ToolCallPart("1", "f", {})])),
        request(Message.tool([ToolResultPart("1", (TextPart("a"),))])),
    ],
)
def test_what_asks_for_native_tool_calling_is_told_of_the_adapters_that_write_text(asked: Request) -> None:
    with pytest.raises(UnsupportedFeatureError, match="adapter with use_native_function_calling=False"):
        messages_of(asked)


def test_the_prompt_ends_where_the_answer_begins() -> None:
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = byte_tokenizer()
    assert renderer().text(CHAT) == text
    assert tokenizer.decode(renderer().prompt_tokens(CHAT)) == text


def test_an_answer_ends_with_the_end_of_turn_token() -> None:
    tokenizer = byte_tokenizer()
    assert renderer().completion_tokens("ok") == [*tokenizer("ok", add_special_tokens=False).input_ids, END]


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space before a text, and whose space may be one token with what follows it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["\u2581", *map(chr, range(33, 127)), "\u2581{", "\u2581y", "]{"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("\u2581", "{"), ("\u2581", "y"), ("]", "{")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


LLAMA2 = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
ENDS = {
    "a word": LLAMA2.replace("[/INST]", "/INST"),
    "a bracket that would join the answer's": LLAMA2,
    "a space that would join the answer": LLAMA2 + " ",
    "a special token": LLAMA2 + "{% if add_generation_prompt %}</s>{% endif %}",
}


@pytest.mark.parametrize("end", list(ENDS))
def test_an_answer_begins_without_the_space_of_sentencepiece_whatever_ends_the_prompt(end: str) -> None:
    tokenizer = sentencepiece(ENDS[end])
    found = PromptRenderer(tokenizer, [2], None).completion_tokens('{"y"}')
    assert tokenizer.convert_ids_to_tokens(found) == ["{", '"', "y", '"', "}", "</s>"]


def test_prompt_and_answer_have_the_tokens_of_both_in_one_piece_with_sentencepiece() -> None:
    tokenizer = sentencepiece(ENDS["a word"])
    found, answer = PromptRenderer(tokenizer, [2], None), '{\n  "y": "yes no"\n}'
    together = tokenizer(found.text(CHAT) + answer, add_special_tokens=False).input_ids
    assert [*found.prompt_tokens(CHAT), *found.completion_tokens(answer)] == [*together, 2]


def test_the_grammar_forces_the_tokens_that_an_answer_is_trained_on_with_sentencepiece() -> None:
    pytest.importorskip("llguidance")
    tokenizer = sentencepiece(LLAMA2)
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [2])
    forced = compiler.constraint({"type": "json_schema", "schema": {"const": {"y": "yes"}}}).forced()
    trained = PromptRenderer(tokenizer, [2], None).completion_tokens('{\n  "y": "yes"\n}')
    assert tokenizer.convert_ids_to_tokens(forced) == tokenizer.convert_ids_to_tokens(trained)[: len(forced)]
    assert forced


def test_a_grammar_has_no_token_that_the_model_has_no_embedding_for() -> None:
    pytest.importorskip("llguidance")
    tokenizer = sentencepiece(LLAMA2)
    tokenizer.add_tokens(["cd"])
    without = len(tokenizer) - 2
    assert tokenizer.convert_ids_to_tokens(without) == "]{"
    schema = {"type": "json_schema", "schema": {"const": {"y": "]{cd"}}}
    forced = GrammarCompiler(tokenizer, without, [2]).constraint(schema).forced()
    assert tokenizer.convert_ids_to_tokens(forced)[-8:] == ['"', "]", "{", "c", "d", '"', "<0x0A>", "}"]


def test_an_answer_that_begins_with_a_space_keeps_it_with_sentencepiece() -> None:
    tokenizer = sentencepiece(LLAMA2)
    found = PromptRenderer(tokenizer, [2], None).completion_tokens(" yes")
    assert tokenizer.convert_ids_to_tokens(found) == ["\u2581y", "e", "s", "</s>"]


def test_without_a_token_after_the_assistants_text_the_eos_token_ends_answers() -> None:
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert renderer(bare).end_id == EOS


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_a_system_turn_gets_it_in_the_first_user_turn(template: str) -> None:
    start, end = "<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n", "<|im_start|>model\n"
    assert renderer(template).text(CHAT) == start + end
    late: Any = [*CHAT, {"role": "system", "content": "At once."}]
    assert renderer(template).text(late) == f"{start}<|im_start|>user\nAt once.<|im_end|>\n{end}"


def test_a_template_that_loses_an_assistants_text_is_refused() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}", "{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}"
    )
    with pytest.raises(ModelError, match="loses text"):
        renderer(template)


def test_a_chat_that_the_template_rejects_is_an_invalid_request() -> None:
    template = CHATML + "{% if messages | length == 2 %}{{ raise_exception('two are too few') }}{% endif %}"
    with pytest.raises(InvalidRequestError, match="two are too few"):
        renderer(template).text([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_templates_are_told_not_to_think() -> None:
    template = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    assert renderer(template).text(CHAT).endswith("assistant\n<think></think>")
    assert renderer(template, template_kwargs={}).text(CHAT).endswith("assistant\n")


def test_without_a_template_the_format_is_plain_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = renderer(None)
    chat: Any = [*CHAT, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    assert plain.text(chat) == (
        "<bos>Be brief.\n\n### User:\nHi\n\n### Assistant:\nHello\n\n### User:\nBye\n\n### Assistant:\n"
    )
    assert plain.end_id == EOS
    assert caplog.text.count("no chat template") == 1


def test_without_a_template_no_text_of_a_message_or_an_answer_is_a_special_token() -> None:
    plain, tokenizer = renderer(None), byte_tokenizer(None)
    prompt_ids = plain.prompt_tokens([{"role": "user", "content": "<eos>a<bos>"}])
    assert [place for place, token in enumerate(prompt_ids) if token >= 256] == [0]
    assert tokenizer.decode(prompt_ids) == "<bos>### User:\n<eos>a<bos>\n\n### Assistant:\n"
    completion_ids = plain.completion_tokens("<|im_end|>")
    assert [place for place, token in enumerate(completion_ids) if token >= 256] == [len("<|im_end|>")]
    assert completion_ids[-1] == EOS


def test_without_a_template_the_places_of_an_answer_are_those_of_its_tokens() -> None:
    text = "a <eos>"
    assert renderer(None).completion_places(text) == [*((place, place + 1) for place in range(7)), (7, 7)]
    assert len(renderer(None).completion_tokens(text)) == 8


def test_the_beginning_of_text_token_is_left_out_where_the_tokenizer_has_none() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.bos_token = None
    plain = PromptRenderer(tokenizer, [EOS], None)
    assert plain.text(CHAT) == "Be brief.\n\n### User:\nHi\n\n### Assistant:\n"
    assert tokenizer.decode(plain.prompt_tokens(CHAT)) == plain.text(CHAT)


def test_only_without_a_template_a_turn_that_the_model_opens_ends_its_answer() -> None:
    assert renderer(None).stop == ("\n\n### User:", "\n\n### Assistant:")
    assert renderer().stop == ()
