"""A compile run in MLflow: what was asked, scores and costs by round, losses by training step, adapters, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checks import require
from ..extras import extra_module
from .tracking import Files, Status, Tracking

_LONGEST_PARAM = 500
"""Characters of a parameter's value that MLflow stores on every backend."""
_LONGEST_TAG = 5000
"""The same of a tag's value."""
_CHANGED = "last_compile."
_LONGEST_NAME = 250


class MLflowCallback(Tracking):
    """Logs a compile run to MLflow: what was asked as params, scores and costs per round, losses per training step,
    warnings as tags; as artifacts each weight step's adapters and data card, and the report.

    Joins the MLflow run that is active, else starts one of its own and ends it: FINISHED when the run is complete,
    KILLED by Ctrl-C, FAILED when anything else stopped it (an error, the budget). MLflow lets no param change: what the
    active run has with another value already, as from an earlier `compile`, becomes a tag, `last_compile.NAME`.
    Raises ConfigError for a run_name that is no text, MissingExtraError when mlflow is not installed.
    """

    def __init__(self, run_name: str | None = None) -> None:
        require(isinstance(run_name, str | None), "run_name", run_name, "a text, or None for MLflow's own")
        self._mlflow = extra_module("mlflow", "MLflowCallback")
        self._run_name = run_name
        self._started = False

    def _begin(self, params: Mapping[str, bool | int | float | str]) -> None:
        asked = {key: str(value)[:_LONGEST_PARAM] for key, value in params.items()}
        active = self._mlflow.active_run()
        if active is None:
            self._mlflow.start_run(run_name=self._run_name)
            self._started = True
        try:
            changed = set() if active is None else self._changed(asked, active.info.run_id)
            self._mlflow.log_params({key: value for key, value in asked.items() if key not in changed})
            for key in sorted(changed):
                self._mlflow.set_tag(_tag_of(key), asked[key])
        except BaseException:
            # Else the next run would join it.
            self._finish("FAILED")
            raise

    def _changed(self, asked: Mapping[str, str], run_id: str) -> set[str]:
        """The params that the run has with another value, and those that had one at an earlier `compile`."""
        # An active run keeps what it held at its start.
        noted = self._mlflow.get_run(run_id).data
        return {
            key for key, value in asked.items() if noted.params.get(key, value) != value or _tag_of(key) in noted.tags
        }

    def _log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self._mlflow.log_metrics(values, step=step)

    def _note(self, name: str, text: str) -> None:
        self._mlflow.set_tag(name, text[:_LONGEST_TAG])

    def _conclude(self, name: str, value: float) -> None:
        self._mlflow.log_metric(name, value)

    def _keep(self, name: str, kind: str, files: Files) -> None:
        for place, file in files.items():
            if isinstance(file, str):
                self._mlflow.log_text(file, f"{name}/{place}")
            elif file.is_dir():
                self._mlflow.log_artifacts(str(file), f"{name}/{place}")
            else:
                self._mlflow.log_artifact(str(file), str(Path(name, place).parent))

    def _finish(self, status: Status) -> None:
        if self._started:
            self._started = False
            self._mlflow.end_run(status)


def _tag_of(param: str) -> str:
    return f"{_CHANGED}{param}"[:_LONGEST_NAME]
