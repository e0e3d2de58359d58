"""What watches a compile run: write your own by subclassing `Callback`.

For example one that appends each round's score to a file as soon as it is known::

    import json
    from pathlib import Path

    from bettertogether import BetterTogether
    from bettertogether.callbacks import Callback, RunEndEvent, StepEndEvent, WarningEvent


    class ScoresInFile(Callback):
        def __init__(self, path: str) -> None:
            self._file = Path(path).open("a", encoding="utf-8")

        def on_step_end(self, event: StepEndEvent) -> None:
            record = event["record"]
            self._write(round=record.name, status=record.status, score=record.score, seconds=record.ledger.seconds)

        def on_warning(self, event: WarningEvent) -> None:
            self._write(warning=event["text"])

        def on_run_end(self, event: RunEndEvent) -> None:
            report, error = event["report"], event.get("error")
            self._write(selected=report and report.selected_round.name, error=error)

        def close(self) -> None:
            self._file.close()

        def _write(self, **values: object) -> None:
            self._file.write(json.dumps(values) + "\\n")
            self._file.flush()


    callbacks = [ScoresInFile("scores.jsonl")]
    program = BetterTogether(metric).compile(program, trainset=trainset, callbacks=callbacks)

`events` says what each method is given and when it is called. A callback observes: it can't change the run, and what it
raises is raised by `compile`. `ProgressDisplay` (on by default), `MLflowCallback`, `WandbCallback` and
`TrackerCallback` (TensorBoard, trackio and others) are callbacks too.
"""

from .display import ProgressDisplay
from .events import (
    Callback,
    CandidateEvent,
    Event,
    EventName,
    ProgressEvent,
    RunEndEvent,
    RunStartEvent,
    StepEndEvent,
    StepStartEvent,
    TrainingEvent,
    WarningEvent,
    emit,
    listening,
    warn,
)
from .mlflow import MLflowCallback
from .tracker import TrackerCallback
from .wandb import WandbCallback

__all__ = [
    "Callback",
    "CandidateEvent",
    "Event",
    "EventName",
    "MLflowCallback",
    "ProgressDisplay",
    "ProgressEvent",
    "RunEndEvent",
    "RunStartEvent",
    "StepEndEvent",
    "StepStartEvent",
    "TrackerCallback",
    "TrainingEvent",
    "WandbCallback",
    "WarningEvent",
    "emit",
    "listening",
    "warn",
]
