"""From requests to chat messages, and from messages to tokens."""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dspy.lm15 import (
    DataPart,
    InvalidRequestError,
    Request,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    UnsupportedFeatureError,
)

from ..errors import ModelError
from ..printable import get_logger
from .protocol import ChatMessage
from .thinking import AFTER, CLOSE, EMPTY, OPEN

logger = get_logger(__name__)

DEFAULT_TEMPLATE_KWARGS: Mapping[str, Any] = {"enable_thinking": False}
"""Templates that know no such switch ignore it."""
_ANSWER = '{"a": 1}'
DATE = datetime.date(2024, 7, 26)
"""What templates that write today's date into each prompt write here: the prompts of a training, of its continuation
tomorrow and of a program that is loaded next year have to be the same. It is the one that Llama's template falls back
to; `chat_template_kwargs={"date_string": ...}` sets another where the template has such a variable."""
FINAL_CHANNEL = "<|channel|>final<|message|>"
"""Harmony (gpt-oss): what stands before an answer for the user. Nothing is thought before it."""
PLAIN_STOP = ("\n\n### User:", "\n\n### Assistant:")
"""Where a model without a chat template goes on with a turn that is not its answer, as a model that no training has
taught the end of one does."""
_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "### {{ message['role'] | capitalize }}:\n{% endif %}{{ message['content'] }}\n\n{% endfor %}"
    "### Assistant:{{ '\\n' }}"
)
_TOOLS_AS_TEXT = "Use an adapter with use_native_function_calling=False, which writes tools as text."
PROBES = ("probe-system-a1", "probe-user-b2", "probe-assistant-c3", "probe-user-d4")


def messages_of(request: Request) -> tuple[ChatMessage, ...]:
    """The chat messages of a request: its system text first, then its turns, the text parts of each joined.

    Reasoning in earlier answers is left out, as the models' own templates do. Raises UnsupportedFeatureError for
    tools, images and whatever else is not text.
    """
    if request.tools:
        raise UnsupportedFeatureError(
            f"{len(request.tools)} tools came with the request; the local engine has no native tool calling. "
            f"{_TOOLS_AS_TEXT}",
            feature="tools",
        )
    system: list[str] = []
    turns: list[ChatMessage] = []
    if request.system is not None:
        parts = (TextPart(request.system),) if isinstance(request.system, str) else request.system
        system.append(_text(parts, "system"))
    for position, message in enumerate(request.messages):
        text = _text(message.parts, f"messages[{position}]")
        if message.role == "developer" and not turns:
            system.append(text)
        else:
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    head: list[ChatMessage] = [{"role": "system", "content": "\n\n".join(system)}] if any(system) else []
    return (*head, *turns)


def _text(parts: Sequence[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif not isinstance(part, ThinkingPart):
            kind = "data" if isinstance(part, DataPart) else getattr(part, "type", type(part).__name__)
            raise UnsupportedFeatureError(
                f"{where} holds a part of type {kind!r}; the local engine takes text only."
                + f" {_TOOLS_AS_TEXT}" * isinstance(part, ToolCallPart | ToolResultPart),
                feature=f"{where}.parts[{index}]",
            )
    return "".join(texts)


class PromptRenderer:
    """Turns messages into tokens with a model's own chat template.

    Without a template the format is plain: the beginning-of-text token where the tokenizer has one, the system text,
    then "### User:", "### Assistant:" and each text on lines of their own. The end-of-text token ends answers, and so
    does a turn that the model opens itself (`stop`); no text of a message or an answer is read as a special token.
    A template that knows no system turn gets the system text at the head of the first user turn.

    Where the template opens a block of thinking, or was told to think (`enable_thinking` or `thinking` is True),
    prompts end in the opened block: `thinks`. An answer to be learned then closes it at once, unless it holds thoughts
    of its own ("thoughts\\n</think>\\n\\nanswer").

    Args:
        tokenizer: A transformers tokenizer.
        eos_ids: Tokens with which the model ends an answer, from its generation config.
        template_kwargs: Variables for the template.

    Raises ModelError for a template that loses the text of a turn.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], template_kwargs: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._template_kwargs = dict(DEFAULT_TEMPLATE_KWARGS if template_kwargs is None else template_kwargs)
        self._lock = threading.Lock()
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._template = _dated(tokenizer.get_chat_template()) if self._has_template else _PLAIN_TEMPLATE
        self._reading = {} if self._has_template else {"split_special_tokens": True}
        self._merge_system = False
        self._merge_system = not self._keeps_text(PROBES)
        if self._merge_system and not self._keeps_text(PROBES):
            raise ModelError(
                "The chat template of this model loses text: a chat of system, user, assistant and user turns "
                f"does not hold all four texts when rendered. Rendered: {self._render_probe(PROBES)!r:.500}. "
                "Set another tokenizer.chat_template in the model's folder."
            )
        if not self._has_template:
            logger.warning("The model has no chat template; prompts are written as '### User:' and '### Assistant:'.")
        self.stop: tuple[str, ...] = () if self._has_template else PLAIN_STOP
        """Texts that end an answer, beside the tokens that do."""
        self._tail, self.thinks = self._ways_in()
        """What ends a prompt after what the template writes, and whether answers begin with thoughts."""
        self.end_id = self._end_of_turn(set(eos_ids))
        start = self._encode(_ANSWER)
        self._prefixes = self._encode("\n" + _ANSWER)[-len(start) :] != start

    def template(self) -> str:
        """A chat template that writes the same prompts where other programs read it: dates and variables are fixed."""
        used = {name: value for name, value in self._template_kwargs.items() if name in self._template}
        return "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in used.items()) + self._template

    def text(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt as text, ending where the answer begins. Raises InvalidRequestError."""
        return self._render(messages, add_generation_prompt=True) + self._tail

    def prompt_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a prompt."""
        text, start = self.text(messages), self._tokenizer.bos_token_id
        if self._has_template or start is None:
            return self._encode(text)
        return [start, *self._encode(text.removeprefix(self._tokenizer.bos_token))]

    def completion_tokens(self, completion: str) -> list[int]:
        """Token ids of an answer as it comes after a prompt, ended by the end-of-turn token."""
        return [*self.after_prompt(self._with_thoughts(completion)), self.end_id]

    def completion_places(self, completion: str) -> list[tuple[int, int]]:
        """Where in a completion each of its tokens lies, as start and end in characters; equal for one that is added.
        Empty from a tokenizer that can't tell."""
        if not self._tokenizer.is_fast:
            return []
        text = self._with_thoughts(completion)
        lead = self._lead(text)
        places = self._encoded(lead + text, return_offsets_mapping=True).offset_mapping[len(self._encode(lead)) :]
        added = len(lead) + len(text) - len(completion)
        return [*((max(0, start - added), max(0, end - added)) for start, end in places), (len(completion),) * 2]

    def answer_start(self, completion: str) -> int:
        """Where in a completion the answer begins, after the thoughts that it may hold."""
        thoughts, close, _ = completion.partition(CLOSE + AFTER)
        return len(thoughts + close) if self.thinks and close else 0

    def _with_thoughts(self, completion: str) -> str:
        return EMPTY + completion if self.thinks and CLOSE not in completion else completion

    def after_prompt(self, text: str) -> list[int]:
        """Token ids of a text that is no beginning, before which SentencePiece tokenizers would put a space: under a
        grammar the engine never writes one. None of them reaches into the prompt, whose tokens are there first."""
        lead = self._lead(text)
        return self._encode(lead + text)[len(self._encode(lead)) :]

    def _lead(self, text: str) -> str:
        """What has to stand before a text, and is cut off again, so that it is tokenized as no beginning."""
        if not self._prefixes:
            return ""
        before = self._encode("\n")
        return "\n" if self._encode("\n" + text)[: len(before)] == before else ""

    def _encode(self, text: str) -> list[int]:
        return list(self._encoded(text).input_ids)

    def _encoded(self, text: str, **options: Any) -> Any:
        with self._lock:
            return self._tokenizer(text, add_special_tokens=False, **self._reading, **options)

    def _render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        turns = _merged(messages) if self._merge_system else list(messages)
        try:
            with self._lock:
                return str(
                    self._tokenizer.apply_chat_template(
                        turns,
                        chat_template=self._template,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **self._template_kwargs,
                    )
                )
        except Exception as error:  # jinja raises whatever a template's author chose
            roles = [turn["role"] for turn in turns]
            raise InvalidRequestError(f"The model's chat template rejects turns {roles}: {error}") from error

    def _render_probe(self, probes: Sequence[str]) -> str:
        roles = ("system", "user", "assistant", "user")
        chat: list[ChatMessage] = [{"role": role, "content": text} for role, text in zip(roles, probes, strict=True)]
        try:
            return self._render(chat, add_generation_prompt=True)
        except InvalidRequestError as error:
            return f"({error})"

    def _keeps_text(self, probes: Sequence[str]) -> bool:
        places = [self._render_probe(probes).find(probe) for probe in probes]
        return places[0] >= 0 and places == sorted(set(places))

    def _ways_in(self) -> tuple[str, bool]:
        """What is missing at the end of a prompt before an answer can begin, and whether it begins with thoughts.

        Raises ModelError where the end of thinking can't be seen in an answer's text.
        """
        tail = self._render_probe(PROBES).rpartition(PROBES[3])[2]
        if "<|channel|>" in self._template and tail.endswith("<|start|>assistant"):
            return FINAL_CHANNEL, False
        opened = tail.rfind(OPEN) > tail.rfind(CLOSE)
        asked = any(self._template_kwargs.get(name) is True for name in ("enable_thinking", "thinking"))
        if not opened and not (asked and CLOSE in self._template):
            return "", False
        if CLOSE in self._tokenizer.all_special_tokens:
            raise ModelError(
                f"This model thinks before it answers, and its tokenizer drops {CLOSE} from texts as a special token. "
                'Give chat_template_kwargs={"enable_thinking": False}, or a chat template that does not open a '
                f"{OPEN} block."
            )
        return "" if opened else f"{OPEN}\n", True

    def _end_of_turn(self, eos_ids: set[int]) -> int:
        """The first token after an assistant's text that ends answers or is special; else the tokenizer's eos."""
        if self._has_template:
            chat: list[ChatMessage] = [
                {"role": "user", "content": PROBES[1]},
                {"role": "assistant", "content": PROBES[2]},
            ]
            rest = self._render(chat, add_generation_prompt=False).rpartition(PROBES[2])[2]
            enders = eos_ids | set(self._tokenizer.all_special_ids)
            found = next((token_id for token_id in self._encode(rest) if token_id in enders), None)
            if found is not None:
                return found
        if self._tokenizer.eos_token_id is None:
            raise ModelError("The tokenizer names no end-of-text token (eos_token); set one in tokenizer_config.json.")
        return int(self._tokenizer.eos_token_id)


def _dated(template: str) -> str:
    """The template with a fixed date in place of today's: functions can't be handed to it."""
    return re.sub(
        r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda call: json.dumps(DATE.strftime(call.group(2))), template
    )


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The same chat with each system text at the head of the next user turn."""
    turns: list[ChatMessage] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"])
        elif message["role"] == "user" and held:
            turns.append({"role": "user", "content": "\n\n".join([*held, message["content"]])})
            held = []
        else:
            turns.append({"role": message["role"], "content": message["content"]})
    for text in held:
        turns.append({"role": "user", "content": text})
    return turns
