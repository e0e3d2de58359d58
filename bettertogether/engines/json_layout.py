"""From a JSON schema to a Lark grammar whose texts are byte for byte what `json.dumps(value, indent=2)` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANY_OBJECT = '%json {"type": "object", "x-guidance": {"whitespace_pattern": "[ \\\\n]{0,16}"}}'
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
)
ARRAY_KEYS = frozenset({"type", "items", "prefixItems", "minItems", "maxItems", "uniqueItems"}) | ANNOTATIONS
OBJECT_KEYS = frozenset({"type", "properties", "required", "additionalProperties", "$defs"}) | ANNOTATIONS
MAPPING_KEYS = ANNOTATIONS | {
    "type", "additionalProperties", "propertyNames", "patternProperties", "minProperties", "maxProperties", "$defs",
}  # fmt: skip
SCALAR = {"type": ["string", "number", "boolean", "null"]}
ANY_LEVELS = 3
"""Lists and mappings of any content are laid out to this depth; what is further in is written on one line."""
FINITE = (
    r"/-?(0|[1-9][0-9]{0,200})(\.[0-9]+)?([eE](\+?[0-9]{1,2}|-[0-9]{1,3}))?"
    r"|-?[0-9](\.[0-9]+)?[eE]\+?([12][0-9]{2}|30[0-7])/"
)
"""A number that no reader takes for infinity, as it does 1e400."""
BASE64 = r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"

Check = Callable[[str], tuple[str, list[str]]]
"""What is wrong with a grammar: the error for which it can't be used, "" where it can, and what it leaves out."""


@dataclass(frozen=True)
class Layout:
    """The grammar of a schema's answers."""

    grammar: str
    unenforced: tuple[str, ...] = ()
    """What the schema asks and the grammar does not."""


def lark_grammar(schema: Mapping[str, Any] | None, check: Check | None = None) -> Layout:
    """The grammar of the answers that a schema allows; None is any JSON object.

    Objects, arrays, enums and unions are laid out as `json.dumps(indent=2, ensure_ascii=False)` does, with properties
    in the schema's order. Other values are left to llguidance's own JSON grammar. What the layout can't express
    (optional properties, recursive types, `allOf`, ...) is written on one line, as `json.dumps` without indent does.
    What llguidance can't express either is left out of the value it stands at, which `check` finds out: all else is
    enforced. Raises KeyError, TypeError or ValueError for a schema that isn't one.
    """
    if schema is None:
        return Layout(f"start: value\nvalue: {ANY_OBJECT}\n")
    return _Grammar(schema, check or (lambda grammar: ("", []))).layout()


class _Grammar:
    def __init__(self, schema: Mapping[str, Any], check: Check) -> None:
        self._root = schema
        self._check = check
        self._rules: list[str] = []
        self._names: dict[tuple[str, int], str] = {}
        self._open: set[str] = set()
        self._unenforced: dict[str, None] = {}

    def layout(self) -> Layout:
        start = self._value(self._root, 0)
        return Layout("\n".join([f"start: {start}", *self._rules]) + "\n", tuple(self._unenforced))

    def _value(self, schema: Any, depth: int) -> str:
        """Name of the rule for a value that begins at an indent of `depth` levels."""
        key = json.dumps(schema), depth
        if key not in self._names:
            body = self._body(schema, depth)
            # An upper case name is a terminal to Lark: one item for the parser, whatever the number of choices.
            name = f"{'V' if _choices(schema) else 'v'}{len(self._names)}"
            self._rules.append(f"{name}: {body}")
            self._names[key] = name
        return self._names[key]

    def _body(self, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping):
            return self._anything(depth) if schema is True else self._one_line(schema)
        asked = schema.keys() - ANNOTATIONS - {"$defs"}
        if asked == {"$ref"}:
            return self._reference(schema["$ref"], depth)
        if choices := _choices(schema):
            return " | ".join(_literal(_dumps(value, depth)) for value in choices)
        for union in ("anyOf", "oneOf", "allOf"):
            if asked == {union} and (union != "allOf" or len(schema[union]) == 1):
                return " | ".join(self._value(part, depth) for part in schema[union])
        if not asked:
            return self._anything(depth)
        kind = schema.get("type")
        if asked == {"type"} and kind == "number":
            return FINITE
        if isinstance(kind, list) and {"array", "object"} & set(kind):
            return " | ".join(self._value({**schema, "type": each}, depth) for each in kind)
        if kind == "array" and not schema.keys() - ARRAY_KEYS:
            return self._array(schema, depth)
        if kind == "object" and not schema.keys() - OBJECT_KEYS and schema.get("properties"):
            return self._object(schema, depth)
        if kind == "object" and not schema.keys() - MAPPING_KEYS - {"properties", "required"}:
            return self._mapping(schema, depth)
        return self._one_line(schema)

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties = schema["properties"]
        if set(schema.get("required", ())) != set(properties):
            return self._one_line(schema)
        items = [
            (json.dumps(name, ensure_ascii=False) + ": ", self._value(value, depth + 1))
            for name, value in properties.items()
        ]
        return _sequence("{", items, "}", depth)

    def _mapping(self, schema: Mapping[str, Any], depth: int) -> str:
        """An object whose keys the schema does not name."""
        patterns = schema.get("patternProperties") or {}
        extra = schema.get("additionalProperties", not patterns)
        if schema.get("required") or (patterns and extra is not False):
            return self._one_line(schema)
        values = [({"pattern": pattern}, value) for pattern, value in patterns.items()]
        if extra is not False:
            values.append((schema.get("propertyNames") or {}, extra))
        entries = [f'{self._key(names, depth)} ": " {self._value(value, depth + 1)}' for names, value in values]
        most = schema.get("maxProperties") if entries else 0
        entry = f"({' | '.join(entries)})"
        return _listing("{", entry, "}", depth, schema.get("minProperties", 0), most)

    def _key(self, names: Any, depth: int) -> str:
        while isinstance(names, Mapping) and "$ref" in names:
            names = self._resolve(names["$ref"])
        if choices := _choices(names):
            return self._value({"enum": [_key_text(value) for value in choices]}, depth + 1)
        return self._value({**names, "type": "string"}, depth + 1)

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if schema.get("uniqueItems"):
            self._unenforced["items may be repeated (uniqueItems)"] = None
        if "prefixItems" not in schema:
            item = self._value(schema.get("items", True), depth + 1)
            return _listing("[", item, "]", depth, least, most)
        items = [("", self._value(item, depth + 1)) for item in schema["prefixItems"]]
        if not least == len(items) == most:
            return self._one_line(schema)
        return _sequence("[", items, "]", depth) if items else _literal("[]")

    def _anything(self, depth: int, levels: int = ANY_LEVELS) -> str:
        """Any JSON value."""
        if levels == 0:
            return self._one_line({})
        name = f"any{depth}_{levels}"
        if (name, depth) not in self._names:
            self._names[name, depth] = name
            inside = self._anything(depth + 1, levels - 1)
            key = self._value({"type": "string"}, depth + 1)
            filled = _listing("{", f'{key} ": " ({inside})', "}", depth, 0, None)
            listed = _listing("[", f"({inside})", "]", depth, 0, None)
            self._rules.append(f"{name}: {self._value(SCALAR, depth)} | {listed} | {filled}")
        return name

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
        """llguidance's own grammar of a schema; of as much of it as llguidance knows."""
        if not isinstance(schema, Mapping):
            return f"%json {json.dumps(schema)}"
        refers = '"$ref"' in json.dumps(schema)
        definitions = {k: self._root[k] for k in ("$defs", "definitions") if refers and k in self._root}
        whole = _without_base64({**definitions, **schema})
        kind = {"type": schema["type"]} if "type" in schema else {}
        for attempt in (whole, _without_patterns(whole), kind):
            rule = f"%json {json.dumps({**attempt, 'x-guidance': COMPACT})}"
            error, left_out = self._check(f"start: value\nvalue: {rule}\n")
            self._unenforced.update(dict.fromkeys([*left_out, error] if error else left_out))
            if not error:
                return rule
        raise ValueError(f"no grammar for {json.dumps(schema)[:200]}")


def _sequence(opening: str, items: Sequence[tuple[str, str]], closing: str, depth: int) -> str:
    """Rule body of a bracketed row of these very items, one a line; each is a text before a value, and its rule."""
    first, between, last = _frame(opening, closing, depth)
    parts = [
        f"{_literal((between if position else first) + text)} {rule}" for position, (text, rule) in enumerate(items)
    ]
    return " ".join([*parts, _literal(last)])


def _listing(opening: str, item: str, closing: str, depth: int, least: int, most: int | None) -> str:
    """Rule body of a bracketed list of such items, one a line."""
    first, between, last = map(_literal, _frame(opening, closing, depth))
    if most == 0:
        return _literal(opening + closing)
    bounds = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
    more = "" if most == 1 else f"({between} {item}){{{bounds}}} "
    filled = f"{first} {item} {more}{last}"
    return filled if least > 0 else f"{_literal(opening + closing)} | {filled}"


def _frame(opening: str, closing: str, depth: int) -> tuple[str, str, str]:
    """What stands before, between and after the items in brackets."""
    inner, outer = "  " * (depth + 1), "  " * depth
    return f"{opening}\n{inner}", f",\n{inner}", f"\n{outer}{closing}"


def _choices(schema: Any) -> list[Any]:
    """The values that a schema names, where it names them."""
    if not isinstance(schema, Mapping):
        return []
    return [schema["const"]] if "const" in schema else list(schema.get("enum") or [])


def _key_text(value: Any) -> str:
    """A value as `json.dumps` writes it for a key."""
    return value if isinstance(value, str) else json.dumps(value)


def _without_base64(schema: Any) -> Any:
    """The schema with the one format of pydantic's that llguidance does not know, and reading it back needs."""
    if isinstance(schema, list):
        return [_without_base64(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("type") == "string" and schema.get("format") == "base64":
        return {**{key: value for key, value in schema.items() if key != "format"}, "pattern": BASE64}
    return {key: _without_base64(value) for key, value in schema.items()}


def _without_patterns(schema: Any) -> Any:
    """The schema without its regular expressions."""
    if isinstance(schema, list):
        return [_without_patterns(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _without_patterns(value)
        for key, value in schema.items()
        if not (key == "patternProperties" or (key == "pattern" and isinstance(value, str)))
    }


def _dumps(value: Any, depth: int) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + "  " * depth)


def _literal(text: str) -> str:
    """A Lark string. The delete character, which JSON allows as it is, is an error of Lark's lexer."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
