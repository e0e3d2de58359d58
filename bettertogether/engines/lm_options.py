"""What may be given to `local_lm` and `vllm_lm` for the LM itself, checked when it is made rather than at a call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dspy.lm15 import LM15Error, request_from_openai_chat
from dspy.utils.callback import BaseCallback
from pydantic.errors import PydanticUserError

from ..checks import is_number, plain, require, require_switch, require_whole
from ..errors import ConfigError
from .answer_format import plain_format

SAMPLING = (
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
    "rollout_id",
)
REQUEST = (
    "max_completion_tokens",
    "response_format",
    "tools",
    "user",
    "prompt_cache",
    "use_developer_role",
    "model_type",
)
CLIENT = (
    "cache", "callbacks", "num_retries", "provider", "finetuning_model", "launch_kwargs", "train_kwargs",
)  # fmt: skip
ALLOWED = frozenset({*SAMPLING, *REQUEST, *CLIENT})
ASKED = frozenset({*SAMPLING, *REQUEST}) - {"n", "rollout_id", "prompt_cache", "use_developer_role", "model_type"}
"""What goes into a request as it is given."""
OTHER_NAMES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens=",
    "max_length": "max_tokens=",
    "stop_sequences": "stop=",
    "stop_strings": "stop=",
    "do_sample": "temperature= (0 takes the likeliest token, 1 samples)",
    "num_return_sequences": "n=",
    "torch_dtype": "engine_options={'dtype': ...}",
    "device_map": "engine_options={'device': ...}",
    "enable_thinking": "engine_options={'chat_template_kwargs': {'enable_thinking': ...}}",
    "cache_in_memory": "dspy.configure_cache(...)",
}
"""What other libraries call it, and what to give here."""


def check_lm_options(options: Mapping[str, Any], engine_options: Collection[str]) -> None:
    """Raises ConfigError for an option that is not known, or for a value that it can't have.

    `engine_options` are the names of those that belong to the engine.
    """
    unknown = sorted(options.keys() - ALLOWED)
    if unknown:
        hints = [f"{name} goes into engine_options={{{name!r}: ...}}." for name in unknown if name in engine_options]
        hints += [f"For {name} give {OTHER_NAMES[name]}." for name in unknown if name in OTHER_NAMES]
        raise ConfigError(
            f"Options {unknown} are not known.{''.join(f' {h}' for h in hints)} Allowed: {sorted(ALLOWED)}."
        )
    for name in ("max_tokens", "max_completion_tokens", "top_k", "n"):
        require_whole(name, options.get(name), 1, optional=True)
    for name in ("seed", "rollout_id", "top_logprobs"):
        require_whole(name, options.get(name), 0, optional=True)
    require_whole("num_retries", options.get("num_retries", 0), 0)
    require_switch("cache", options.get("cache", True))
    temperature, top_p = options.get("temperature"), options.get("top_p")
    warm = temperature is None or (is_number(temperature) and 0 <= temperature <= 2)
    require(warm, "temperature", temperature, "a number from 0 to 2, or None")
    require(top_p is None or (is_number(top_p) and 0 <= top_p <= 1), "top_p", top_p, "a number from 0 to 1, or None")
    stop, callbacks = options.get("stop"), options.get("callbacks")
    texts = [stop] if isinstance(stop, str) else stop
    are_texts = _are_all(texts, str) and all(texts or ())
    require(are_texts, "stop", stop, "a text that ends the answer, or a list of such texts")
    require(_are_all(callbacks, BaseCallback), "callbacks", callbacks, "a list of dspy.utils.BaseCallback objects")
    tools = options.get("tools")
    require(
        not tools, "tools", tools, "none, as models here call no tools themselves: dspy.ReAct writes them into prompts"
    )
    _check_request(options)


def _check_request(options: Mapping[str, Any]) -> None:
    """Refuse what DSPy would refuse at every call, in its own words."""
    given = {name: plain(options[name]) for name in options.keys() & ASKED if options[name] is not None}
    try:
        asked = {name: plain_format(value) for name, value in given.items()}
        request_from_openai_chat({"model": "any", "messages": [{"role": "user", "content": ""}], **asked})
    except (TypeError, ValueError, RecursionError, PydanticUserError, LM15Error) as error:
        raise ConfigError(f"Options {given!r:.300} are not allowed: {error}.") from error


def _are_all(values: Any, kind: type) -> bool:
    return values is None or (isinstance(values, list | tuple) and all(isinstance(each, kind) for each in values))
