"""A row's answer fits the schema that its own request asks for, by which the engine writes answers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import dspy
import pytest
from fakes import plain_lm
from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, WithJsonSchema
from tries import call_rows

from bettertogether.rollouts.runner import Runner
from bettertogether.steps.rows import Row
from bettertogether.steps.schema_fit import by_field, fits
from bettertogether.testing import FakeEngine

PYTHON: Any = dspy.Code["python"]


class Invoice(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    due: int = Field(alias="Amount-due")


Percent = Annotated[
    float,
    BeforeValidator(lambda value: float(str(value).rstrip("%"))),
    WithJsonSchema({"type": "string", "pattern": "^[0-9]+%$"}),
]


class Share(BaseModel):
    part: Percent


def row_of(kind: Any, value: Any) -> Row:
    """The row of a run in which the LM wrote this value for an output of this kind."""
    fields: dict[str, Any] = {"q": (str, dspy.InputField()), "out": (kind, dspy.OutputField())}
    engine = FakeEngine(lambda request: {"out": value, "note": "n"})
    program = dspy.Predict(dspy.Signature({**fields, "note": (str, dspy.OutputField())}, "Do it."))
    program.set_lm(plain_lm(engine))
    with dspy.context(adapter=dspy.JSONAdapter()):
        run = Runner(program).run(dspy.Example(q="x").with_inputs("q"))
        (row,) = call_rows(program, engine, run.calls[0])
    return row


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (PYTHON, {"code": "print(1)"}),
        (dspy.Reasoning, {"content": "because"}),
        (list[PYTHON], [{"code": "a"}, {"code": "b"}]),
        (Invoice, {"Amount-due": 7}),
        (dict[str, Invoice], {"a": {"Amount-due": 7}}),
        (int | str | Invoice, {"Amount-due": 7}),
        (Invoice | None, None),
        (int, 3),
    ],
)
def test_a_row_teaches_what_the_schema_of_its_request_asks_for(kind: Any, value: Any) -> None:
    row = row_of(kind, value)
    assert row.completion == json.dumps({"out": value, "note": "n"}, indent=2)
    assert row.response_format is not None
    assert fits(row.completion, row.response_format["schema"])
    assert [(span.name, row.completion[span.start : span.end]) for span in row.fields][-1] == ("note", '"n"')
    assert json.loads(row.completion[row.fields[0].start : row.fields[0].end]) == value


def test_what_only_the_lm_wrote_by_the_schema_is_learned_as_it_wrote_it() -> None:
    assert row_of(Share, {"part": "5%"}).completion == '{"out": {"part": "5%"}, "note": "n"}'


def test_where_nothing_fits_the_schema_the_adapters_writing_is_learned() -> None:
    assert json.loads(row_of(Share, {"part": "0.5%"}).completion) == {"out": {"part": 0.5}, "note": "n"}


def test_models_are_written_by_field_under_the_names_of_their_schema() -> None:
    class Names(RootModel[list[str]]):
        pass

    class Person(BaseModel):
        model_config = ConfigDict(extra="allow")
        name: str = Field(validation_alias=AliasChoices("full-name", "name"))
        town: str = Field(validation_alias=AliasPath("home", "town"))
        friends: Names

    person = Person.model_validate({"full-name": "A", "home": {"town": "B"}, "friends": ["C"], "age": 3})
    assert by_field({"all": (person,)}) == {"all": [{"full-name": "A", "town": "B", "friends": ["C"], "age": 3}]}


@pytest.mark.parametrize(("text", "allowed"), [('{"a": 1}', True), ('{"a": "1"}', False), ("a: 1", False)])
def test_a_text_fits_a_schema_or_not(text: str, allowed: bool) -> None:
    assert fits(text, {"type": "object", "properties": {"a": {"type": "integer"}}}) == allowed


def test_a_pattern_of_another_language_refuses_nothing() -> None:
    assert fits('{"a": "x"}', {"properties": {"a": {"pattern": r"\p{L}"}}})
