"""A compile run in MLflow: what was asked, scores and costs by step, losses by training step."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ..errors import ConfigError, MissingExtraError
from .events import Callback, RunEndEvent, RunStartEvent, StepEndEvent, StepStartEvent, TrainingEvent, WarningEvent

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_LONGEST_PARAM = 500
"""Characters of a parameter's value that MLflow stores on every backend."""
_LONGEST_TAG = 5000
"""The same of a tag's value."""


class MLflowCallback(Callback):
    """Logs a compile run to MLflow: what was asked as params, scores and costs per step, losses per training step,
    warnings as tags.

    Joins the MLflow run that is active, else starts one of its own and ends it: FINISHED when the run is complete,
    KILLED by Ctrl-C, FAILED when anything else stopped it (an error, the budget).
    Raises ConfigError for a run_name that is no text, MissingExtraError when mlflow is not installed.
    """

    def __init__(self, run_name: str | None = None) -> None:
        if not isinstance(run_name, str | None):
            raise ConfigError(f"run_name={run_name!r} is not allowed: give a text, or None for MLflow's own.")
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError as error:
            raise MissingExtraError(
                "MLflowCallback needs mlflow, which is not installed: pip install 'bettertogether[mlflow]'."
            ) from error
        self._run_name = run_name
        self._started = False
        self._step = 0
        self._warnings = 0

    def on_run_start(self, event: RunStartEvent) -> None:
        """Start the MLflow run and log what was asked."""
        if self._mlflow.active_run() is None:
            self._mlflow.start_run(run_name=self._run_name)
            self._started = True
        params = {"strategy": event["strategy"], **_flat(event.get("params", {}))}
        self._mlflow.log_params({key: str(value)[:_LONGEST_PARAM] for key, value in params.items()})

    def on_step_start(self, event: StepStartEvent) -> None:
        """Note which step the training losses belong to."""
        self._step = event["index"]

    def on_training(self, event: TrainingEvent) -> None:
        """Log the losses of this training step."""
        line = event["progress"]
        values = {"loss": line.loss, "validation_loss": line.validation_loss, "learning_rate": line.learning_rate}
        adapter = _NOT_IN_NAMES.sub("_", event.get("adapter", "adapter"))
        prefix = f"step_{self._step}/{adapter}"
        known = {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
        self._mlflow.log_metrics(known, step=line.step)

    def on_warning(self, event: WarningEvent) -> None:
        """Tag the run with what makes a score or a step meaningless."""
        self._warnings += 1
        self._mlflow.set_tag(f"warning_{self._warnings}", event["text"][:_LONGEST_TAG])

    def on_step_end(self, event: StepEndEvent) -> None:
        """Log the step's score and cost."""
        record = event["record"]
        ledger = record.ledger
        values = {"score": record.score, "step_gain": record.step_gain, "seconds": ledger.seconds}
        values |= {"lm_calls": ledger.lm_calls, "metric_calls": ledger.metric_calls, "tokens": ledger.tokens}
        if ledger.cost != 0:
            values["cost"] = ledger.cost
        self._mlflow.log_metrics({k: float(v) for k, v in values.items() if v is not None}, step=record.index)
        self._mlflow.set_tag(f"step_{record.index}", f"{record.name}: {record.status}")

    def on_run_end(self, event: RunEndEvent) -> None:
        """Log which round was selected."""
        report = event["report"]
        if report is not None:
            self._mlflow.log_metric("selected", report.selected)
            if report.selected_round.score is not None:
                self._mlflow.log_metric("selected_score", report.selected_round.score)
            self._mlflow.log_text(str(report), "report.txt")
        error = event.get("error")
        killed = error is not None and error.startswith(KeyboardInterrupt.__name__)
        self._end("KILLED" if killed else "FAILED" if error else "FINISHED")

    def close(self) -> None:
        """End the MLflow run when the compile run was stopped."""
        self._end("KILLED")

    def _end(self, status: str) -> None:
        if self._started:
            self._started = False
            self._mlflow.end_run(status)


def _flat(params: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys, of the characters that MLflow allows."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = prefix + _NOT_IN_NAMES.sub("_", str(key))
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
