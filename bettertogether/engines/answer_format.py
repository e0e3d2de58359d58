"""The whole schema of an answer, where DSPy's JSONAdapter hands its LM less.

For the sake of services that take closed objects only, `dspy.JSONAdapter` asks for just any object as soon as one
output field is a `dict[...]`, and closes the mappings inside other fields, so that nothing but `{}` fits them. The
engines here can hold an answer to the schema of its fields as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import dspy
import pydantic
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from ._upstream import strict_schema

DSPY_NAME = "DSPyProgramOutputs"
"""Name of the model that JSONAdapter makes of a signature's output fields."""
DECIMAL = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"
HOST = r"[A-Za-z0-9]+([.-][A-Za-z0-9]+)*(:[0-9]{1,4})?"
SECONDS = r"[0-9]{1,2}(\.[0-9]{1,6})?S"
TIME = rf"T([0-9]{{1,2}}H([0-9]{{1,2}}M)?({SECONDS})?|[0-9]{{1,2}}M({SECONDS})?|{SECONDS})"
DAYS = r"([0-9]{1,3}Y([0-9]{1,3}D)?|[0-9]{1,6}D)"
DURATION = rf"^-?P({DAYS}({TIME})?|{TIME})$"
"""What pydantic writes, and can read back: it refuses longer ones."""
YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
DAY = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
DATE = f"({YEAR}-{DAY}|{LEAP_YEAR}-02-29)"
CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
ZONE = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
ZONES: Mapping[Any, str] = {None: f"{ZONE}?", "naive": ""}
"""By pydantic's `tz_constraint`; other ones want a zone."""
KEYS: Mapping[str, JsonSchemaValue] = {
    "int": {"pattern": r"^-?[0-9]+$"},
    "float": {"pattern": DECIMAL},
    "decimal": {"pattern": DECIMAL},
    "bool": {"enum": ["true", "false"]},
}


class _SchemaWriter(GenerateJsonSchema):
    """Says of text what pydantic reads it as, where its own schema says only that it is text."""

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        number, _ = super().decimal_schema(schema)["anyOf"]
        # Bounds keep the exponent out, with which numbers become infinite.
        if not number.keys() & {"minimum", "exclusiveMinimum"}:
            number["minimum"] = -1e15
        if not number.keys() & {"maximum", "exclusiveMaximum"}:
            number["maximum"] = 1e15
        # Demos have decimals as text, which can be held to its sign alone.
        least = number.get("minimum", number.get("exclusiveMinimum"))
        pattern = DECIMAL.replace("-?", "", 1) if least >= 0 else DECIMAL
        return {"anyOf": [number, {"type": "string", "pattern": pattern}]}

    def timedelta_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": DURATION}

    def date_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^{DATE}$"}

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^{DATE}T{_clock(schema)}$"}

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^{_clock(schema)}$"}

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        if not schema.get("allowed_schemes"):
            return super().url_schema(schema)
        return {"type": "string", "pattern": rf"^({'|'.join(schema['allowed_schemes'])})://{HOST}([/?#][!-~]*)?$"}

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        names = KEYS.get(schema.get("keys_schema", {}).get("type"))
        return super().dict_schema(schema) | ({"propertyNames": names} if names else {})


def _clock(schema: Any) -> str:
    """The time of a day, whose zone JSON schema's own formats would ask for."""
    return CLOCK + ZONES.get(schema.get("tz_constraint"), ZONE)


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().model_json_schema(*args, **{**kwargs, "schema_generator": _SchemaWriter})


def whole_format(asked: Any, messages: Sequence[Mapping[str, Any]] | None) -> Any:
    """The `response_format` to use for one that an adapter asks of an LM."""
    made = isinstance(asked, type) and issubclass(asked, pydantic.BaseModel) and asked.__name__ == DSPY_NAME
    if not made and asked != {"type": "json_object"}:
        return asked
    fields = _fields_in_use(messages) or (_fields(asked.model_fields) if made else ())
    return _answer_model(fields) if fields else asked


def plain_format(asked: Any) -> Any:
    """A `response_format` as JSON: for a pydantic model the schema that DSPy sends for it."""
    if not (isinstance(asked, type) and issubclass(asked, pydantic.BaseModel)):
        return asked
    schema = {"name": asked.__name__, "schema": strict_schema(asked.model_json_schema()), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _fields_in_use(messages: Sequence[Mapping[str, Any]] | None) -> tuple[tuple[str, Any], ...]:
    """Output fields of the predictor that is running, where these messages ask for them.

    An LM is not told the signature it is called for. The messages show whether it is that of the predictor: a call may
    have come with another, and an adapter may have changed it.
    """
    signature = getattr((dspy.settings.caller_modules or [None])[-1], "signature", None)
    if signature is None or not messages:
        return ()
    # Other adapters ask a second time, with a JSONAdapter of their own, where an answer does not parse.
    adapter = dspy.settings.adapter if isinstance(dspy.settings.adapter, dspy.JSONAdapter) else dspy.JSONAdapter()
    asked = messages[-1]["content"]
    if not isinstance(asked, str) or not asked.endswith(adapter.user_message_output_requirements(signature)):
        return ()
    return _fields(signature.output_fields)


def _fields(infos: Mapping[str, pydantic.fields.FieldInfo]) -> tuple[tuple[str, Any], ...]:
    """Names and types; a type holds its constraints."""
    return tuple((name, info.rebuild_annotation()) for name, info in infos.items())


def _answer_model(fields: tuple[tuple[str, Any], ...]) -> type[pydantic.BaseModel]:
    try:
        return _cached_model(fields)
    except TypeError:  # a constraint that can't be hashed
        return _make_model(fields)


def _make_model(fields: tuple[tuple[str, Any], ...]) -> type[pydantic.BaseModel]:
    types: dict[str, Any] = {name: (annotation, ...) for name, annotation in fields}
    return pydantic.create_model(DSPY_NAME, __base__=_Answer, **types)


_cached_model = lru_cache(maxsize=256)(_make_model)
