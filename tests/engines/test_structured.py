"""The grammar of a schema lets through the layout of `json.dumps` and nothing else, and forces what has no choice."""

from __future__ import annotations

import json
from typing import Any, Literal

import pydantic
import pytest
from dspy.clients.legacy_requests import _strict_json_schema
from dspy.lm15 import UnsupportedFeatureError
from small_models import VOCABULARY, byte_tokenizer

from bettertogether.engines import structured
from bettertogether.engines.structured import GrammarCompiler, GrammarConstraint
from bettertogether.errors import MissingExtraError

TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER, VOCABULARY, [258])


def answer(schema: dict[str, Any]) -> GrammarConstraint:
    return COMPILER.constraint({"type": "json_schema", "schema": schema, "strict": True})


def object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def follows(constraint: GrammarConstraint, text: str) -> bool:
    """Whether a text is a whole answer."""
    for token_id in TOKENIZER(text, add_special_tokens=False).input_ids:
        if constraint.ended or not constraint.allows(token_id):
            return False
        constraint.advance(token_id)
    return constraint.ended


def dumps(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


class Item(pydantic.BaseModel):
    name: str
    tags: list[str]
    kind: Literal["a", "b"]


class Everything(pydantic.BaseModel):
    reasoning: str
    sure: bool
    count: int
    share: float
    label: Literal["setosa", 'two "words"\n', 3]
    numbers: list[int]
    items: list[Item]
    best: Item | None
    größe: str


VALUES: list[dict[str, Any]] = [
    {
        "reasoning": 'He said "é"\n\\ und\t🙂',
        "sure": True,
        "count": -3,
        "share": 1.5,
        "label": 'two "words"\n',
        "numbers": [1, 22],
        "items": [{"name": "x", "tags": ["p", "q"], "kind": "a"}, {"name": "y", "tags": [], "kind": "b"}],
        "best": {"name": "z", "tags": ["r"], "kind": "b"},
        "größe": "ü",
    },
    {
        "reasoning": "",
        "sure": False,
        "count": 0,
        "share": -0.25,
        "label": 3,
        "numbers": [],
        "items": [],
        "best": None,
        "größe": "",
    },
]


@pytest.mark.parametrize("value", VALUES)
def test_the_answer_is_laid_out_as_json_dumps_does(value: dict[str, Any]) -> None:
    schema = _strict_json_schema(Everything.model_json_schema())
    assert follows(answer(schema), dumps(value))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "x"}',
        '{\n"a": "x"\n}',
        '{\n  "a": "x" }',
        '{\n  "a": "x",\n  "b": "y"\n}',
        '{\n  "a": 1\n}',
        ' {\n  "a": "x"\n}',
    ],
)
def test_no_other_layout_or_content_is_allowed(text: str) -> None:
    assert not follows(answer(object_of(a={"type": "string"})), text)


def test_open_mappings_have_the_same_layout() -> None:
    schema = object_of(d={"type": "object", "additionalProperties": {"type": "integer"}})
    mappings: tuple[dict[str, int], ...] = ({}, {"x": 1}, {"x": 1, "y": 2})
    for mapping in mappings:
        assert follows(answer(schema), dumps({"d": mapping}))


@pytest.mark.parametrize(("numbers", "allowed"), [([1], False), ([1, 2], True), ([1, 2, 3], True), ([1] * 4, False)])
def test_the_length_of_lists_is_bounded(numbers: list[int], allowed: bool) -> None:
    schema = object_of(l={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3})
    assert follows(answer(schema), dumps({"l": numbers})) is allowed


@pytest.mark.parametrize("least", [0, 1])
def test_a_list_and_a_mapping_may_be_bounded_to_one_item(least: int, caplog: pytest.LogCaptureFixture) -> None:
    tags = {"type": "array", "items": {"type": "string"}, "minItems": least, "maxItems": 1}
    counts = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": least, "maxProperties": 1}
    schema = object_of(tags=tags, counts=counts)
    sizes = [(0, 0), (1, 1), (2, 1), (1, 2)]
    allowed = [
        follows(answer(schema), dumps({"tags": ["x"] * items, "counts": dict.fromkeys("xy"[:entries], 1)}))
        for items, entries in sizes
    ]
    assert allowed == [least == 0, True, False, False]
    assert caplog.records == []


def test_a_recursive_type_is_written_on_one_line_from_its_second_level() -> None:
    node = object_of(value={"type": "integer"}, child={"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]})
    schema = {"$defs": {"Node": node}, **object_of(root={"$ref": "#/$defs/Node"})}
    inner = '{\n  "root": {\n    "value": 1,\n    "child": {"value": 2, "child": null}\n  }\n}'
    assert follows(answer(schema), inner)


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n  "a": [1, {"b": null}]\n}', "{}"])
def test_json_object_is_any_object(text: str) -> None:
    assert follows(COMPILER.constraint({"type": "json_object"}), text)


@pytest.mark.parametrize("text", ["[1]", '"a"', '{"a":' + " " * 40 + "1}"])
def test_json_object_is_nothing_else_and_its_white_space_is_bounded(text: str) -> None:
    assert not follows(COMPILER.constraint({"type": "json_object"}), text)


def test_the_frame_is_forced_and_a_picked_label_brings_the_rest() -> None:
    constraint = answer(object_of(label={"enum": ["setosa", "virginica"], "type": "string"}))
    assert TOKENIZER.decode(constraint.forced()) == '{\n  "label": "'
    constraint.advance(TOKENIZER("v", add_special_tokens=False).input_ids[0])
    assert TOKENIZER.decode(constraint.forced()) == 'irginica"\n}'
    assert constraint.ended


def test_a_constant_answer_is_forced_to_its_end() -> None:
    constraint = answer(object_of(a={"const": "x"}))
    assert TOKENIZER.decode(constraint.forced()) == dumps({"a": "x"})
    assert constraint.ended


def test_nothing_may_follow_the_closing_brace() -> None:
    constraint = answer(object_of(a={"const": "x"}))
    constraint.forced()
    assert not any(constraint.allows(token_id) for token_id in range(256))


def test_a_token_that_breaks_the_grammar_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="breaks the answer's grammar"):
        answer(object_of(a={"const": "x"})).advance(5)


def test_constraints_of_one_schema_do_not_touch_one_another() -> None:
    schema = object_of(a={"enum": [1, 2]})
    first, second = answer(schema), answer(schema)
    first.forced()
    assert TOKENIZER.decode(second.forced()) == '{\n  "a": '


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (object_of(a={"$ref": "#/$defs/Gone"}), "Gone|defs"),
        (object_of(a={"$ref": "https://example.org/x"}), "outside the schema"),
    ],
)
def test_a_schema_that_can_not_be_read_is_refused_by_its_problem(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message) as caught:
        answer(schema)
    assert caught.value.feature == "config.response_format"


@pytest.mark.parametrize(
    ("field", "good", "bad", "message"),
    [
        ({"type": "string", "pattern": "(?<=x)y"}, "anything", 1, "look-around"),
        ({"type": "string", "pattern": r"^\w+\b$"}, "anything", 1, "lookarounds"),
        ({"type": "string", "pattern": r"(a)\1"}, "anything", 1, "backreferences"),
        ({"type": "number", "not": {"const": 1}}, 1, "x", "not"),
        ({"type": "string", "format": "binary"}, "b", 1, "binary"),
        ({"type": "string", "format": "path"}, "/a/b", 1, "path"),
        ({"type": "string", "format": "password"}, "s", 1, "password"),
        ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, [True, False], ["x"], "uniqueItems"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, 2, "x", "minimum"),
    ],
)
def test_what_can_not_be_enforced_is_left_out_and_logged_once_while_all_else_is_enforced(
    field: dict[str, Any], good: Any, bad: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema = object_of(label={"enum": ["x", "y"]}, a=field, tag={"const": message})
    for _ in range(3):
        assert follows(answer(schema), dumps({"label": "x", "a": good, "tag": message}))
    assert not follows(answer(schema), dumps({"label": "x", "a": bad, "tag": message}))
    assert not follows(answer(schema), dumps({"label": "z", "a": good, "tag": message}))
    assert [record.getMessage().count(message) > 0 for record in caplog.records] == [True]


TAGGED = {
    "oneOf": [object_of(kind={"const": "a"}, x={"type": "boolean"}), object_of(kind={"const": "b"}, y={"enum": [1]})],
    "discriminator": {"propertyName": "kind"},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ({"type": "array", "items": {"enum": ["p", "q"]}, "uniqueItems": True}, ["p", "q"]),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "minItems": 2, "maxItems": 2},
         [3, True]),
        ({"type": "array", "maxItems": 0, "minItems": 0}, []),
        ({"type": "object", "propertyNames": {"enum": ["a", 2, True]}, "additionalProperties": {"type": "integer"}},
         {"a": 1, "2": 5, "true": 3}),
        ({"type": "object", "patternProperties": {"^k[0-9]$": {"type": "integer"}}}, {"k1": 1, "k2": 2}),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2, "maxProperties": 2},
         {"x": 1, "y": 2}),
        ({"type": "object"}, {"x": {"y": [1, {"z": None}]}}),
        ({"type": "object", "additionalProperties": False}, {}),
        ({"type": "object", "additionalProperties": True}, {"query": "é", "top": [1, 2.5]}),
        ({"type": "array"}, [[], {}, "x", [1]]),
        ({}, {"x": ["y"]}),
        (True, None),
        ({"type": ["array", "null"], "items": {"type": "string"}}, ["x", "y"]),
        (TAGGED, {"kind": "b", "y": 1}),
        ({"allOf": [{"enum": ["x"]}], "default": "x"}, "x"),
        ({"type": "string", "format": "date"}, "2024-02-29"),
        ({"type": "string", "format": "date-time"}, "2024-02-29T12:00:00Z"),
        ({"type": "string", "format": "base64"}, "aGVsbG8="),
        ({"enum": ['say "hi"', "new\nline", "tab\t", "bs\\", "é😀", "it's", "\x00\x7f", "/%{}|", ""]}, "\x00\x7f"),
    ],
)  # fmt: skip
def test_every_kind_of_value_is_laid_out_as_json_dumps_does(
    field: Any, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert follows(answer(object_of(a=field)), dumps({"a": value}))
    assert all("uniqueItems" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ({"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}}, {"b": 1}),
        ({"type": "object", "patternProperties": {"^k[0-9]$": {"type": "integer"}}}, {"k": 1}),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}, {}),
        ({"type": "string", "format": "base64"}, "aGVsbG8"),
        ({"type": "string", "format": "date"}, "yesterday"),
        (TAGGED, {"kind": "a", "y": 1}),
        ({"allOf": [{"enum": ["x", "y"]}, {"enum": ["y", "z"]}]}, "x"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_not_allowed(field: Any, value: Any) -> None:
    assert not follows(answer(object_of(a=field)), dumps({"a": value}))


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("1e400", False), ("-1E+309", False), ("1" + "0" * 309, False), ("1e-05", True), ("-2.5e-300", True),
     ("1e+16", True), ("0", True), ("-0.25", True), ("01", False), ("1.", False)],
)  # fmt: skip
def test_a_number_has_any_form_of_json_and_is_finite(text: str, allowed: bool) -> None:
    assert follows(answer(object_of(a={"type": "number"})), f'{{\n  "a": {text}\n}}') is allowed


def test_an_enum_may_have_thousands_of_labels() -> None:
    schema = object_of(label={"enum": [f"label {number}" for number in range(5000)]})
    assert follows(answer(schema), dumps({"label": "label 4999"}))
    assert not follows(answer(schema), dumps({"label": "label 5000"}))


def test_the_grammars_that_were_asked_for_last_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counted(tokenizer: Any, response_format: dict[str, Any]) -> Any:
        compiled.append(response_format["schema"]["const"])
        return compile_grammar(tokenizer, response_format)

    compile_grammar = structured._compile
    monkeypatch.setattr(structured, "_compile", counted)
    monkeypatch.setattr(structured, "KEPT_GRAMMARS", 2)
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY, [258])
    for number in (1, 2, 1, 3, 1, 2):
        constraint = compiler.constraint({"type": "json_schema", "schema": {"const": number}})
        assert TOKENIZER.decode(constraint.forced()) == str(number)
    assert compiled == [1, 2, 3, 2]
    assert len(compiler._matchers) == 2


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "structured_output_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'bettertogether\[structured\]'"):
        GrammarCompiler(TOKENIZER, VOCABULARY, [258]).constraint({"type": "json_object"})


LABEL = object_of(label={"enum": ["positive", "negative"]})
TEXT = object_of(answer={"type": "string"})


def free_characters(schema: dict[str, Any], text: str) -> str:
    """The characters of an answer that the grammar leaves free, "$" for the end, with a token a byte."""
    token_ids = [*TOKENIZER(text, add_special_tokens=False).input_ids, 258]
    forced = answer(schema).forced_of(token_ids)
    return "".join(each for each, is_forced in zip(text + "$", forced, strict=True) if not is_forced)


def test_of_a_label_only_the_character_that_tells_it_from_others_is_free() -> None:
    assert free_characters(LABEL, dumps({"label": "negative"})) == "n"


def test_of_a_text_its_characters_and_its_end_are_free() -> None:
    assert free_characters(TEXT, dumps({"answer": "yes, no"})) == 'yes, no"'


def test_the_end_of_an_answer_that_may_go_on_is_free() -> None:
    assert free_characters({"type": "integer"}, "12") == "12$"


@pytest.mark.parametrize(
    "text", ['{"label": "positive"}', dumps({"label": "neutral"}), '{\n  "label": "pos', "positive"]
)
def test_nothing_is_forced_in_an_answer_that_the_grammar_does_not_allow(text: str) -> None:
    assert free_characters(LABEL, text) == text + "$"
