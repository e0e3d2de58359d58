"""What a tracker of experiments is told of a compile run, whichever it is; subclasses say it in the tracker's words.

Metrics of a round have the round's index as their step: `score`, `step_gain`, `seconds`, `lm_calls`, `metric_calls`,
`tokens`, `cost`. Those of a training have the optimizer step: `step_1/adapter_1/2/loss`, `.../validation_loss`,
`.../validation_error`, `.../learning_rate`, of the first of two adapters in the round with index 1; of one that learns
from rewards `step_1/adapter/...`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..files import json_text
from ..records import PolicyDetails, WeightDetails
from .events import Callback, RunEndEvent, RunStartEvent, StepEndEvent, StepStartEvent, TrainingEvent, WarningEvent

Status = Literal["FINISHED", "FAILED", "KILLED"]
Files = Mapping[str, Path | str]
"""Names to a file, a folder, or the text of a file that is not there yet."""

_NOT_IN_NAMES = re.compile(r"[^\w\-./]", re.ASCII)


class Tracking(Callback):
    """Base of the callbacks for trackers."""

    _index = 0
    """Of the round under way."""
    _warnings = 0
    _folder = Path()
    """The run's."""
    _under_way = False

    def on_run_start(self, event: RunStartEvent) -> None:
        """Begin, and log what was asked."""
        self._folder, self._warnings = Path(event.get("run_dir", "")), 0
        self._begin({"strategy": event["strategy"], **_flat(event.get("params", {}))})
        self._under_way = True

    def on_step_start(self, event: StepStartEvent) -> None:
        """Note which round the training losses belong to."""
        self._index = event["index"]

    def on_training(self, event: TrainingEvent) -> None:
        """Log the losses of this training step."""
        line = event["progress"]
        names = ("loss", "validation_loss", "validation_error", "learning_rate")
        values = {name: getattr(line, name) for name in names}
        if (rewards := event.get("rewards")) is not None:
            values |= {name: value for name, value in asdict(rewards).items() if name != "step"}
        prefix = f"step_{self._index}/{_as_name(event.get('adapter', 'adapter'))}"
        known = {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
        self._log(known, line.step, f"{prefix}/step")

    def on_warning(self, event: WarningEvent) -> None:
        """Note what makes a score or a step meaningless."""
        self._warnings += 1
        self._note(f"warning_{self._warnings}", event["text"])

    def on_step_end(self, event: StepEndEvent) -> None:
        """Log the round's score and cost, and keep what was trained."""
        record = event["record"]
        ledger = record.ledger
        values = {"score": record.score, "step_gain": record.step_gain, "seconds": ledger.seconds}
        values |= {"lm_calls": ledger.lm_calls, "metric_calls": ledger.metric_calls, "tokens": ledger.tokens}
        if ledger.cost != 0:
            values["cost"] = ledger.cost
        self._log({name: float(value) for name, value in values.items() if value is not None}, record.index, "round")
        self._note(f"step_{record.index}", f"{record.name}: {record.status}")
        if isinstance(record.details, WeightDetails | PolicyDetails):
            self._keep(f"step_{record.index}", "model", self._trained(record.details))

    def on_run_end(self, event: RunEndEvent) -> None:
        """Log which round was selected, keep the report, and end as the run did."""
        report = event["report"]
        if report is not None:
            self._conclude("selected", report.selected)
            if report.selected_round.score is not None:
                self._conclude("selected_score", report.selected_round.score)
            pages = {name: self._folder / name for name in ("report.html", "report.json")}
            there = {name: path for name, path in pages.items() if path.is_file()}
            self._keep("report", "report", {"report.txt": str(report), **there})
        error = event.get("error")
        killed = error is not None and error.startswith(KeyboardInterrupt.__name__)
        self._end("KILLED" if killed else "FAILED" if error else "FINISHED")

    def close(self) -> None:
        """End where the compile run was stopped."""
        self._end("KILLED")

    def _trained(self, details: WeightDetails | PolicyDetails) -> Files:
        files: dict[str, Path | str] = {}
        if isinstance(details, WeightDetails):
            files["data_card.json"] = json_text(asdict(details.data_card))
        for adapter in details.adapters.values():
            recorded = Path(adapter.folder)
            moved = self._folder / "adapters" / recorded.name
            files[f"adapters/{_as_name(recorded.name)}"] = moved if moved.is_dir() else recorded
        return files

    def _end(self, status: Status) -> None:
        if self._under_way:
            self._under_way = False
            self._finish(status)

    @abstractmethod
    def _begin(self, params: Mapping[str, bool | int | float | str]) -> None:
        """Join the tracker's run, or start one. Dots in the names of parameters stand for nesting."""

    @abstractmethod
    def _log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        """Metrics at a step of an axis: "round", or one for each training."""

    @abstractmethod
    def _note(self, name: str, text: str) -> None:
        """A text that belongs to the run."""

    @abstractmethod
    def _conclude(self, name: str, value: float) -> None:
        """A number that belongs to the run as a whole."""

    def _keep(self, name: str, kind: str, files: Files) -> None:
        """Files that belong together."""

    @abstractmethod
    def _finish(self, status: Status) -> None:
        """End the tracker's run, where it was started here."""


def _as_name(text: str) -> str:
    """A text in the characters that every tracker allows in names."""
    return _NOT_IN_NAMES.sub("_", text)


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """A nested mapping with dotted names, each value a number or a text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in params.items():
        name = prefix + _as_name(str(key))
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
