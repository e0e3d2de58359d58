"""The live view in a notebook: one output that is put in the place of the one before."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 110
_EVERY_S = 0.25
_HTML = '<pre style="line-height: 1.3; font-family: monospace">{code}</pre>'


class NotebookView:
    """Shows what `view` gives; a saved notebook has its last state. rich's own needs ipywidgets, and is not saved."""

    def __init__(self, view: Callable[[], RenderableType]) -> None:
        self._view = view
        self._handle: Any = None
        self._shown_s = 0.0

    def start(self) -> None:
        """Show it below what the cell has shown so far."""
        from IPython.display import display

        self._handle = display(self._content(), raw=True, display_id=True)
        self._shown_s = time.monotonic()

    def refresh(self) -> None:
        """Show what has changed, unless it was shown just now."""
        if time.monotonic() - self._shown_s >= _EVERY_S:
            self.stop()
            self._shown_s = time.monotonic()

    def stop(self) -> None:
        """Show the state in which it stays."""
        self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=False)
        console.print(self._view())
        html = console.export_html(inline_styles=True, code_format=_HTML, clear=False)
        return {"text/html": html, "text/plain": console.export_text()}
