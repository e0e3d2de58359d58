"""What engines are made with: checked when it is given, and what of it is part of a model's name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from bettertogether import local_lm
from bettertogether.engines.local.options import TransformersOptions
from bettertogether.engines.options import EngineOptions
from bettertogether.engines.vllm.options import VLLMOptions
from bettertogether.errors import ConfigError


@pytest.mark.parametrize("kind", [TransformersOptions, VLLMOptions])
def test_a_misspelt_option_is_an_error_that_lists_those_allowed(kind: type[EngineOptions]) -> None:
    with pytest.raises(ConfigError, match=r"\['cache_foldr'\] are not known\. Allowed: \['.*'cache_folder', 'chat_"):
        kind.of({"cache_foldr": "x"})


def test_a_misspelt_engine_option_of_an_lm_lists_those_allowed(tmp_path: Path) -> None:
    allowed = (
        r"\['adapters', 'cache_bytes', 'cache_folder', 'chat_template_kwargs', 'device', 'dtype', 'max_batch_size'\]"
    )
    with pytest.raises(ConfigError, match=rf"engine_options \['dtypo'\] are not known\. Allowed: {allowed}\."):
        local_lm(tmp_path, engine_options={"dtypo": "float32"})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TransformersOptions, "dtype", "float8"),
        (TransformersOptions, "device", 5),
        (TransformersOptions, "max_batch_size", True),
        (TransformersOptions, "cache_folder", 5),
        (VLLMOptions, "url", "host:8000"),
        (VLLMOptions, "concurrency", 0),
        (VLLMOptions, "request_timeout_s", "600"),
    ],
)
def test_a_value_that_an_option_can_not_have_is_an_error_that_says_what_may_be_given(
    kind: type[EngineOptions], name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={value!r} is not allowed .*: give "):
        kind(**{name: value})


def test_a_key_is_neither_shown_nor_saved() -> None:
    options = VLLMOptions(api_key="hidden")
    assert "hidden" not in repr(options)
    assert "api_key" not in options.saved()
    with pytest.raises(ConfigError, match=r"^api_key is not allowed \(a str\)"):
        VLLMOptions(api_key="gehëim")


def test_options_that_decide_only_the_pace_are_no_part_of_the_name() -> None:
    usual = TransformersOptions().resolved().traits()
    assert usual == {"dtype": "float32", "chat_template_kwargs": {"enable_thinking": False}}
    assert (
        TransformersOptions(device="cpu", max_batch_size=2, cache_bytes=1, cache_folder="x").resolved().traits()
        == usual
    )
    assert TransformersOptions(dtype="bfloat16").resolved().traits() != usual


@pytest.mark.parametrize("kind", [TransformersOptions, VLLMOptions])
def test_the_default_variables_of_the_template_are_the_same_where_they_are_given(kind: type[EngineOptions]) -> None:
    assert kind(chat_template_kwargs={"enable_thinking": False}) == kind()


def test_a_device_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*devices: str) -> list[Any]:
        return [TransformersOptions(device=device).resolved().device for device in devices]

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert names("cpu", "cpu:0") == ["cpu"] * 2
    assert names("cuda", "cuda:0", "cuda:1") == ["cuda:0", "cuda:0", "cuda:1"]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert names("cuda", "cuda:0") == ["cuda:1", "cuda:0"]


def test_of_a_servers_options_those_that_decide_only_the_pace_are_no_part_of_the_name() -> None:
    options = VLLMOptions(server_options={"max_num_seqs": 8, "quantization": "fp8"}, concurrency=2)
    assert options.traits()["server_options"] == {"quantization": "fp8"}


def test_options_can_not_be_changed_and_hold_a_copy_of_what_was_given() -> None:
    given = {"chat_template_kwargs": {"x": [1]}}
    options = TransformersOptions.of(given)
    given["chat_template_kwargs"]["x"].append(2)
    assert options.chat_template_kwargs == {"x": [1]}
    with pytest.raises(FrozenInstanceError):
        options.dtype = "float16"  # type: ignore[misc]
