"""What counts as a secret, in options and in texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bettertogether import redaction
from bettertogether.redaction import (
    is_secret,
    is_secret_name,
    masked,
    masked_forms,
    remember_secrets,
    split_secrets,
    without_secrets,
)

KEY = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "apiKey", "apikey", "API-Key", "X-Api-Key", "OPENAI_API_KEY", "wandb_api_key", "api_key2", "token",
        "azure_ad_token", "accessToken", "aws_secret_access_key", "client_secret", "password", "passwd", "auth",
        "Authorization", "extra_headers", "headers", "cookies", "vertex_credentials", "connection_string", "api_keys",
        "Ocp-Apim-Subscription-Key", "proxy_auth", "secretKey", "authtoken", "bearer",
    ],
)  # fmt: skip
def test_a_name_of_a_secret_is_known_in_each_spelling(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "temperature", "keys_per_row", "tokenizer", "author", "monkey", "num_threads", "passes", "seed"],
)
def test_a_harmless_name_is_kept(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("sort_key", "score", False), ("stop_token", "</s>", False), ("headers", ["name", "price"], False),
        ("answer_key", str, False), ("password", "score", True), ("api_key", "x", True), ("key", KEY, True),
        ("hf_token", "hf_abcdefghijklmnop0", True), ("headers", {"X-Id": "1"}, True), ("token", 5, False),
        ("separator", KEY, False),
    ],
)  # fmt: skip
def test_an_ambiguous_name_is_a_secrets_where_the_value_looks_like_one(name: str, value: Any, secret: bool) -> None:
    assert is_secret(name, value) is secret


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"api_key": "x", "top_p": 0.9}, {"top_p": 0.9}),
        ({"fallbacks": [{"model": "m", "api_key": "x"}]}, {"fallbacks": [{"model": "m"}]}),
        ({"body": {"tools": [{"headers": {"Authorization": "x"}, "n": 1}]}}, {"body": {"tools": [{"n": 1}]}}),
        ({"extra_query": {"api-key": "x", "v": "1"}}, {"extra_query": {"v": "1"}}),
        ({"pairs": [("Authorization", "x"), ("Accept", "json")]}, {"pairs": [["Accept", "json"]]}),
        ({"list": [{"name": "X-Api-Key", "value": "x"}]}, {"list": [{"name": "X-Api-Key"}]}),
        ({"user": KEY, "stop": ["a", KEY]}, {"stop": ["a"]}),
        ({"use_auth": True, "token": None}, {"use_auth": True, "token": None}),
        ({"api_base": "http://me:pw@host:80/v1"}, {"api_base": "http://host:80/v1"}),
        ({"api_base": "https://host/v1?api_key=x&v=1"}, {"api_base": "https://host/v1?v=1"}),
        ({"api_base": "https://host/v1?q=a%20b"}, {"api_base": "https://host/v1?q=a%20b"}),
    ],
)  # fmt: skip
def test_options_are_kept_without_their_secrets_at_any_depth(options: dict[str, Any], kept: dict[str, Any]) -> None:
    assert without_secrets(options) == kept


PAIR = {"type": "object", "properties": {"key": {"type": "string"}, "token": {"$ref": "#/$defs/Token"}}}


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["Token", "###"]},
        {"stop": ["Password:", "User:"], "n": 2},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "key", "schema": PAIR}}},
        {"guided_json": {**PAIR, "required": ["password", "token"], "$defs": {"Token": {"enum": ["key", "x"]}}}},
        {"guided_json": {"anyOf": [{"$ref": "#/$defs/Token"}], "$defs": {"Token": PAIR}}},
    ],
)  # fmt: skip
def test_what_an_answer_ends_with_and_the_fields_of_its_schema_are_no_secrets(options: dict[str, Any]) -> None:
    assert split_secrets(options) == (options, set())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"type": "object", "api_key": "x"}, {"type": "object"}),
        ({"properties": {"api_key": "x"}}, {"properties": {}}),
        ({**PAIR, "api_key": "x"}, PAIR),
        ({"param": ("X-Api-Key", "x")}, {}),
        ({"body": {**PAIR, "examples": [KEY]}, "token": "x"}, {"body": {**PAIR, "examples": []}}),
        ({"body": {**PAIR, "$id": "http://u:p@host/1"}}, {"body": {**PAIR, "$id": "http://host/1"}}),
        ([PAIR, {"api_key": "x"}, ["Token", "x"]], [PAIR, {}]),
        (["Authorization", "x"], "***"),
    ],
)  # fmt: skip
def test_beside_a_schema_and_in_its_values_secrets_are_left_out(options: Any, kept: Any) -> None:
    assert without_secrets(options) == kept


def test_what_was_left_out_is_named() -> None:
    options = {"api_key": "x", "extra_body": {"apiKey": "y"}, "api_base": "http://u:p@h", "user": KEY, "seed": 1}
    assert split_secrets(options)[1] == {"api_key", "apiKey", "api_base", "user"}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: ***."),
        ("LM(model='m', api_key='abc', top_p=1)", "LM(model='m', api_key='***', top_p=1)"),
        ("""{"Authorization": "abc", "n": 1}""", """{"Authorization": "***", "n": 1}"""),
        ("GET http://u:pw@host/v1?token=abc&n=1 failed", "GET http://***@host/v1?n=1 failed"),
        ("Authorization: Bearer abcdefghijkl0", "Authorization: ***"),
        ("max_tokens='5' of http://host/x", "max_tokens='5' of http://host/x"),
    ],
)
def test_a_text_is_masked_where_it_quotes_a_secret(text: str, hidden: str) -> None:
    assert masked(text) == hidden


def test_a_missing_key_that_an_error_names_is_no_secret() -> None:
    assert masked("KeyError: 'unit'") == "KeyError: 'unit'"
    assert masked("AuthError: api_key='abc'") == "AuthError: api_key='***'"


@pytest.mark.parametrize(
    ("held", "text", "hidden"),
    [
        ({"api_key": "remembered-1"}, "of remembered-1.", "of ***."),
        ({"kwargs": {"fallbacks": [{"api_key": "remembered-2"}]}}, "of remembered-2", "of ***"),
        ({"kwargs": {"pairs": [("Authorization", "remembered-3")]}}, "Authorization remembered-3", "Authorization ***"),
        ({"headers": {"Accept": "application/json"}}, "no application/json", "no application/json"),
        ({"api_key": "remember4", "kwargs": {"api_key": "remember4-5"}}, "remember4-5", "***"),
        ({"api_key": "remember6"}, "remember60 and remember6", "remember60 and ***"),
        ({"api_key": "anything"}, "anything else", "anything else"),
        (
            {"extra_headers": {"Referer": "https://a.example/1234567"}},
            "in https://a.example/12",
            "in https://a.example/12",
        ),
        ({"api_key": "EMPTY"}, "an EMPTY answer", "an EMPTY answer"),
    ],
)
def test_a_secret_of_an_lm_is_masked_in_any_form(
    held: dict[str, Any], text: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    remember_secrets(SimpleNamespace(**held))
    assert masked(text) == hidden
    assert masked_forms(text) == text


def test_a_key_of_the_environment_is_masked_in_any_form_and_a_path_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_API_KEY", "0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("PWD", "/home/user1/a_program")
    text = "0123456789abcdef0123456789abcdef is refused in /home/user1/a_program/main.py"
    assert masked(text) == "*** is refused in /home/user1/a_program/main.py"
