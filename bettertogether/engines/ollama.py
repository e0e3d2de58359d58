"""An Ollama Modelfile, under which a model is asked as its engine asks it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .protocol import ChatMessage
from .rendering import PROBES, PromptRenderer

MOST_CONTEXT = 8192
"""Tokens. Ollama's own default cuts prompts with demos; memory for the whole context of a large model is much. Ollama
cuts longer prompts, unless `num_ctx` is raised there."""
_TEMPLATE = (
    '{{ $after := "" }}{{ range .Messages }}{{ if eq .Role "system" }}%(system)s{{ else if eq .Role "assistant" }}'
    '%(assistant)s{{ else if eq $after "system" }}%(user after system)s{{ else if eq $after "assistant" }}'
    "%(user after assistant)s{{ else }}%(user)s{{ end }}{{ .Content }}{{ $after = .Role }}{{ end }}%(answer)s"
)


def modelfile(
    gguf_file: str, renderer: PromptRenderer, tokenizer: Any, context: int, sampling: Mapping[str, Any]
) -> str:
    """The Modelfile beside a GGUF file: prompts of the engine, its context up to `MOST_CONTEXT` tokens, and the
    temperature, top_p and top_k of the LM with these options; what it lacks is neutral, as in the engine."""
    top_p = sampling.get("top_p")
    parameters = {
        "temperature": sampling.get("temperature") or 0,
        "top_p": 1 if top_p is None else top_p,
        "top_k": sampling.get("top_k") or 0,
        "repeat_penalty": 1,
        "num_ctx": min(context, MOST_CONTEXT),
    }
    lines = [f"FROM ./{gguf_file}", *(f"PARAMETER {name} {value}" for name, value in parameters.items())]
    lines += [f'PARAMETER stop "{text}"' for text in renderer.stop]
    texts = _texts_before(renderer)
    if texts is None:
        lines.append(
            "# No TEMPLATE: this model's can't be said in Ollama's language. Ollama takes its nearest own one."
        )
    else:
        bos = tokenizer.bos_token or ""
        if bos and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
            # Ollama adds it.
            texts = {name: text.removeprefix(bos) for name, text in texts.items()}
        lines.append(f'TEMPLATE """{_TEMPLATE % texts}"""')
    return "\n".join(lines) + "\n"


def _texts_before(renderer: PromptRenderer) -> Mapping[str, str] | None:
    """What the chat template writes before each text of a chat and before the answer; None where that depends on more
    than the roles of a turn and the one before."""
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    start, after_system, assistant, after_assistant, *again, answer = _around(renderer, roles)
    user = _around(renderer, roles[1:])
    if again != [assistant, after_assistant] or user[1:] != [assistant, after_assistant, *again, answer]:
        return None
    texts = {"system": start, "user": user[0], "assistant": assistant, "answer": answer}
    texts |= {"user after system": after_system, "user after assistant": after_assistant}
    return None if any("{{" in text or '"""' in text for text in texts.values()) else texts


def _around(renderer: PromptRenderer, roles: Sequence[str]) -> list[str]:
    """The parts of a prompt around the texts of its turns."""
    texts = [f"{PROBES[1]}-{place}" for place in range(len(roles))]
    chat: list[ChatMessage] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return re.split("|".join(texts), renderer.text(chat))
