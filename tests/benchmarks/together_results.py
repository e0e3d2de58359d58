"""The result files of the benchmark `together.py`: one JSON file for each cell. No dspy, so that reading is quick."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """What one process of the benchmark does."""

    task: str
    seed: int
    side: str
    """"ours", "repeats", "preference", "policy", "auto" or "theirs"."""
    model: str = "smollm"
    """"smollm", "gemma", "fake" or the folder of a model."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The ablation: option to value (together_cell.py). Theirs has none."""
    limit: int | None = None
    test: int | None = None

    @property
    def ablation(self) -> str:
        """The options as a word."""
        return "+".join(f"{name}={value}" for name, value in self.options.items()) or "default"

    @property
    def name(self) -> str:
        """File name of the result."""
        return "-".join((self.task, f"s{self.seed}", self.side, self.ablation, Path(self.model).name))


def finished(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder's finished cells, by file name. Those of one task have to be of the same sizes: with
    others its test examples are others, too."""
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    done = {path: data for path, data in read.items() if data["done"]}
    first: dict[str, Path] = {}
    for path, data in done.items():
        other = first.setdefault(data["cell"]["task"], path)
        sizes, others = data["sizes"], done[other]["sizes"]
        if sizes != others:
            raise SystemExit(
                f"{path} is of {sizes} examples (train, validation, test), {other} of {others}: their scores can't be "
                "paired. Keep results of another --limit or --test in a folder of their own."
            )
    return list(done.values())


class Outcome:
    """The result file of a cell: what is known so far, on disk after each addition."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.cell = cell
        self.path = folder / f"{cell.name}.json"
        asked = dataclasses.asdict(cell) | {"ablation": cell.ablation}
        self.data: dict[str, Any] = {"cell": asked, "done": False, "rounds": {}, "tests": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
            if self.data["cell"] != asked:
                raise SystemExit(f"{self.path} was made with other sizes: {self.data['cell']}. Use another folder.")

    def keep(self, **changes: Any) -> None:
        """Add to the file."""
        from bettertogether.files import atomic_write, json_text

        self.data |= changes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json_text(self.data))
