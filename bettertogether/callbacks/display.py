"""The progress of a compile run on stderr: a live view in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

from ..checks import is_number, require, require_switch
from ..printable import get_logger, one_line
from ..records import count_text, score_text
from .events import (
    Callback,
    CandidateEvent,
    ProgressEvent,
    RunEndEvent,
    RunStartEvent,
    StepEndEvent,
    StepStartEvent,
    TrainingEvent,
    WarningEvent,
)
from .notebook import NotebookView
from .progress import ProgressState, time_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

logger = get_logger(__name__)


class ProgressDisplay(Callback):
    """Shows which step of how many runs, what it does, calls done, tokens per second, the best score, the time left.

    Output that can't be written (a terminal that went away, a closed pipe, a full disk) turns the display off, which
    the log says once; the run goes on.

    Args:
        quiet: Show nothing.
        interval_s: Seconds between two plain lines where there is no terminal; a line marks each step in any case.
        file: Where to write; None is stderr.
        clock: For tests.

    Raises ConfigError.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        interval_s: float = 15.0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_switch("quiet", quiet)
        require(is_number(interval_s) and interval_s >= 0, "interval_s", interval_s, "seconds, 0 or more")
        writable = file is None or callable(getattr(file, "write", None))
        require(writable, "file", file, "an open text file, or None for stderr")
        require(callable(clock), "clock", clock, "a function that returns seconds")
        self._quiet = quiet
        self._interval_s = interval_s
        self._file = file
        self._output: _Output | None = None
        self._state = ProgressState(clock)
        self._console: Console | None = None
        self._live: Live | NotebookView | None = None
        self._last_line_s = clock()
        self._clock = clock

    def on_run_start(self, event: RunStartEvent) -> None:
        """Open the view."""
        self._state.run_start(event)
        self._open()
        run_dir = f", run directory {event['run_dir']}" if "run_dir" in event else ""
        self._line(f"start {event['strategy']}{run_dir}")

    def on_step_start(self, event: StepStartEvent) -> None:
        """A new step in the view."""
        self._state.step_start(event)
        self._line(f"{self._state.step_text()} starts")

    def on_candidate(self, event: CandidateEvent) -> None:
        """The candidate and the best score so far."""
        self._state.candidate(event)
        self._moved()

    def on_progress(self, event: ProgressEvent) -> None:
        """Calls done."""
        self._state.progress(event)
        self._moved()

    def on_training(self, event: TrainingEvent) -> None:
        """Training steps done and the loss."""
        self._state.training(event)
        self._moved()

    def on_step_end(self, event: StepEndEvent) -> None:
        """The step's score."""
        self._state.step_end(event)
        record = event["record"]
        score = "no score" if record.score is None else f"score {score_text(record.score)}"
        failed = f", {count_text(record.failed, 'example')} failed" if record.failed else ""
        self._line(f"{self._state.step_text()} {record.status}, {score}{failed}, {time_text(record.ledger.seconds)}")

    def on_warning(self, event: WarningEvent) -> None:
        """Something that makes a score or a step meaningless, unless the log has told it in the same place."""
        self._state.warning(event)
        if self._output is None or not self._output.has_log:
            self._line(f"warning: {event['text']}")

    def on_run_end(self, event: RunEndEvent) -> None:
        """The result in a line, and the view closed."""
        self.close()
        if self._console is None:
            return
        report = event["report"]
        if report is not None:
            best = report.selected_round
            score = "" if best.score is None else f", score {score_text(best.score)}"
            self._line(f"done: {best.name}{score}", always=True)
        if event.get("error"):
            self._line(f"stopped: {event.get('error')}", always=True)

    def close(self) -> None:
        """Give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _open(self) -> None:
        stream = self._file or sys.stderr
        if self._quiet or stream is None:
            return
        from rich.console import Console
        from rich.live import Live

        self._output = _Output(stream)
        # In a notebook, rich would not write to a file.
        jupyter = None if self._file is None else False
        self._console = Console(file=cast(IO[str], self._output), highlight=False, force_jupyter=jupyter)
        if self._console.is_jupyter:
            self._live = NotebookView(self._state.view)
        elif self._console.is_terminal:
            self._live = Live(get_renderable=self._state.view, console=self._console, refresh_per_second=4)
        if self._live is not None:
            self._live.start()

    def _moved(self) -> None:
        if isinstance(self._live, NotebookView):
            self._live.refresh()
        if self._clock() - self._last_line_s >= self._interval_s:
            self._line(self._state.progress_text())

    def _line(self, text: str, *, always: bool = False) -> None:
        if self._output is not None and self._output.gone:
            self.close()
            self._console = None
        if self._console is None or (self._live is not None and not always):
            return
        self._last_line_s = self._clock()
        line = f"[bettertogether {time_text(self._state.elapsed_s)}] {one_line(text)}"
        self._console.print(line, markup=False, soft_wrap=True)


class EvaluationDisplay(ProgressDisplay):
    """The same for an evaluation that is no part of a run."""

    def on_progress(self, event: ProgressEvent) -> None:
        """Calls done; the first opens the view."""
        if self._output is None:
            self._open()
        super().on_progress(event)

    def done(self, text: str) -> None:
        """The result in a line, and the view closed."""
        self.close()
        self._line(text, always=True)


class _Output:
    """A text stream that is written to until that fails, and then no more."""

    def __init__(self, stream: IO[str]) -> None:
        # Where another rich display stands between, the stream behind it, as rich itself does.
        self._stream = getattr(stream, "rich_proxied_file", stream)
        self.gone = False

    @property
    def has_log(self) -> bool:
        """Whether a warning of the log is written to the stream, too."""
        handlers: list[logging.Handler | None] = []
        log: logging.Logger | None = logger
        while log is not None:
            handlers += log.handlers
            log = log.parent if log.propagate else None
        shown = [
            each for each in handlers or [logging.lastResort] if each is not None and each.level <= logging.WARNING
        ]
        is_told = logger.isEnabledFor(logging.WARNING)
        return is_told and any(getattr(each, "stream", None) is self._stream for each in shown)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.gone:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self.gone = True
            # A log that goes to the same closed stream can't be written either.
            with contextlib.suppress(OSError, ValueError):
                logger.warning(
                    "The progress display is off from here on, since it can't be written (%s: %s). The run goes on.",
                    type(error).__name__,
                    error,
                )
