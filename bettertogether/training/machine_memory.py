"""Memory of this machine, up to the limits of the control groups (a container, a job of Slurm) that this runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, in both versions of control groups: the folder of all groups, and in that of a group its limit, what
of it is used, and what of that only caches files."""


def all_bytes() -> int:
    """Bytes that this process might have, whoever else uses them."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def left_bytes() -> int:
    """Bytes that are free now."""
    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Of each control group that this process is in, and that has a limit, the limit and what is used."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    own = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for controller, (folder, limit, used, caching) in VERSIONS.items():
        top = CGROUP / folder
        # Where this has no namespace of its own, the limit lies under its path or that of a group around it.
        place = top / own.get(controller, "").strip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            file = group / limit
            if file.is_file() and (text := file.read_text().strip()) != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(text), int((group / used).read_text()) - int(stat[caching])
