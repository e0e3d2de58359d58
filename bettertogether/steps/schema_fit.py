"""Answers that fit the JSON schema of their request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, RootModel


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The schema that a request's `response_format` asks for; None where it names none."""
    schema: Mapping[str, Any] | None = (response_format or {}).get("schema")
    return schema


def fits(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether a text is JSON that a schema allows, as far as the schema can be read here."""
    import jsonschema

    try:
        return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))
    except re.error:
        # JSON schema's patterns are those of another language.
        return True
    except ValueError:
        return False


def by_field(value: Any) -> Any:
    """The value with mappings in place of pydantic models: of their fields, under the names that a schema has for them,
    whatever way of writing a model has of its own."""
    if isinstance(value, RootModel):
        return by_field(value.root)
    if isinstance(value, BaseModel):
        infos = type(value).model_fields.items()
        fields = {_name_in_schema(name, info): by_field(getattr(value, name)) for name, info in infos}
        return {**fields, **by_field(value.model_extra or {})}
    if isinstance(value, list | tuple | set | frozenset):
        return [by_field(each) for each in value]
    if isinstance(value, dict):
        return {key: by_field(each) for key, each in value.items()}
    return value


def _name_in_schema(name: str, info: Any) -> str:
    alias = info.validation_alias
    first = alias.choices[0] if isinstance(alias, AliasChoices) else alias
    return first if isinstance(first, str) else name
