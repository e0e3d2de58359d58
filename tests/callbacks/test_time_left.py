"""The time left in a phase, from what is done of it and since when."""

from __future__ import annotations

from bettertogether.callbacks.progress import ProgressState


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
