"""Answers that follow a JSON schema, token by token (llguidance), laid out as `json.dumps(answer, indent=2)` does.

DSPy's JSONAdapter writes demos, and this library writes training rows, with `json.dumps(..., indent=2,
ensure_ascii=False)`. So the grammar fixes that layout: the model is never made to answer in another form than the
one it was shown, and every byte of the frame is forced, which costs no forward pass.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from dspy.lm15 import UnsupportedFeatureError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..errors import MissingExtraError
from ..extras import is_installed
from ..printable import get_logger
from .json_layout import lark_grammar
from .thinking import AFTER, CLOSE

logger = get_logger(__name__)


CHOICE = 4
"""Tokens that are reckoned for a choice of the model's: what it picks may be longer than what was tried."""
KEPT_GRAMMARS = 256
"""Compiled grammars that a compiler keeps, of some 80 KB each."""


def structured_output_available() -> bool:
    """Whether llguidance is installed."""
    return is_installed("llguidance")


class GrammarConstraint:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: Any, token_bytes: TokenBytes) -> None:
        self._matcher = matcher
        self._token_bytes = token_bytes

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow. Raises RuntimeError where llguidance gave up."""
        if self._matcher.is_error():
            raise RuntimeError(f"the answer's grammar is too much for llguidance: {self._matcher.get_error()[:500]}")
        return bool(self._matcher.is_stopped())

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return bool(self._matcher.validate_tokens([token_id]) == 1)

    def advance(self, token_id: int) -> None:
        """Take this token. Raises RuntimeError where the grammar forbids it."""
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"token {token_id} breaks the answer's grammar: {self._matcher.get_error()}")

    def forced_of(self, token_ids: Sequence[int]) -> list[bool]:
        """For each token of an answer, its end included, whether there is no other choice; takes the tokens. Nothing is
        forced where the grammar doesn't allow the answer as a whole."""
        *answer, end = token_ids
        forced: list[bool] = []
        for token_id in answer:
            text = self._token_bytes.text(token_id)
            forced.append(bool(text) and self._matcher.compute_ff_bytes().startswith(text))
            if not self._matcher.consume_token(token_id):
                return [False] * len(token_ids)
        # A grammar that has stopped by itself leaves nothing but the end.
        stopped = bool(self._matcher.is_stopped())
        return [*forced, stopped] if stopped or self.allows(end) else [False] * len(token_ids)

    def forced(self) -> list[int]:
        """Take the tokens that must come next, as far as there is no choice, and return them."""
        taken: list[int] = []
        while not self.ended:
            token_ids = self._matcher.compute_ff_tokens() or self._only_way_on()
            if not token_ids:
                break
            if not self._matcher.consume_tokens(token_ids):
                raise RuntimeError(f"forced tokens break the answer's grammar: {self._matcher.get_error()}")
            taken += token_ids
        return taken

    def _only_way_on(self) -> list[int]:
        """The longest allowed token, where every allowed token is a part of the bytes that must come next.

        llguidance leaves this choice open (` "` may be one token or two), but the text is the same either way, and
        the longest token is the one that the tokenizer itself would use.
        """
        forced_bytes = self._matcher.compute_ff_bytes()
        if not forced_bytes:
            return []
        inside = self._token_bytes.prefixes_of(forced_bytes)
        bits = int.from_bytes(self._matcher.compute_bitmask(), "little")
        if not inside or bits.bit_count() > len(inside):
            return []
        allowed = [token_id for token_id in inside if bits >> token_id & 1]
        return allowed[-1:] if len(allowed) == bits.bit_count() else []

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Write one bit per token, 1 where it may come next, to memory at `address`."""
        self._matcher.unsafe_compute_mask_ptr(address, size_bytes)

    def closer(self, instead_of: int | None = None) -> int | None:
        """The token that ends a text, mapping or list that is open here, or that opens none where `instead_of` does;
        None where none may."""
        quote, *brackets, line = [each if each and self.allows(each) else None for each in self._token_bytes.closers]
        # Inside a text both brackets are text, and the quote ends it; before a bracket that ends, it begins a text.
        ends = (quote, *brackets, line) if all(brackets) else (*brackets, quote, line)
        if (end := next((each for each in ends if each is not None), None)) is not None:
            return end
        return self._first_allowed() if instead_of is not None and self.opens(instead_of) else None

    def opens(self, token_id: int) -> bool:
        """Whether more may have to follow after this token than before it."""
        return token_id in self._token_bytes.openers

    def tokens_to_end(self, most: int, after: int | None = None) -> int:
        """About how many tokens end the answer soonest (after one more token), counted up to `most`."""
        trial, count = GrammarConstraint(self._matcher.deep_copy(), self._token_bytes), 0
        if after is not None:
            trial.advance(after)
        while count < most:
            count += len(trial.forced())
            if trial.ended:
                break
            token_id = trial.closer()
            choice = trial._first_allowed() if token_id is None else token_id
            count += 1 if token_id is not None or choice in self._token_bytes.inside_characters else CHOICE
            trial.advance(choice)
        return count

    def _first_allowed(self) -> int:
        bits = int.from_bytes(self._matcher.compute_bitmask(), "little")
        return (bits & -bits).bit_length() - 1


class TokenBytes:
    """The bytes of every token, and which tokens begin a text."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._ids: dict[bytes, int] = {}
        self._tokenizer = tokenizer
        for token_id in range(vocabulary):
            if text := self.text(token_id):
                self._ids.setdefault(text, token_id)
        self._longest = max((len(text) for text in self._ids), default=0)
        self.inside_characters = {token_id for text, token_id in self._ids.items() if text and 0x80 <= text[0] < 0xC0}
        """Tokens that go on with a character."""
        self.closers = [self._ids.get(text) for text in (b'"', b"}", b"]", b"\n")]
        """Tokens that end a text, a mapping, a list, a line in JSON; None for one that there isn't."""
        self.openers = {token_id for text, token_id in self._ids.items() if any(each in text for each in b'{[",\n')}
        """Tokens after which more may have to follow than before them."""

    def text(self, token_id: int) -> bytes:
        """The bytes of a token; none for a special one."""
        text: bytes = self._tokenizer.decode_bytes([token_id])
        return b"" if self._tokenizer.is_special_token(token_id) else text

    def prefixes_of(self, text: bytes) -> list[int]:
        """Tokens that a text begins with, shortest first."""
        ends = range(1, min(len(text), self._longest) + 1)
        return [self._ids[text[:end]] for end in ends if text[:end] in self._ids]


class GrammarCompiler:
    """Makes constraints for one tokenizer; the `KEPT_GRAMMARS` compiled grammars that were asked for last are kept.

    Args:
        tokenizer: A fast transformers tokenizer.
        vocabulary: Width of the model's logits.
        eos_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._wrapped: tuple[Any, TokenBytes] | None = None
        self._matchers: dict[str, Any] = {}
        """By request, in the order in which they were asked for last."""

    def constraint(self, response_format: Mapping[str, Any]) -> GrammarConstraint:
        """A fresh constraint for a request's `response_format` ({"type": "json_object"} or "json_schema").

        Raises MissingExtraError without llguidance, and UnsupportedFeatureError for a schema that can't be read.
        """
        key = json.dumps(response_format)
        with self._lock:
            tokenizer, token_bytes = self._wrap()
            matcher = self._matchers.pop(key, None)
            self._matchers[key] = _compile(tokenizer, response_format) if matcher is None else matcher
            if len(self._matchers) > KEPT_GRAMMARS:
                del self._matchers[next(iter(self._matchers))]
            return GrammarConstraint(self._matchers[key].deep_copy(), token_bytes)

    def _wrap(self) -> tuple[Any, TokenBytes]:
        if self._wrapped is None:
            if not structured_output_available():
                raise MissingExtraError(
                    "An answer in JSON needs llguidance, which is not installed: "
                    "pip install 'bettertogether[structured]'"
                )
            import llguidance.hf

            known = _known_to_model(self._tokenizer, self._vocabulary)
            tokenizer = llguidance.hf.from_tokenizer(known, n_vocab=self._vocabulary, eos_token=self._eos_ids)
            self._wrapped = tokenizer, TokenBytes(tokenizer, self._vocabulary)
        return self._wrapped


def _known_to_model(tokenizer: Any, vocabulary: int) -> Any:
    """The tokenizer without the tokens that the model has no embedding for: llguidance takes none larger than it."""
    if max(tokenizer.get_vocab().values()) < vocabulary:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocabulary]
    if state["model"]["type"] == "BPE":
        tokens = {token: number for token, number in state["model"]["vocab"].items() if number < vocabulary}
        merges = [pair for pair in state["model"]["merges"] if tokens.keys() >= {*pair, "".join(pair)}]
        state["model"] |= {"vocab": tokens, "merges": merges}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def answer_grammar(response_format: Mapping[str, Any]) -> str:
    """The grammar (lark, as llguidance reads it) of the answers to a request's `response_format`: {"type":
    "json_object"} or "json_schema". What of a schema can't be enforced is left out, and logged once a schema.

    Raises UnsupportedFeatureError for a schema that can't be read.
    """
    return _grammar(json.dumps(response_format))


def after_thoughts(grammar: str) -> str:
    """The grammar of a reasoning model's answers: anything until the end of thinking, then what a grammar allows."""
    start, _, rules = grammar.removeprefix("start: ").partition("\n")
    ways = [f"start: thoughts {json.dumps(AFTER)} {start}", f"thoughts[stop={json.dumps(CLOSE)}]: /(?s:.*)/"]
    return "\n".join([*ways, rules])


@lru_cache(maxsize=1024)
def _grammar(asked: str) -> str:
    response_format = json.loads(asked)
    schema = response_format.get("schema") if response_format["type"] == "json_schema" else None
    try:
        layout = lark_grammar(schema, _check if structured_output_available() else None)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedFeatureError(
            f"The JSON schema of the answer can't be read: {error!r}. Asked: {asked[:500]}",
            feature="config.response_format",
        ) from error
    if layout.unenforced:
        logger.warning("Not enforced in answers to the schema %s: %s.", asked[:500], "; ".join(layout.unenforced))
    return layout.grammar


def _check(grammar: str) -> tuple[str, list[str]]:
    """The error for which llguidance refuses a grammar, "" where it takes it, and what it leaves out."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(grammar))
    return (_problem(messages[0]), []) if failed else ("", [_problem(message) for message in messages])


def _compile(tokenizer: Any, response_format: Mapping[str, Any]) -> Any:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(answer_grammar(response_format)), log_level=0)
    if matcher.is_error():
        asked, problem = json.dumps(response_format)[:500], _problem(matcher.get_error())
        logger.warning("Of the schema %s only that the answer is an object is enforced: %s.", asked, problem)
        return LLMatcher(tokenizer, LLMatcher.grammar_from_lark(answer_grammar({"type": "json_object"})), log_level=0)
    return matcher


def _problem(message: str) -> str:
    """llguidance's message without the excerpt of the grammar that follows it."""
    lines = takewhile(lambda line: not re.match(r"\s*\d+ \| ", line), message.splitlines())
    return " ".join(line.strip() for line in lines)
