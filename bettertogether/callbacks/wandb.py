"""A compile run in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..extras import extra_module
from .tracking import Files, Status, Tracking


class WandbCallback(Tracking):
    """Logs a compile run to Weights & Biases: what was asked as config, scores and costs per round, losses per training
    step, warnings in the summary; as artifacts each weight step's adapters and data card, and the report.

    Joins the run that is active, else starts one with `wandb.init()` (`WANDB_PROJECT` and the like count) and ends it,
    with exit code 1 unless the compile run is complete. Raises MissingExtraError when wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb = extra_module("wandb", "WandbCallback")
        self._run: Any = None
        self._started = False
        self._defined: set[str] = set()

    def _begin(self, params: Mapping[str, bool | int | float | str]) -> None:
        is_new = self._wandb.run is None
        self._run = self._wandb.init() if is_new else self._wandb.run
        self._started, self._defined = is_new, set()
        self._run.config.update(dict(params), allow_val_change=True)

    def _log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        # W&B's own step only grows; rounds and trainings each have another.
        for name in values.keys() - self._defined:
            self._run.define_metric(name, step_metric=axis)
            self._defined.add(name)
        self._run.log({**values, axis: step})

    def _note(self, name: str, text: str) -> None:
        self._run.summary[name] = text

    def _conclude(self, name: str, value: float) -> None:
        self._run.summary[name] = value

    def _keep(self, name: str, kind: str, files: Files) -> None:
        artifact = self._wandb.Artifact(f"{name}-{self._run.id}", type=kind)
        for place, file in files.items():
            if isinstance(file, str):
                with artifact.new_file(place, encoding="utf-8") as opened:
                    opened.write(file)
            elif file.is_dir():
                artifact.add_dir(str(file), name=place)
            else:
                artifact.add_file(str(file), name=place)
        self._run.log_artifact(artifact)

    def _finish(self, status: Status) -> None:
        if self._started:
            self._started = False
            self._run.finish(exit_code=int(status != "FINISHED"))
