"""The progress of a compile run on stderr: a live view in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import ConfigError
from ..printable import get_logger, one_line
from ..records import STUDENT, StepRecord
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

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

logger = get_logger(__name__)

_SHOWN_ROUNDS = 8
_SHOWN_WARNINGS = 3
_BAR = 28


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
        if not isinstance(quiet, bool):
            raise ConfigError(f"quiet={quiet!r} is not allowed: give True or False.")
        if not isinstance(interval_s, int | float) or isinstance(interval_s, bool) or not 0 <= interval_s < math.inf:
            raise ConfigError(f"interval_s={interval_s!r} is not allowed: give seconds, 0 or more.")
        if file is not None and not callable(getattr(file, "write", None)):
            raise ConfigError(f"file={file!r} is not allowed: give an open text file, or None for stderr.")
        if not callable(clock):
            raise ConfigError(f"clock={clock!r} is not allowed: give a function that returns seconds.")
        self._quiet = quiet
        self._interval_s = interval_s
        self._file = file
        self._output: _Output | None = None
        self._state = _State(clock)
        self._console: Console | None = None
        self._live: Live | None = None
        self._last_line_s = clock()
        self._clock = clock

    def on_run_start(self, event: RunStartEvent) -> None:
        """Open the view."""
        self._state.run_start(event)
        stream = self._file or sys.stderr
        if self._quiet or stream is None:
            return
        from rich.console import Console
        from rich.live import Live

        self._output = _Output(stream)
        self._console = Console(file=cast(IO[str], self._output), highlight=False)
        if self._console.is_terminal or self._console.is_jupyter:
            self._live = Live(get_renderable=self._state.view, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._line(f"start {event['strategy']}")

    def on_step_start(self, event: StepStartEvent) -> None:
        """A new step in the view."""
        self._state.step_start(event)
        self._line(f"{self._state.step_text()} starts")

    def on_candidate(self, event: CandidateEvent) -> None:
        """The candidate and the best score so far."""
        self._state.candidate(event)
        self._line_at_interval()

    def on_progress(self, event: ProgressEvent) -> None:
        """Calls done."""
        self._state.progress(event)
        self._line_at_interval()

    def on_training(self, event: TrainingEvent) -> None:
        """Training steps done and the loss."""
        self._state.training(event)
        self._line_at_interval()

    def on_step_end(self, event: StepEndEvent) -> None:
        """The step's score."""
        self._state.step_end(event)
        record = event["record"]
        score = "no score" if record.score is None else f"score {record.score:.3f}"
        failed = f", {record.failed} examples failed" if record.failed else ""
        self._line(f"{self._state.step_text()} {record.status}, {score}{failed}, {_time(record.ledger.seconds)}")

    def on_warning(self, event: WarningEvent) -> None:
        """Something that makes a score or a step meaningless."""
        self._state.warning(event)
        self._line(f"warning: {event['text']}")

    def on_run_end(self, event: RunEndEvent) -> None:
        """The result in a line, and the view closed."""
        self.close()
        if self._console is None:
            return
        report = event["report"]
        if report is not None:
            best = report.selected_round
            score = "" if best.score is None else f", score {best.score:.3f}"
            self._line(f"done: {best.name}{score}", always=True)
        if event.get("error"):
            self._line(f"stopped: {event.get('error')}", always=True)

    def close(self) -> None:
        """Give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line_at_interval(self) -> None:
        if self._clock() - self._last_line_s >= self._interval_s:
            self._line(f"{self._state.step_text()}: {self._state.phase_text()}")

    def _line(self, text: str, *, always: bool = False) -> None:
        if self._output is not None and self._output.gone:
            self.close()
            self._console = None
        if self._console is None or (self._live is not None and not always):
            return
        self._last_line_s = self._clock()
        line = f"[bettertogether {_time(self._state.elapsed_s)}] {one_line(text)}"
        self._console.print(line, markup=False, soft_wrap=True)


class _Output:
    """A text stream that is written to until that fails, and then no more."""

    def __init__(self, stream: IO[str]) -> None:
        # Where another rich display stands between, the stream behind it, as rich itself does.
        self._stream = getattr(stream, "rich_proxied_file", stream)
        self.gone = False

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


class _State:
    """What is going on, from the events. The view is drawn in a thread of its own, hence the lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._started_s = self._event_s = clock()
        self._strategy = ""
        self._rounds: list[str] = []
        self._finished: list[StepRecord] = []
        self._current: StepStartEvent | None = None
        self._warnings: list[str] = []
        self._clear_step()

    def _clear_step(self) -> None:
        self._step_started_s = self._event_s
        self._candidate: CandidateEvent | None = None
        self._training: TrainingEvent | None = None
        self._clear_phase("", self._event_s)

    def _clear_phase(self, phase: str, started_s: float) -> None:
        self._phase, self._phase_started_s = phase, started_s
        self._done = self._total = self._tokens = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    def run_start(self, event: RunStartEvent) -> None:
        with self._lock:
            self._started_s = self._event_s = self._clock()
            self._strategy, self._rounds = event["strategy"], list(event["rounds"])

    def step_start(self, event: StepStartEvent) -> None:
        with self._lock:
            self._event_s = self._clock()
            self._current = event
            self._clear_step()

    def candidate(self, event: CandidateEvent) -> None:
        with self._lock:
            self._candidate = event

    def progress(self, event: ProgressEvent) -> None:
        with self._lock:
            self._advance(event["phase"], event["done"], event["total"])
            self._tokens += event.get("tokens", 0)

    def training(self, event: TrainingEvent) -> None:
        with self._lock:
            line = event["progress"]
            self._training = event
            self._advance(f"training {event.get('adapter', '')}".strip(), line.step, line.total_steps)
            self._tokens = line.tokens

    def _advance(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase or done < self._done:
            # A phase began when the event before its first one came: what is reported is work that is done.
            self._clear_phase(phase, self._event_s)
        self._event_s = self._clock()
        self._done, self._total = done, total

    def step_end(self, event: StepEndEvent) -> None:
        with self._lock:
            self._event_s = self._clock()
            self._finished.append(event["record"])
            self._clear_phase("", self._event_s)

    def warning(self, event: WarningEvent) -> None:
        with self._lock:
            self._warnings.append(event["text"])

    def step_text(self) -> str:
        """ "step 2 of 4 (p -> w)"."""
        with self._lock:
            if self._current is None:
                return "run"
            number, total = self._current["index"] + 1, max(len(self._rounds), self._current["index"] + 1)
            return f"step {number} of {total} ({self._current['strategy'] or STUDENT})"

    def phase_text(self) -> str:
        """What is done now, how far it is, how fast, and what is left."""
        with self._lock:
            parts = [f"{self._phase or 'working'} {self._done}/{self._total}", *self._rate_texts()]
            return ", ".join([*parts, *self._detail_texts(), *self._best_texts()])

    def _rate_texts(self) -> list[str]:
        spent_s = self._event_s - self._phase_started_s
        texts = []
        if self._tokens and spent_s > 0:
            texts.append(f"{self._tokens / spent_s:,.0f} tokens/s")
        if 0 < self._done < self._total:
            texts.append(f"about {_time(spent_s / self._done * (self._total - self._done))} left in this phase")
        return texts + self._run_left_texts()

    def _run_left_texts(self) -> list[str]:
        """Time left in the run, once a step of every kind that is still to come has been timed."""
        if self._current is None:
            return []
        timed: dict[str, list[float]] = {}
        for record in self._finished:
            timed.setdefault(record.step, []).append(record.ledger.seconds)
        current = self._current["step"]
        later = [name.split(" -> ")[-1] for name in self._rounds[self._current["index"] + 1 :]]
        if not all(step in timed for step in (current, *later)):
            return []
        means = {step: sum(seconds) / len(seconds) for step, seconds in timed.items()}
        left_s = max(0.0, means[current] - (self._clock() - self._step_started_s)) + sum(means[s] for s in later)
        return [f"about {_time(left_s)} left in all"]

    def _detail_texts(self) -> list[str]:
        texts = []
        if self._candidate is not None:
            total = "" if self._candidate["total"] is None else f" of {self._candidate['total']}"
            score, best = self._candidate["score"], self._candidate["best_score"]
            texts.append(f"candidate {self._candidate['number']}{total} scored {score:.3f}, best candidate {best:.3f}")
        if self._training is not None:
            line = self._training["progress"]
            texts += [f"loss {line.loss:.3f}"] if line.loss is not None else []
            texts += [f"held-out loss {line.validation_loss:.3f}"] if line.validation_loss is not None else []
        return texts

    def _best_texts(self) -> list[str]:
        scored = [record for record in self._finished if record.score is not None]
        if not scored:
            return []
        best = max(scored, key=lambda record: record.score or 0.0)
        return [f"best so far {best.score:.3f} ({best.name})"]

    def view(self) -> RenderableType:
        """The live view: rounds so far, then what is going on."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            lines: list[RenderableType] = [Text(f"{one_line(self._strategy)}   {_time(self.elapsed_s)}", style="bold")]
            rounds = Table.grid(padding=(0, 2))
            for record in self._finished[-_SHOWN_ROUNDS:]:
                score = "-" if record.score is None else f"{record.score:.3f}"
                style = "" if record.status == "complete" else "red"
                name = Text(f"  {one_line(record.name)}", style=style)
                rounds.add_row(name, score, _time(record.ledger.seconds), record.status)
            if self._finished:
                lines.append(rounds)
            if self._current is not None and len(self._finished) <= self._current["index"]:
                lines.append(Text(f"> {one_line(self.step_text())}", style="bold cyan"))
                bar = Table.grid(padding=(0, 1))
                counts = f"{self._done}/{self._total}" if self._total else ""
                bar.add_row(
                    Text(f"  {one_line(self._phase or 'starting')}"),
                    ProgressBar(total=self._total or 1, completed=self._done, width=_BAR),
                    Text(counts),
                )
                lines.append(bar)
                below = [*self._rate_texts(), *self._detail_texts(), *self._best_texts()]
                lines.append(Text("  " + one_line(", ".join(below)), style="dim"))
            lines += [Text(f"! {one_line(text)}", style="yellow") for text in self._warnings[-_SHOWN_WARNINGS:]]
            return Group(*lines)


def _time(seconds: float) -> str:
    """ "0:07", "12:40", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
