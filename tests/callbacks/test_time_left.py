"""The time left in a phase, from what is done of it and since when."""

from __future__ import annotations

from typing import Any

import pytest

from bettertogether.callbacks.progress import ProgressState
from bettertogether.training.progress import TrainingProgress


def left_texts(*events: tuple[float, int], total: int = 40, at_once: int = 4) -> list[str]:
    """The time left that is told as these come: seconds on the clock, how many examples are done."""
    now_s, texts = [0.0], list[str]()
    state = ProgressState(lambda: now_s[0])
    state.step_start({"index": 0, "step": "", "strategy": ""})
    for now_s[0], done in events:
        state.progress({"phase": "score", "done": done, "total": total, "at_once": at_once})
        texts.append(state.progress_text().partition("about ")[2].partition(" left")[0])
    return texts


def test_no_time_left_is_told_before_as_many_as_run_at_once_are_done() -> None:
    assert left_texts((0, 0), (20, 1), (21, 3), (22, 4), (44, 8)) == ["", "", "", "3:18", "2:56"]


def test_what_came_before_a_phase_is_not_part_of_it() -> None:
    assert left_texts((900, 0), (920, 4)) == ["", "3:00"]


@pytest.mark.parametrize(
    ("of_run", "of_training", "told"),
    [
        ({}, {}, "about 6:20 left in this phase"),
        ({}, {"left_s": 50.0, "may_end_early": False}, "at most 0:50 left in this phase"),
        ({}, {"left_s": 600.0, "may_end_early": False}, "about 6:20 left in this phase"),
        ({}, {"left_s": None, "may_end_early": True}, "at most 6:20 left in this phase"),
        ({"left_s": 60.0}, {"left_s": 50.0}, "at most 0:40 left in this phase"),
    ],
)
def test_no_more_time_is_told_than_is_left_of_the_minutes_and_at_most_where_a_training_may_end_early(
    of_run: dict[str, Any], of_training: dict[str, Any], told: str
) -> None:
    now_s = [0.0]
    state = ProgressState(lambda: now_s[0])
    state.run_start({"strategy": "w", "rounds": ["", "w"], **of_run})  # type: ignore[typeddict-item]
    for now_s[0], step in ((0.0, 0), (20.0, 2)):
        line = TrainingProgress(
            step=step, total_steps=40, epoch=step, loss=None, validation_loss=None, tokens=0, learning_rate=1e-4
        )
        state.training({"progress": line, **of_training})  # type: ignore[typeddict-item]
    assert state.progress_text() == f"training 2/40, {told}"
