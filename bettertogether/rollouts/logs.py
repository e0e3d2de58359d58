"""What DSPy logs in our runs, many times over. Its logs of any other call are left alone."""

from __future__ import annotations

import logging

import dspy

from .watching import RunTracker

_CUT = "dspy.clients.lm", "LM response was truncated"
"""Said of each answer; `failures.cut_warning` counts those of rounds and evaluations, data cards those of rows."""

_TROUBLE = (
    "dspy.predict.program_of_thought",
    "dspy.predict.react",
    "dspy.predict.react_v2",
    "dspy.primitives.python_interpreter",
    "dspy.utils.parallelizer",
)
"""What a program's parts catch. In a further try, which may be sampled or told the label, as in the draws of a policy,
it hardly says anything of the program that its first run did not say."""


def quiet_in_runs() -> None:
    """Keep back those lines of DSPy's in the runs of a program over examples, and nowhere else."""
    for name in (_CUT[0], *_TROUBLE):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # DSPy hands it to its own threads, too.
    tracker = dspy.settings.usage_tracker
    if not isinstance(tracker, RunTracker):
        return True
    return not (str(record.msg).startswith(_CUT[1]) if record.name == _CUT[0] else tracker.is_further)
