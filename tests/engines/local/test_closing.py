"""An answer under a schema is brought to its end before max_tokens, in few tokens, and parses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request, Response
from small_models import VOCABULARY, byte_tokenizer

from bettertogether.engines import TransformersEngine
from bettertogether.engines.local.closing import ClosingConstraint
from bettertogether.engines.structured import GrammarCompiler

TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, VOCABULARY, [258])


def format_of(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "json_schema", "schema": schema}


TEXT_AND_LABEL = format_of(text={"type": "string"}, label={"enum": ["good", "bad"]})
OPEN = [
    TEXT_AND_LABEL,
    format_of(counts={"type": "object", "additionalProperties": {"type": "integer"}}),
    format_of(items={"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
    format_of(any={}),
]


def write(constraint: ClosingConstraint, room: int, wishes: Sequence[str]) -> str:
    """The answer of a model that writes the first of its wishes that may come next, over and over."""
    ids = constraint.forced()
    tokens = [TOKENIZER(wish, add_special_tokens=False).input_ids[0] for wish in wishes]
    while not constraint.ended and len(ids) < room:
        token_id = next(each for each in tokens if constraint.allows(each))
        constraint.advance(token_id)
        ids += [token_id, *constraint.forced()]
    return str(TOKENIZER.decode(ids[:room]))


def constrained(response_format: dict[str, Any], room: int) -> ClosingConstraint:
    return ClosingConstraint(COMPILER.constraint(response_format), room)


def test_a_text_without_end_is_closed_and_the_label_after_it_is_the_models() -> None:
    constraint = constrained(TEXT_AND_LABEL, 100)
    answer = json.loads(write(constraint, 100, ["a", "b", '"']))
    assert answer["text"] == "a" * len(answer["text"])
    assert len(answer["text"]) > 40
    assert answer["label"] == "bad"
    assert constraint.shortened


def test_an_answer_that_ends_by_itself_is_left_alone() -> None:
    constraint = constrained(TEXT_AND_LABEL, 100)
    assert json.loads(write(constraint, 100, ['"', "g"])) == {"text": "", "label": "good"}
    assert not constraint.shortened


def test_an_answer_for_which_there_is_no_room_is_cut() -> None:
    constraint = constrained(TEXT_AND_LABEL, 20)
    assert write(constraint, 20, ["a", "b"]) == '{\n  "text": "aaaaaaa'
    assert not constraint.shortened


def asked(engine: TransformersEngine, response_format: dict[str, Any], seed: int, **config: Any) -> Request:
    config = {"max_tokens": 90, "temperature": 1.0, "seed": seed, "response_format": response_format, **config}
    return Request(f"local/{engine.base_name}", (Message.user("Hi"),), config=Config(**config))


def completed(engine: TransformersEngine, requests: Sequence[Request]) -> list[Response]:
    """The answers, made together."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(engine.complete, requests))


def test_every_answer_of_a_random_model_parses(engine: TransformersEngine) -> None:
    formats = OPEN * 10
    responses = completed(engine, [asked(engine, each, seed) for seed, each in enumerate(formats)])
    for response_format, response in zip(formats, responses, strict=True):
        assert list(json.loads(response.text or "")) == list(response_format["schema"]["properties"])


def test_a_shortened_answer_says_that_its_length_ended_it(engine: TransformersEngine) -> None:
    responses = completed(engine, [asked(engine, TEXT_AND_LABEL, seed) for seed in range(20)])
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    assert all(json.loads(response.text or "")["label"] in ("good", "bad") for response in responses)


def test_a_shortened_answer_may_have_log_probabilities(engine: TransformersEngine) -> None:
    response = engine.complete(asked(engine, TEXT_AND_LABEL, 1, logprobs=0, temperature=0.0))
    assert json.loads(response.text or "")["label"] in ("good", "bad")


NESTED = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "ok": {"type": "boolean"},
                "kids": {"$ref": "#/$defs/Kids"},
                "next": {"$ref": "#/$defs/Next"},
            },
            "required": ["ok", "kids", "next"],
            "additionalProperties": False,
        },
        "Kids": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Node"}},
        "Next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
    },
    "$ref": "#/$defs/Node",
}


@pytest.mark.parametrize("wishes", [['"', "a", "t", "{", ","], ["{", '"', "t", "n", ","], ["}", '"', ",", "t", "{"]])
def test_mappings_within_mappings_are_closed_before_the_room_ends(wishes: list[str]) -> None:
    schema = {"type": "json_schema", "schema": NESTED}
    for room in (300, 307, 311):
        constraint = constrained(schema, room)
        answer = json.loads(write(constraint, room, [*wishes, "}", "n", "f", "\n"]))
        assert list(answer) == ["ok", "kids", "next"]


def test_no_item_is_begun_that_has_no_room() -> None:
    names = [f"property number {number}" for number in range(8)]
    item = format_of(**{name: {"type": "boolean"} for name in names})["schema"]
    response_format = format_of(items={"type": "array", "items": item})
    for room in range(620, 960, 20):
        answer = json.loads(write(constrained(response_format, room), room, [",", "{", "t", "\n", "]"]))
        assert all(list(item) == names for item in answer["items"])
        assert answer["items"]


NAMED = format_of(name={"type": "string"}, sure={"type": "boolean"})["schema"]
LIST = {"type": "array", "items": NAMED}


@pytest.mark.parametrize(
    "items", [LIST, {"anyOf": [LIST, {"type": "null"}]}, {"type": "object", "additionalProperties": NAMED}]
)
def test_a_first_item_is_begun_only_where_it_has_room_and_closed_in_time(items: dict[str, Any]) -> None:
    response_format = format_of(label={"enum": ["good", "bad"]}, items=items)
    longest = 0
    for room in range(50, 200, 4):
        answer = json.loads(write(constrained(response_format, room), room, [*'[\ng"t]}n']))
        longest = max(longest, len(str(answer["items"])))
    assert longest > 100


def test_a_text_is_closed_in_time_whatever_way_of_a_union_the_model_took() -> None:
    answers = {f"property number {number}": {"type": "boolean"} for number in range(4)}
    ways = [{"kind": {"const": "whole"}, "name": {"type": "string"}, **answers}, {"kind": {"const": "none"}}]
    item = {"oneOf": [format_of(**way)["schema"] for way in ways]}
    response_format = format_of(label={"enum": ["good", "bad"]}, item=item)
    for room in (260, 300):
        answer = json.loads(write(constrained(response_format, room), room, [*'gwt"']))
        assert list(answer["item"]) == list(ways[0])
