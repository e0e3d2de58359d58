"""Whether a call is the one that a run directory holds, and what it notes of a call that goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunDirectoryError
from ..printable import get_logger
from ..records import StepRecord
from .strategy import AUTO

logger = get_logger(__name__)

INFORMATIVE = ("versions", "machine")
"""Keys of `run` that may differ when a run goes on: noted in the log, no error."""

PER_STEP = frozenset({"optimizers", "compile_args"})
"""Keys of `run` that hold an entry for each step."""

WHOLE = "(whole)"
"""Under this name a noted object of several fields has the text that decides whether it is the same, which is all that
is noted of one elsewhere."""

_REMEMBERS = re.compile(r"metric\.(uses|closure|content)\b")
_REMEMBERED = " What the metric remembers from call to call (a memo, a counter) has to be as it was when the run began."

_SHOWN = 120
_LINES = 5


def going_on(
    folder: Path, stored: dict[str, Any], asked: Mapping[str, Any], records: Sequence[StepRecord]
) -> dict[str, Any]:
    """What the directory notes when it goes on with this call. Raises RunDirectoryError for another run."""
    if stored.get("form") != asked.get("form"):
        raise RunDirectoryError(
            f"{folder} was made by another version of bettertogether, which noted other things about what was asked: "
            "whether this is the same call can't be told. Give another run_dir, or go on with that version."
        )
    # What "auto" chose depends on all steps that there are, and its records say why.
    if AUTO not in (stored.get("strategy"), asked.get("strategy")):
        stored = with_other_steps(stored, asked) | {"strategy": asked.get("strategy")}
        asked = with_other_steps(asked, stored)
    noted = _noted(stored, asked, records)
    # Those of the call itself before those within a step, of which a line may be left out.
    differences = sorted(_differences(noted, asked), key=lambda difference: difference[0].count("."))
    for key, line in differences:
        if key.split(".")[0] in INFORMATIVE:
            logger.warning("%s goes on under other circumstances: %s", folder, line)
    blocking = [line for key, line in differences if key.split(".")[0] not in INFORMATIVE]
    if blocking:
        if len(blocking) > _LINES:
            blocking[_LINES:] = [f"and {len(blocking) - _LINES} more"]
        raise RunDirectoryError(
            f"{folder} holds another run; what differs:\n  " + "\n  ".join(blocking) + "\n"
            "Make the call as it was to go on with that run, or give another run_dir (or delete this one) to start."
            + (_REMEMBERED if any(_REMEMBERS.match(line) for line in blocking) else "")
        )
    return noted


def with_other_steps(run: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, with what another call asked of the steps that this one does not have."""
    lacking = other.get("optimizers", {}).keys() - run.get("optimizers", {}).keys()
    joined = dict(run)
    for key in PER_STEP & other.keys():
        joined[key] = run.get(key, {}) | {step: entry for step, entry in other[key].items() if step in lacking}
    return joined


def _noted(stored: dict[str, Any], asked: Mapping[str, Any], records: Sequence[StepRecord]) -> dict[str, Any]:
    """What the directory has noted, but what this call has for the steps that never finished."""
    steps = (stored.get("optimizers", {}).keys() & asked.get("optimizers", {}).keys()) - finished_steps(records)
    noted = dict(stored)
    for key in PER_STEP & stored.keys():
        kept = {step: entry for step, entry in stored[key].items() if step not in steps}
        noted[key] = kept | {step: entry for step, entry in asked.get(key, {}).items() if step in steps}
    return noted


def finished_steps(records: Sequence[StepRecord]) -> set[str]:
    """Keys of the steps that did, at least once."""
    return {record.step for record in records if record.status == "complete"}


def _differences(stored: Any, asked: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if stored == asked:
        return
    if isinstance(stored, Mapping | None) and isinstance(asked, Mapping | None):
        stored, asked = stored or {}, asked or {}
        names = sorted(name for name in stored.keys() | asked.keys() if stored.get(name) != asked.get(name))
        for name in [name for name in names if name != WHOLE] or names:
            inner = f"{key}.{name}" if key else name
            yield from _differences(stored.get(name), asked.get(name), inner)
        return
    stored, asked = _whole(stored), _whole(asked)
    if stored != asked:
        yield key, f"{key}: the directory has {stored!r:.{_SHOWN}}, this call has {asked!r:.{_SHOWN}}"


def _whole(noted: Any) -> Any:
    return noted.get(WHOLE, noted) if isinstance(noted, Mapping) else noted
