"""The report of a compile run: its numbers, as text and as a page."""

from .report import CompileReport

__all__ = ["CompileReport"]
