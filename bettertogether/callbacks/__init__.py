"""What watches a compile run: the events, a progress display, MLflow. Write your own by subclassing `Callback`."""

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
    require_callbacks,
    run_end_on_error,
    warn,
)
from .mlflow import MLflowCallback

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
    "TrainingEvent",
    "WarningEvent",
    "emit",
    "listening",
    "require_callbacks",
    "run_end_on_error",
    "warn",
]
