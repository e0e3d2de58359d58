"""Records and reports of schema 1, in which all that a step reported stood in one dict."""

from __future__ import annotations

from collections.abc import Mapping

from .saved import Fields

_KIND_BY_KEY = {"candidates": "prompt", "data_card": "weight", "optimizer": "other"}


def record_of_schema_1(fields: Fields) -> Fields:
    """The fields of a record in the form of today."""
    details = fields.get("details", {})
    if not isinstance(details, Mapping):
        return fields
    own = dict(details)
    moved = {
        "adapter_folders": own.pop("adapter_folders", {}),
        "two_by_two": own.pop("two_by_two", None) or None,
        "warnings": own.pop("warnings", ()),
    }
    card = own.get("data_card")
    if isinstance(card, Mapping) and isinstance(moved["warnings"], list) and isinstance(card.get("warnings"), list):
        moved["warnings"] = [*moved["warnings"], *card["warnings"]]
    kind = next((kind for key, kind in _KIND_BY_KEY.items() if key in own), None)
    return {**fields, **moved, "details": {**own, "kind": kind} if kind else None}


def report_of_schema_1(fields: Fields) -> Fields:
    """The fields of a report in the form of today; its rounds have a schema number of their own."""
    return {key: value for key, value in fields.items() if key != "extra"}
