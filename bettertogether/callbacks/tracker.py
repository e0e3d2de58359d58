"""A compile run in TensorBoard, trackio, Comet, Aim or whatever else accelerate has a tracker for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks import require
from ..errors import MissingExtraError
from .tracking import Status, Tracking


class TrackerCallback(Tracking):
    """Logs a compile run through a tracker of accelerate's: what was asked, scores and costs per round, losses per
    training step, warnings as texts. Starts the tracker and finishes it.

    >>> from accelerate.tracking import TensorBoardTracker
    >>> callbacks = [TrackerCallback(TensorBoardTracker("my-run", logging_dir="runs"))]

    Raises ConfigError for what is no tracker, and at the start of the run MissingExtraError when the tracker's package
    is not installed.
    """

    def __init__(self, tracker: Any) -> None:
        methods = ("start", "store_init_configuration", "log", "finish")
        is_one = not isinstance(tracker, type) and all(callable(getattr(tracker, name, None)) for name in methods)
        example = 'accelerate.tracking.TensorBoardTracker("my-run", logging_dir="runs")'
        require(is_one, "tracker", tracker, f"a tracker of accelerate's, such as {example}")
        self._tracker = tracker

    def _begin(self, params: Mapping[str, bool | int | float | str]) -> None:
        from accelerate import PartialState

        # Without it the log of accelerate's trackers refuses to be written to.
        PartialState()
        try:
            self._tracker.start()
        except ImportError as error:
            name = self._tracker.name
            raise MissingExtraError(f"accelerate's tracker {name!r} needs a package: pip install {name}.") from error
        self._tracker.store_init_configuration(dict(params))

    def _log(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self._tracker.log(dict(values), step=step)

    def _note(self, name: str, text: str) -> None:
        self._tracker.log({name: text}, step=self._index)

    def _conclude(self, name: str, value: float) -> None:
        self._tracker.log({name: value}, step=self._index)

    def _finish(self, status: Status) -> None:
        self._tracker.finish()
