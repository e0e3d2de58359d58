"""A tokenizer of transformers in the words of a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType

from ..errors import ModelError
from .rendering import PromptRenderer

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits", "ByteLevel regex"): "smollm",
    (_WORDS, "ByteLevel"): "llama-bpe",
    (_WORDS.replace("{1,3}", ""), "ByteLevel"): "qwen2",
}
"""llama.cpp's name of the rule that splits a text before BPE, by what transformers does one after the other."""
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, renderer: PromptRenderer, size: int) -> None:
    """Add the tokens, how texts are split into them, the special ones and the chat template. `size` is the number of
    the model's embeddings. Raises ModelError for a tokenizer that llama.cpp doesn't have."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    model, named = state["model"], type(tokenizer).__name__
    if model["type"] != "BPE":
        raise ModelError(
            f"A {named} ({model['type']}) can't be written as GGUF here: give a model with a BPE tokenizer."
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(tokens) >= size:
        raise ModelError(
            f"The tokenizer has tokens up to {max(tokens)} ({tokens[max(tokens)]!r}), the model embeddings for {size}; "
            "llama.cpp needs one for each: model.resize_token_embeddings(len(tokenizer)), and train them."
        )
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, tokenizer, tokens, pairs, size)
    else:
        _add_byte_level(writer, state, named, pairs)
    added = tokenizer.added_tokens_decoder
    spaced = {n: a.content.replace(_SPACE, " ") for n, a in added.items() if not a.special}
    writer.add_token_list([spaced.get(number) or tokens.get(number) or f"[PAD{number}]" for number in range(size)])
    writer.add_token_types([_type(number, tokens.get(number), tokenizer) for number in range(size)])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_eot_token_id(renderer.end_id)
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    writer.add_chat_template(renderer.template())


def _type(number: int, token: str | None, tokenizer: Any) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if number in tokenizer.added_tokens_decoder:
        return TokenType.CONTROL if tokenizer.added_tokens_decoder[number].special else TokenType.USER_DEFINED
    if tokenizer.backend_tokenizer.model.byte_fallback and _BYTE.fullmatch(token):
        return TokenType.BYTE
    return TokenType.NORMAL


def _add_byte_level(writer: gguf.GGUFWriter, state: Mapping[str, Any], named: str, pairs: list[list[str]]) -> None:
    rule, normalizer = _rule(state["pre_tokenizer"]), (state["normalizer"] or {}).get("type")
    # llama.cpp doesn't normalize; a text in NFC, as nearly all are, stays as it is.
    if rule not in PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        raise ModelError(
            f"This {named} splits texts by {[normalizer, *rule]}, for which llama.cpp has no name that is known here. "
            f"Known are {', '.join(PRE_TOKENIZERS.values())}; for others use merge(...) and llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[rule])
    # llama.cpp wants merges; without any, there is never a symbol of two letters to merge.
    writer.add_token_merges([" ".join(pair) for pair in pairs] or ["aa aa"])


def _rule(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return tuple(map(_step, steps))


def _step(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated":
        return str(step["pattern"].get("Regex"))
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel regex" if step["use_regex"] else "ByteLevel"
    return "Digits" if kind == "Digits" and step["individual_digits"] else json.dumps(step)


def _add_sentencepiece(
    writer: gguf.GGUFWriter, tokenizer: Any, tokens: Mapping[int, str], pairs: list[list[str]], size: int
) -> None:
    """llama.cpp merges the neighbours that give the token of the highest score."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(pairs):
        scores.setdefault("".join(pair), -float(rank))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(tokens.get(number, ""), -float(len(pairs))) for number in range(size)])
    first = tokenizer.tokenize("a", add_special_tokens=False)[0]
    writer.add_add_space_prefix(first.startswith(_SPACE))
