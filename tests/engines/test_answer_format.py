"""The schema that an answer is held to is that of the signature's output fields, whatever program asks."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import dspy
import pydantic
import pytest
from fakes import plain_lm

from bettertogether.engines.answer_format import DSPY_NAME, whole_format
from bettertogether.testing import FakeEngine

UNSIGNED = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"

Label = Literal["good", "bad"]


class Counted(pydantic.BaseModel):
    label: Label
    counts: dict[str, int]


def signature(**fields: Any) -> type[dspy.Signature]:
    outputs = {name: (kind, dspy.OutputField()) for name, kind in fields.items()}
    return dspy.Signature({"q": (str, dspy.InputField()), **outputs}, "Do it.")


def engine_for(**outputs: Any) -> FakeEngine:
    return FakeEngine(lambda request: json.dumps(outputs))


def schema_for(kind: Any, value: Any) -> Any:
    """The schema of one output field in the request that reaches the engine."""
    engine = engine_for(answer=value)
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        dspy.Predict(signature(answer=kind))(q="x")
    schema = engine.requests[-1].schema
    assert schema is not None
    assert schema["required"] == ["answer"]
    assert schema["additionalProperties"] is False
    field = schema["properties"]["answer"]
    return {key: each for key, each in field.items() if key != "title"}


def fits(kind: Any, *texts: str) -> list[bool]:
    """For each text, whether the pattern of its type allows it."""
    schema = whole_format(pydantic.create_model(DSPY_NAME, answer=(kind, ...)), None).model_json_schema()
    return [re.search(schema["properties"]["answer"]["pattern"], text) is not None for text in texts]


def there_is(day: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(day))
    except ValueError:
        return False


def test_a_dict_field_leaves_the_schema_of_the_others_on() -> None:
    engine = engine_for(label="good", counts={"a": 1})
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        dspy.Predict(signature(label=Label, counts=dict[str, int]))(q="x")
    schema = engine.requests[-1].schema
    assert schema is not None
    assert schema["required"] == ["label", "counts"]
    assert schema["properties"]["label"]["enum"] == ["good", "bad"]
    assert schema["properties"]["counts"]["additionalProperties"] == {"type": "integer"}


@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.XMLAdapter()])
def test_a_dict_field_leaves_the_schema_on_when_another_adapter_asks_again_in_json(adapter: Any) -> None:
    engine = engine_for(label="good", counts={"a": 1})
    with dspy.context(lm=plain_lm(engine), adapter=adapter):
        dspy.Predict(signature(label=Label, counts=dict[str, int]))(q="x")
    first, second = (request.schema for request in engine.requests)
    assert first is None
    assert second is not None
    assert second["properties"]["counts"]["additionalProperties"] == {"type": "integer"}


def test_a_dict_field_leaves_the_schema_on_for_an_event_loop() -> None:
    engine = engine_for(label="good", counts={"a": 1})
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        asyncio.run(dspy.Predict(signature(label=Label, counts=dict[str, int])).acall(q="x"))
    assert engine.requests[-1].schema is not None


def test_the_arguments_of_reacts_tools_may_be_any_json_and_the_tools_name_is_one_of_the_tools() -> None:
    engine = engine_for(next_thought="t", next_tool_name="finish", next_tool_args={}, reasoning="r", answer="a")

    def look_up(word: str) -> str:
        return word

    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        dspy.ReAct("q -> answer", tools=[look_up])(q="x")
    schema = engine.requests[0].schema
    assert schema is not None
    assert schema["properties"]["next_tool_name"]["enum"] == ["look_up", "finish"]
    assert schema["properties"]["next_tool_args"]["additionalProperties"] is True


def test_refine_and_its_hints_keep_the_schema() -> None:
    engine = engine_for(label="good", counts={"a": 1})
    predict = dspy.Predict(signature(label=Label, counts=dict[str, int]))
    program = dspy.BestOfN(predict, 2, lambda *_: 0.0, threshold=1.0)
    with dspy.context(lm=plain_lm(engine, temperature=1.0), adapter=dspy.JSONAdapter()):
        program(q="x")
    assert [request.schema is not None for request in engine.requests] == [True, True]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (dict, {"a": 1}, {"type": "object", "additionalProperties": True}),
        (list[dict[str, int]], [{"a": 1}],
         {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "integer"}}}),
        (dict[Label, bool], {"good": True},
         {"type": "object", "propertyNames": {"enum": ["good", "bad"]}, "additionalProperties": {"type": "boolean"}}),
        (dict[int, str], {"1": "x"},
         {"type": "object", "propertyNames": {"pattern": "^-?[0-9]+$"}, "additionalProperties": {"type": "string"}}),
        (decimal.Decimal, "1.5",
         {"anyOf": [{"type": "number", "minimum": -1e15, "maximum": 1e15},
                    {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"}]}),
        (Annotated[decimal.Decimal, pydantic.Field(ge=0, le=100)], "5.5",
         {"anyOf": [{"type": "number", "minimum": 0, "maximum": 100}, {"type": "string", "pattern": UNSIGNED}]}),
        (Annotated[decimal.Decimal, pydantic.Field(gt=-1, multiple_of=0.5)], 5,
         {"anyOf": [{"type": "number", "exclusiveMinimum": -1, "maximum": 1e15, "multipleOf": 0.5},
                    {"type": "string", "pattern": f"^-?{UNSIGNED[1:]}"}]}),
        (pydantic.HttpUrl, "http://x.org", {"type": "string", "pattern": r"^(http|https)://[A-Za-z0-9]+([.-][A-Za-z0-9]+)*(:[0-9]{1,4})?([/?#][!-~]*)?$"}),
        (Annotated[int, pydantic.Field(ge=1, le=9)], 3, {"type": "integer", "minimum": 1, "maximum": 9}),
    ],
)  # fmt: skip
def test_the_schema_of_a_field_is_that_of_its_type(kind: Any, value: Any, expected: Any) -> None:
    assert schema_for(kind, value) == expected


@pytest.mark.parametrize(
    "length",
    [
        datetime.timedelta(0), datetime.timedelta(days=400, seconds=5), datetime.timedelta(milliseconds=1500),
        datetime.timedelta(hours=2), -datetime.timedelta(days=1, minutes=3), datetime.timedelta(days=300_000),
    ],
)  # fmt: skip
def test_every_length_of_time_that_pydantic_writes_fits_the_schema(length: datetime.timedelta) -> None:
    text = pydantic.TypeAdapter(datetime.timedelta).dump_python(length, mode="json")
    pattern = schema_for(datetime.timedelta, text)["pattern"]
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    "moment",
    [
        datetime.datetime(1, 1, 1),
        datetime.datetime(2024, 2, 29, 23, 59, 59, 5),
        datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC),
        datetime.datetime(2024, 4, 30, 10, 0, 0, 120_000, datetime.timezone(-datetime.timedelta(hours=23, minutes=59))),
    ],
)
def test_what_pydantic_writes_of_a_moment_fits_the_schema_of_its_kind_and_no_other(moment: datetime.datetime) -> None:
    naive = moment.tzinfo is None
    kinds = {datetime.datetime: True, pydantic.NaiveDatetime: naive, pydantic.AwareDatetime: not naive}
    text = pydantic.TypeAdapter(datetime.datetime).dump_python(moment, mode="json")
    assert {kind: fits(kind, text) == [True] for kind in kinds} == kinds
    clock = pydantic.TypeAdapter(datetime.time).dump_python(moment.timetz(), mode="json")
    assert fits(datetime.time, clock, text) == [True, False]


@pytest.mark.parametrize(
    "text", ["2024-02-30T10:00:00", "2024-13-01T10:00:00", "2024-05-01T24:00:00", "2024-05-01T10:00:60", "2024-05-01",
             "2024-05-01T10:00:00+24:00", "2024-05-01T10:00:00.", "2024-05-01T10:00:00z"],
)  # fmt: skip
def test_a_moment_that_there_is_not_fits_no_schema(text: str) -> None:
    assert fits(datetime.datetime, text) == [False]


@pytest.mark.parametrize("kind", [datetime.date, datetime.datetime])
def test_days_that_there_are_fit_the_schema_and_no_others(kind: type) -> None:
    years = [0, 1, 4, 10, 96, 100, 400, 1000, 1900, 1996, 2000, 2023, 2024, 2100, 9996, 9999]
    clock = "" if kind is datetime.date else "T10:00:00"
    days = [f"{year:04}-{month:02}-{day:02}" for year in years for month in range(14) for day in range(33)]
    assert fits(kind, *(day + clock for day in days)) == [there_is(day) for day in days]


@pytest.mark.parametrize("number", ["1E+5", "-1.5E-7", "0E+2", "12.50", 1e-07, 1e16])
def test_decimals_as_text_and_numbers_as_keys_fit_the_schema_as_they_are_written(number: Any) -> None:
    kind = type(number) if isinstance(number, float) else decimal.Decimal
    schema = schema_for(dict[kind, int], {str(number): 1})  # type: ignore[valid-type]
    text = json.loads(pydantic.TypeAdapter(dict[Any, int]).dump_json({kind(number): 1}))
    assert all(re.search(schema["propertyNames"]["pattern"], key) for key in text)


def test_a_moment_may_be_a_key() -> None:
    schema = schema_for(dict[pydantic.NaiveDatetime, int], {"2024-05-01T10:00:00": 1})
    moment = schema_for(pydantic.NaiveDatetime, "2024-05-01T10:00:00")
    values = {moment["pattern"]: {"type": "integer"}}
    assert schema == {"type": "object", "patternProperties": values, "additionalProperties": False}


def test_a_mapping_inside_a_model_stays_open() -> None:
    engine = engine_for(answer={"label": "good", "counts": {"a": 1}})
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        dspy.Predict(signature(answer=Counted))(q="x")
    schema = engine.requests[-1].schema
    assert schema is not None
    assert schema["$defs"]["Counted"]["properties"]["counts"]["additionalProperties"] == {"type": "integer"}


def test_tool_calls_that_are_written_as_text_are_in_the_schema() -> None:
    engine = engine_for(calls={"tool_calls": []})
    fields = {"tools": (list[dspy.Tool], dspy.InputField()), "calls": (dspy.ToolCalls, dspy.OutputField())}
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        dspy.Predict(dspy.Signature(fields))(tools=[])
    schema = engine.requests[-1].schema
    assert schema is not None
    assert list(schema["properties"]) == ["calls"]


def without_a_module(lm: Any) -> None:
    dspy.JSONAdapter()(lm, {}, signature(counts=dict[str, int]), [], {"q": "x"})


def with_another_signature(lm: Any) -> None:
    dspy.Predict("q -> a, b")(q="x", signature=signature(counts=dict[str, int]))


@pytest.mark.parametrize("call", [without_a_module, with_another_signature])
def test_where_the_signature_is_not_known_any_object_is_asked_for(call: Callable[[Any], None]) -> None:
    engine = engine_for(counts={})
    with dspy.context(lm=plain_lm(engine), adapter=dspy.JSONAdapter()):
        call(plain_lm(engine))
    assert [request.schema for request in engine.requests] == [None]


def test_a_format_of_the_users_own_is_left_alone() -> None:
    engine = engine_for(label="good")
    plain_lm(engine)("x", response_format={"type": "json_object"})
    assert engine.requests[-1].schema is None
