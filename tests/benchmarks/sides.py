"""A benchmark whose sides run in turn, each in a process of its own, so that neither finds the other's memory."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

Figures = dict[str, Any]
MARK = "RESULT "


def report(figures: Figures) -> None:
    """Print one side's figures and the process's peak memory, for the process that compares them."""
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(MARK + json.dumps({**figures, "peak_gib": peak_gib}))


def measure(script: str, arguments: Sequence[str]) -> Figures:
    """Run one side; what it logs goes to standard error. Exits with its output where it gave no figures."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}")
    figures: Figures = json.loads(lines[0].removeprefix(MARK))
    return figures


def median(runs: Sequence[Figures], name: str) -> float:
    """Median of one figure over the runs."""
    return statistics.median(run[name] for run in runs)


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures], **names: str) -> str:
    """Theirs over ours, medians: `ratios(ours, theirs, seconds="time")` is "2.00 of time"."""
    return ", ".join(f"{median(theirs, name) / median(ours, name):.2f} of {label}" for name, label in names.items())
