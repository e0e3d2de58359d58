"""From a JSON schema to a Lark grammar whose texts are byte for byte what `json.dumps(value, indent=2)` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ANY_OBJECT = '%json {"type": "object", "x-guidance": {"whitespace_pattern": "[ \\\\n]{0,16}"}}'
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})
ARRAY_KEYS = frozenset({"type", "items", "minItems", "maxItems"}) | ANNOTATIONS
OBJECT_KEYS = frozenset({"type", "properties", "required", "additionalProperties", "$defs"}) | ANNOTATIONS


def lark_grammar(schema: Mapping[str, Any] | None) -> str:
    """The grammar of the answers that a schema allows; None is any JSON object.

    Objects, arrays, enums and unions are laid out as `json.dumps(indent=2, ensure_ascii=False)` does, with properties
    in the schema's order. Other values are left to llguidance's own JSON grammar. What the layout can't express
    (optional properties, recursive types, `allOf`, ...) is written on one line, as `json.dumps` without indent does.
    Raises KeyError, TypeError or ValueError for a schema that isn't one.
    """
    if schema is None:
        return f"start: value\nvalue: {ANY_OBJECT}\n"
    return _Grammar(schema).text()


class _Grammar:
    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._root = schema
        self._rules: list[str] = []
        self._names: dict[tuple[str, int], str] = {}
        self._open: set[str] = set()

    def text(self) -> str:
        start = self._value(self._root, 0)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _value(self, schema: Any, depth: int) -> str:
        """Name of the rule for a value that begins at an indent of `depth` levels."""
        key = json.dumps(schema), depth
        if key not in self._names:
            body = self._body(schema, depth)
            name = f"v{len(self._names)}"
            self._rules.append(f"{name}: {body}")
            self._names[key] = name
        return self._names[key]

    def _body(self, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping):
            return self._one_line(schema)
        if "$ref" in schema and not schema.keys() - {"$ref", "$defs"} - ANNOTATIONS:
            return self._reference(schema["$ref"], depth)
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return " | ".join(_literal(_dumps(value, depth)) for value in values)
        for union in ("anyOf", "oneOf"):
            if union in schema and not schema.keys() - {union, "$defs"} - ANNOTATIONS:
                return " | ".join(self._value(part, depth) for part in schema[union])
        if schema.get("type") == "array" and "items" in schema and not schema.keys() - ARRAY_KEYS:
            return self._array(schema, depth)
        if schema.get("type") == "object" and not schema.keys() - OBJECT_KEYS:
            return self._object(schema, depth)
        return self._one_line(schema)

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties = schema.get("properties") or {}
        extra = schema.get("additionalProperties", True)
        if properties and set(schema.get("required", ())) != set(properties):
            return self._one_line(schema)
        if not properties and isinstance(extra, Mapping):
            key = self._value({"type": "string"}, depth + 1)
            return _listing("{", f'{key} ": " {self._value(extra, depth + 1)}', "}", depth, 0, None)
        if not properties:
            return '"{}"' if extra is False else self._one_line(schema)
        inner, outer = "  " * (depth + 1), "  " * depth
        parts = []
        for position, (name, value) in enumerate(properties.items()):
            opening = "{\n" if position == 0 else ",\n"
            frame = f"{opening}{inner}{json.dumps(name, ensure_ascii=False)}: "
            parts.append(f"{_literal(frame)} {self._value(value, depth + 1)}")
        return " ".join([*parts, _literal(f"\n{outer}}}")])

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        item = self._value(schema["items"], depth + 1)
        return _listing("[", item, "]", depth, schema.get("minItems", 0), schema.get("maxItems"))

    def _reference(self, reference: str, depth: int) -> str:
        if reference in self._open:
            return self._one_line({"$ref": reference})
        self._open.add(reference)
        try:
            return self._value(self._resolve(reference), depth)
        finally:
            self._open.discard(reference)

    def _resolve(self, reference: str) -> Any:
        if not reference.startswith("#/"):
            raise ValueError(f"$ref {reference!r} points outside the schema")
        node: Any = self._root
        for part in reference[2:].split("/"):
            node = node[part.replace("~1", "/").replace("~0", "~")]
        return node

    def _one_line(self, schema: Any) -> str:
        if isinstance(schema, Mapping):
            refers = '"$ref"' in json.dumps(schema)
            definitions = {k: self._root[k] for k in ("$defs", "definitions") if refers and k in self._root}
            schema = {**definitions, **schema, "x-guidance": COMPACT}
        return f"%json {json.dumps(schema)}"


def _listing(opening: str, item: str, closing: str, depth: int, least: int, most: int | None) -> str:
    """Rule body of a bracketed list of items, one a line."""
    inner, outer = "  " * (depth + 1), "  " * depth
    first = _literal(opening + "\n" + inner)
    following = _literal(",\n" + inner)
    last = _literal("\n" + outer + closing)
    bounds = f"{max(least - 1, 0)},{'' if most is None else max(most - 1, 0)}"
    filled = f"{first} {item} ({following} {item}){{{bounds}}} {last}"
    if most == 0:
        return _literal(opening + closing)
    return filled if least > 0 else f"{_literal(opening + closing)} | {filled}"


def _dumps(value: Any, depth: int) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + "  " * depth)


def _literal(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)
