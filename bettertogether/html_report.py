"""A `CompileReport` as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import CompileReport


def render(report: CompileReport) -> str:
    """The page."""
    return f"<!doctype html><meta charset=utf-8><title>Better together</title><pre>{escape(str(report))}</pre>"
