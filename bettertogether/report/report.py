"""What compile returns as `program.report`: the numbers of a run, as a table and as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from ..checks import require
from ..files import atomic_write
from . import html, text
from .data import ReportData
from .view import ReportView, view_of


@dataclass(frozen=True, repr=False)
class CompileReport(ReportData):
    """The result of a compile run. `print(report)` and a notebook show a table; `to_html` writes a page."""

    @cached_property
    def _view(self) -> ReportView:
        return view_of(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML file that needs nothing else. Raises ConfigError, RunDirectoryError."""
        is_path = isinstance(path, str | os.PathLike) and bool(os.fspath(path))
        require(is_path, "path", path, "the file to write, such as 'report.html'")
        atomic_write(os.path.expanduser(path), html.render(self._view))

    def __str__(self) -> str:
        return text.render(self._view)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html.render_in_notebook(self._view)
