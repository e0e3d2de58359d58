"""What is going on in a compile run, kept from its events, and as text."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..printable import one_line
from ..records import ARROW, STUDENT, StepRecord, score_text
from .events import (
    CandidateEvent,
    ProgressEvent,
    RunStartEvent,
    StepEndEvent,
    StepStartEvent,
    TrainingEvent,
    WarningEvent,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN_ROUNDS = 8
_SHOWN_WARNINGS = 3
_BAR = 28


def time_text(seconds: float) -> str:
    """Minutes and seconds, hours where there are: "0:07", "12:40", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _after(now_s: float, left_s: float | None) -> float:
    """When the time left is over; never where it isn't limited."""
    return math.inf if left_s is None else now_s + left_s


class ProgressState:
    """What is going on, from the events. The view is drawn in a thread of its own, hence the lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._started_s = self._event_s = clock()
        self._strategy = self._run_dir = ""
        self._rounds: list[str] = []
        self._finished: list[StepRecord] = []
        self._current: StepStartEvent | None = None
        self._warnings: list[str] = []
        self._run_ends_s = math.inf
        """When the budget's minutes are over."""
        self._clear_step()

    def _clear_step(self) -> None:
        self._step_started_s = self._event_s
        self._candidate: CandidateEvent | None = None
        self._training: TrainingEvent | None = None
        self._clear_phase("", self._event_s)

    def _clear_phase(self, phase: str, started_s: float) -> None:
        self._phase, self._phase_started_s = phase, started_s
        self._done = self._total = self._tokens = self._at_once = 0
        self._done_before = 0
        """What an earlier sitting did of it."""
        self._ends_s, self._may_end_early = math.inf, False
        """When it ends at the latest, and whether it may have enough before."""

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    def run_start(self, event: RunStartEvent) -> None:
        with self._lock:
            self._started_s = self._event_s = self._clock()
            self._strategy, rounds = event["strategy"], list(event["rounds"])
            self._run_dir = event.get("run_dir", "")
            self._run_ends_s = _after(self._started_s, event.get("left_s"))
            # The student's alone: "auto", which chooses the others one by one.
            self._rounds = rounds if len(rounds) > 1 else []
            self._finished, self._current, self._warnings = [], None, []

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
            self._at_once = event.get("at_once", 0)

    def training(self, event: TrainingEvent) -> None:
        with self._lock:
            line = event["progress"]
            self._training = event
            if "rewards" in event:
                # Told between the passes over examples that the training consists of.
                self._event_s = self._clock()
                return
            begins = self._advance(f"training {event.get('adapter', '')}".strip(), line.step, line.total_steps)
            if begins and line.step > 1:
                self._phase_started_s, self._done_before = self._event_s, line.step
            else:
                self._tokens += line.new_tokens
            self._ends_s = _after(self._event_s, event.get("left_s"))
            self._may_end_early = event.get("may_end_early", False)

    def _advance(self, phase: str, done: int, total: int) -> bool:
        """Take what is done of a phase, and tell whether it is one that begins."""
        begins = phase != self._phase or done < self._done
        if begins:
            # One that was not told as it began did so when the event before its first one came.
            self._clear_phase(phase, self._event_s if done else self._clock())
        self._event_s = self._clock()
        self._done, self._total = done, total
        return begins

    def step_end(self, event: StepEndEvent) -> None:
        with self._lock:
            self._event_s = self._clock()
            self._finished.append(event["record"])
            self._clear_phase("", self._event_s)

    def warning(self, event: WarningEvent) -> None:
        with self._lock:
            self._warnings.append(event["text"])

    def step_text(self) -> str:
        """ "step 2 of 4 (p -> w)"; "step 2 (p)" where it isn't known how many there will be."""
        with self._lock:
            if self._current is None:
                return "run"
            total = f" of {len(self._rounds)}" if self._rounds else ""
            return f"step {self._current['index'] + 1}{total} ({self._current['strategy'] or STUDENT})"

    def progress_text(self) -> str:
        """The step, what is done in it now, how far it is, how fast, and what is left."""
        with self._lock:
            parts = [f"{self._phase or 'working'} {self._done}/{self._total}", *self._rate_texts()]
            step = "" if self._current is None else f"{self.step_text()}: "
            return step + ", ".join([*parts, *self._detail_texts(), *self._best_texts()])

    def _rate_texts(self) -> list[str]:
        spent_s = self._event_s - self._phase_started_s
        texts = []
        done = self._done - self._done_before
        if self._tokens and spent_s > 0:
            texts.append(f"{self._tokens / spent_s:,.0f} tokens/s")
        # Of what runs at the same time, the first to end says nothing of how long the others take.
        if done >= max(1, self._at_once) and self._done < self._total:
            left_s, ends_s = spent_s / done * (self._total - self._done), min(self._ends_s, self._run_ends_s)
            texts.append(f"{self._left_text(left_s, ends_s, self._may_end_early)} in this phase")
        return texts + self._run_left_texts()

    def _left_text(self, left_s: float, ends_s: float, may_end_early: bool = False) -> str:
        """The time left by what was timed, and by when it ends at the latest."""
        most_s = max(0.0, ends_s - self._event_s)
        is_most = may_end_early or most_s < left_s
        return f"{'at most' if is_most else 'about'} {time_text(min(left_s, most_s))} left"

    def _run_left_texts(self) -> list[str]:
        """Time left in the run, once a step of every kind that is still to come has been timed."""
        if self._current is None or not self._rounds:
            return []
        timed: dict[str, list[float]] = {}
        for record in self._finished:
            timed.setdefault(record.step, []).append(record.ledger.seconds)
        current = self._current["step"]
        later = [name.split(ARROW)[-1] for name in self._rounds[self._current["index"] + 1 :]]
        if not all(step in timed for step in (current, *later)):
            return []
        means = {step: sum(seconds) / len(seconds) for step, seconds in timed.items()}
        left_s = max(0.0, means[current] - (self._clock() - self._step_started_s)) + sum(means[s] for s in later)
        return [f"{self._left_text(left_s, self._run_ends_s)} in all"]

    def _detail_texts(self) -> list[str]:
        texts = []
        if self._candidate is not None:
            total = "" if self._candidate["total"] is None else f" of {self._candidate['total']}"
            score, best = self._candidate["score"], self._candidate["best_score"]
            scores = f"scored {score_text(score, best)}, best candidate {score_text(best)}"
            texts.append(f"candidate {self._candidate['number']}{total} {scores}")
        if self._training is not None:
            line = self._training["progress"]
            texts += [f"loss {line.loss:.3f}"] if line.loss is not None else []
            texts += [f"held-out loss {line.validation_loss:.3f}"] if line.validation_loss is not None else []
            if (rewards := self._training.get("rewards")) is not None:
                texts += [f"reward {score_text(rewards.reward)}"] if rewards.reward is not None else []
                texts += [f"{rewards.kept_groups} of {rewards.groups} groups differ in reward"]
        return texts

    def _best_texts(self) -> list[str]:
        scored = [record for record in self._finished if record.score is not None]
        if not scored:
            return []
        best = max(scored, key=lambda record: record.score or 0.0)
        return [f"best so far {score_text(best.score)} ({best.name})"]

    def view(self) -> RenderableType:
        """The live view: rounds so far, then what is going on."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            lines: list[RenderableType] = []
            if self._strategy:
                lines.append(Text(f"{one_line(self._strategy)}   {time_text(self.elapsed_s)}", style="bold"))
            if self._run_dir:
                lines.append(Text(f"  run directory {one_line(self._run_dir)}", style="dim"))
            rounds = Table.grid(padding=(0, 2))
            shown = self._finished[-_SHOWN_ROUNDS:]
            largest = max((record.score for record in shown if record.score is not None), default=None)
            for record in shown:
                style = "" if record.status == "complete" else "red"
                name = Text(f"  {one_line(record.name)}", style=style)
                rounds.add_row(name, score_text(record.score, largest), time_text(record.ledger.seconds), record.status)
            if self._finished:
                lines.append(rounds)
            if self._current is None or len(self._finished) <= self._current["index"]:
                if self._current is not None:
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
