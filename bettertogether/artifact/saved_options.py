"""Which options of a saved LM, predictor or engine are taken from an artifact without asking.

An option can send the prompts, and the user's key, to another server (`api_base`, `headers`, `fallbacks`, ...), so
only those are taken that say how an answer is drawn. `load(folder, allow_unsafe_lm_state=True)` takes the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ArtifactError

SAMPLING = frozenset({
    "temperature", "max_tokens", "max_completion_tokens", "top_p", "top_k", "min_p", "stop", "seed", "n",
    "num_generations", "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs",
    "reasoning_effort", "verbosity", "rollout_id", "cache", "num_retries", "timeout", "user",
})  # fmt: skip
"""Options that may have a plain value: text, a number, a truth value, None, or a list of these."""
NESTED = frozenset({"extra_body", "logit_bias", "response_format", "reasoning", "thinking", "chat_template_kwargs"})
"""Options that may have a mapping; those of an `extra_body` are options again."""
LM_IDENTITY = frozenset({
    "_dspy_lm_class", "model", "model_type", "engine", "finetuning_model", "use_developer_role", "prompt_cache",
    "launch_kwargs", "train_kwargs",
})  # fmt: skip
"""What DSPy saves of an LM besides its options."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
TEMPLATE_ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of a tokenizer's `apply_chat_template` that are no variables of the template."""


def check_options(options: Mapping[str, Any], owner: str, *, allow: bool) -> None:
    """Raise ArtifactError, with what to do, for options that a file may not set unless it is trusted."""
    refused = [] if allow else list(_refused(options))
    if refused:
        raise _not_taken(owner, refused)


def check_lm_state(state: Mapping[str, Any], owner: str, *, allow: bool) -> None:
    """`check_options` for what DSPy saves of an LM."""
    if allow:
        return
    refused = list(_refused({key: value for key, value in state.items() if key not in LM_IDENTITY}))
    refused += [key for key in ("launch_kwargs", "train_kwargs") if state.get(key)]
    refused += ["engine"] if not isinstance(state.get("engine", ""), str) else []
    refused += ["model"] if "://" in str(state.get("model")) else []
    if refused:
        # Dropping an endpoint, as DSPy does, would send the user's data to the provider's public service instead.
        raise _not_taken(owner, [f"{name}={state[name]!r:.100}" if name in state else name for name in refused])


def _not_taken(owner: str, refused: list[str]) -> ArtifactError:
    return ArtifactError(
        f"{owner} was saved with {', '.join(refused)}, which a file may not set: it could send your prompts and keys "
        "to another server. If you trust this file, give allow_unsafe_lm_state=True; otherwise take it out of the "
        "file, or give the LM yourself: lms={predictor: lm}."
    )


def _refused(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        path = f"{prefix}{name}"
        if name == "extra_body" and isinstance(value, Mapping):
            yield from _refused(value, f"{path}.")
        elif not (name in SAMPLING and _is_plain(value)) and not (name in NESTED and _is_nested(value)):
            yield path


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) and not isinstance(item, list) for item in value)
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, Mapping | str)


def check_engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The engine options of an artifact: dtype and variables of the chat template. Raises ArtifactError for others."""
    unknown = sorted(options.keys() - {"dtype", "chat_template_kwargs"})
    dtype, variables = options.get("dtype"), options.get("chat_template_kwargs")
    if unknown:
        raise ArtifactError(
            f"engine_options holds {unknown}; a file may set dtype and chat_template_kwargs. Give others by an engine "
            "of your own: load(folder, base_model=engine)."
        )
    if dtype is not None and dtype not in DTYPES:
        raise ArtifactError(f"engine_options: dtype is {dtype!r:.100}, allowed are {DTYPES}.")
    if variables is not None and (not isinstance(variables, Mapping) or not all(map(_is_plain, variables.values()))):
        raise ArtifactError(f"engine_options: chat_template_kwargs is {variables!r:.200}, allowed are plain values.")
    if reserved := sorted(TEMPLATE_ARGUMENTS & set(variables or ())):
        raise ArtifactError(f"engine_options: chat_template_kwargs holds {reserved}, which are no template variables.")
    return {name: value for name, value in options.items() if value is not None}
