"""What must not get onto disk: keys, passwords, headers, credentials in addresses. One rule for everything saved.

`without_secrets` is for options (what an LM, a predictor or an optimizer was made with), `masked` for texts that may
quote them (exceptions, tracebacks), which knows besides the forms of secrets those of the LMs in use
(`remember_secrets`) and of the environment. Prompts and examples are the user's data and go through neither.
"""

from __future__ import annotations

import functools
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import dspy

MASK = "***"
"""What stands in a masked text for a secret."""

_WORDS = (
    "key|secrets?|password|passwd|passphrase|passcode|pwd|token|jwt|credentials?|headers?|auth|oauth|"
    "authorization|authentication|bearer|cookies?|dsn|(api|access|auth|secret|private|client|session)(keys?|tokens?|"
    "secrets?)"
)
_NAME = re.compile(rf"(^|_)({_WORDS}|(api|access|secret|private|auth)_(keys|tokens)|connection_string)\d*($|_)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_AMBIGUOUS = re.compile(
    r"(?<!api)(?<!access)(?<!auth)(?<!secret)(?<!private)(?<!client)(?<!session)(^|_)(key|token|headers?)$"
)
_OPAQUE = re.compile(r"(?=.*\d)[\w.~+/=:-]{16,}")
_VALUE = re.compile(
    r"\b(?:(?:sk|pk|rk|ak)-|gh[pousr]_|github_pat_|glpat-|hf_|gsk_|xai-|pplx-|nvapi-|r8_|xox[abeoprs]-|AKIA|ASIA|AIza|"
    r"ya29\.|eyJ)[\w.-]{11,}\w|\bBearer\s+[\w.~+/=-]{12,}|\bBasic\s+[\w+/]{8,}={1,2}"
)
_QUOTED = re.compile(
    r"""(?P<name>(?<![\w-])[\w-]+)(?P<sign>["']?\s{0,9}[=:]\s{0,9}b?)(?P<quote>["'])(?:\\.|(?!(?P=quote)).)*"""
)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,30}://[^\s\"'<>]+")


def is_secret_name(name: object) -> bool:
    """Whether what goes by this name is taken for a secret: "api_key", "apiKey", "X-Api-Key", "extra_headers", ..."""
    return _is_secret_name(str(name))


@functools.lru_cache(maxsize=500)
def _is_secret_name(name: str) -> bool:
    return _NAME.search(_words(name)) is not None


def is_secret(name: object, value: Any) -> bool:
    """Whether an entry of an object of the user's is a secret: by its name, unless the value says that it is none: a
    number, a function, or, under a name such as "sort_key" or "stop_token", a text that looks like no secret."""
    if not is_secret_name(name) or callable(value) or isinstance(value, bool | int | float | None):
        return False
    if isinstance(value, str | list | tuple) and _AMBIGUOUS.search(_words(name)):
        return any(isinstance(text, str) and _OPAQUE.fullmatch(text) for text in _items(value))
    return True


def _items(value: str | list[Any] | tuple[Any, ...]) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _words(name: object) -> str:
    return re.sub(r"\W+", "_", _CAMEL.sub("_", str(name))).lower()


def without_secrets(value: Any) -> Any:
    """A copy of options (mappings, lists and plain values, at any depth) without what looks like a secret."""
    return split_secrets(value)[0]


def split_secrets(value: Any) -> tuple[Any, set[str]]:
    """`without_secrets`, and the names of what was left out.

    Left out are entries with the name of a secret (unless they are None, True or False), texts in the form of a known
    kind of key, and user, password and secret parameters in addresses. The fields that a JSON schema names are none.
    """
    left_out: _LeftOut = []
    kept = _kept(value, left_out, "value")
    return (MASK if kept is _LEFT_OUT else kept), {name for name, _ in left_out}


_LEFT_OUT = object()
_LeftOut = list[tuple[str, Any]]
"""Names and values of what was left out."""


def _kept(value: Any, left_out: _LeftOut, name: str, *, schema: bool = False) -> Any:
    """A value without secrets. `schema`: the names in it are those of a JSON schema's fields."""
    if isinstance(value, Mapping):
        return _kept_entries(value, left_out, schema)
    if isinstance(value, list | tuple | set | frozenset):
        if name != "stop" and not schema and _is_named_secret(value):
            header, text = value
            left_out.append((header, text))
            return _LEFT_OUT
        items = [_kept(item, left_out, name, schema=schema) for item in value]
        return [item for item in items if item is not _LEFT_OUT]
    if isinstance(value, str):
        if _VALUE.fullmatch(value.strip()):
            left_out.append((name, value))
            return _LEFT_OUT
        return _address_kept(value, left_out, name)
    return value


_OF_FIELDS = ("properties", "$defs", "required")


def _is_schema(value: Mapping[Any, Any]) -> bool:
    of_object = value.get("type") == "object" and isinstance(value.get("properties"), Mapping)
    return of_object or isinstance(value.get("$defs"), Mapping)


def _kept_entries(value: Mapping[Any, Any], left_out: _LeftOut, schema: bool) -> dict[Any, Any]:
    kept, fields = {}, _OF_FIELDS if _is_schema(value) else ()
    named = any(str(key).lower() in ("name", "key", "header") and is_secret_name(item) for key, item in value.items())
    for key, item in value.items():
        secret = (is_secret_name(key) and not named) or (named and str(key).lower() == "value")
        if secret and not schema and not isinstance(item, bool | None):
            left_out.append((str(key), item))
        elif (inner := _kept(item, left_out, str(key), schema=schema or key in fields)) is not _LEFT_OUT:
            kept[key] = inner
    return kept


def _is_named_secret(value: Any) -> bool:
    """Whether this is a header or parameter as a pair: ("Authorization", "...")."""
    pair = list(value) if isinstance(value, list | tuple) and len(value) == 2 else []
    return bool(pair) and all(isinstance(item, str) for item in pair) and is_secret_name(pair[0])


def _address_kept(text: str, left_out: _LeftOut, name: str) -> str:
    def clean(match: re.Match[str]) -> str:
        kept = _clean_address(match[0], "")
        if kept != match[0]:
            left_out.append((name, None))
        return kept

    return _ADDRESS.sub(clean, text)


def _clean_address(address: str, mask: str) -> str:
    """An address without user, password and secret parameters; `mask` in their place."""
    try:
        parts = urlsplit(address)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return address
    _, at, host = parts.netloc.rpartition("@")
    secret = [key for key, _ in query if is_secret_name(key) or key.lower() == "sig"]
    if not at and not secret:
        return address
    kept = [(key, value) for key, value in query if key not in secret]
    netloc = f"{mask}@{host}" if at and mask else host
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(kept)))


_SHORTEST = 8
"""Characters of a secret that is known by itself; a shorter one may be any word."""
_WORD = re.compile(r"[A-Za-z]{,15}")
"""What stands for a key where a local server wants none ("anything") is any word too."""
_remembered: set[str] = set()


def remember_secrets(lm: object) -> None:
    """Have `masked` replace the secrets among an LM's options and attributes wherever a text quotes them, as a service
    does that refuses a key. They are kept for as long as the process runs, in memory alone."""
    held = dict(getattr(lm, "__dict__", {}))
    left_out: _LeftOut = [(name, value) for name, value in held.items() if is_secret_name(name)]
    _kept(held.get("kwargs"), left_out, "value")
    texts = (text for each in left_out for text in _secret_texts(*each))
    _remembered.update(text for text in texts if len(text) >= _SHORTEST and not _WORD.fullmatch(text))


def remember_asked(error: BaseException | None) -> None:
    """`remember_secrets` of the LMs that an error comes from, whoever asked them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for name in ("self", "instance"):
                if isinstance(lm := frame.f_locals.get(name), dspy.BaseLM):
                    remember_secrets(lm)
        error = error.__cause__ or error.__context__


def _secret_texts(name: str, value: Any) -> Iterator[str]:
    """The secrets in what goes by a name: all of a text by a secret's name, and in any text, as that of a header
    ("Token ..."), the words that look like one."""
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield from _secret_texts(str(key), item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in list(value):
            yield from _secret_texts(name, item)
    elif isinstance(value, str):
        yield from (word for word in value.split() if _OPAQUE.fullmatch(word) and "://" not in word)
        if is_secret_name(name):
            yield value


def _keys_of_environment() -> Iterator[str]:
    """Where most LMs have theirs. Of a secret's name are paths too (PWD, SSH_AUTH_SOCK)."""
    for name in os.environ:
        value = os.environ.get(name, "")
        is_place = value.startswith(("/", "~", ".")) or "://" in value
        if is_secret_name(name) and _OPAQUE.fullmatch(value) and not is_place:
            yield value


def masked(text: str) -> str:
    """`masked_forms`, and the secrets that are known, by `remember_secrets` or from the environment, whatever their
    form."""
    text = masked_forms(text)
    for secret in sorted({*_remembered.copy(), *_keys_of_environment()}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
    return text


def masked_forms(text: str) -> str:
    """A text with the secrets in it replaced: `name='...'` of a secret's name, known kinds of keys, addresses. The same
    in every process."""
    text = _ADDRESS.sub(lambda match: _clean_address(match[0], MASK), text)
    text = _QUOTED.sub(lambda m: _hidden(m) if is_secret_name(m["name"]) and not _is_error(m["name"]) else m[0], text)
    return _VALUE.sub(MASK, text)


def _is_error(name: str) -> bool:
    """Whether a name before a colon is that of an exception: "KeyError: 'unit'" holds no secret."""
    return name.endswith("Error")


def _hidden(match: re.Match[str]) -> str:
    return f"{match['name']}{match['sign']}{match['quote']}{MASK}"
