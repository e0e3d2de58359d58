"""Memory ends at the limits of the control groups that a process is in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bettertogether.training import machine_memory

V1, V2 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=9000, available=8000))
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path / "groups")
    monkeypatch.setattr(machine_memory, "OWN_GROUPS", tmp_path / "own")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, caching: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {caching}\n")


def found() -> tuple[int, int]:
    return machine_memory.all_bytes(), machine_memory.left_bytes()


@pytest.mark.parametrize(("names", "folder"), [(V2, "groups"), (V1, "groups/memory")])
def test_it_ends_at_the_limit_of_a_container(tmp_path: Path, names: tuple[str, str, str], folder: str) -> None:
    assert found() == (9000, 8000)
    group(tmp_path / folder, names, "max", 900, 300)
    assert found() == (9000, 8000)
    group(tmp_path / folder, names, "1000", 900, 300)
    assert found() == (1000, 400)


@pytest.mark.parametrize(
    ("names", "own", "folder"),
    [
        (V2, "0::/slice/job_7/task\n", "groups/slice"),
        (V1, "4:cpu,cpuacct:/other\n3:memory:/slice/job_7/task\n", "groups/memory/slice"),
    ],
)
def test_it_ends_at_the_lowest_limit_of_the_groups_around_it(
    tmp_path: Path, names: tuple[str, str, str], own: str, folder: str
) -> None:
    (tmp_path / "own").write_text(own)
    group(tmp_path / folder / "job_7" / "task", names, "max", 100, 0)
    group(tmp_path / folder / "job_7", names, "3000", 2000, 500)
    group(tmp_path / folder / "job_8", names, "10", 5, 0)
    group(tmp_path / folder, names, "5000", 4900, 0)
    assert found() == (3000, 100)
