"""Training rows: what one is, files of them, and their labels in proportion."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.protocol import ChatMessage, TrainingRow
from ..errors import DataError
from ..files import atomic_write
from ..records import SampleRow


@dataclass(frozen=True)
class Row:
    """One call to learn, and where it comes from."""

    messages: tuple[ChatMessage, ...]
    """The prompt, as the engine receives it."""
    completion: str
    predictor: str
    example: int
    """Position of the example in the trainset."""
    label: str | None = None
    source: str = "student"
    """"student", "teacher", "sample", "rescue", or "given" for rows of the user's own."""

    @property
    def training_row(self) -> TrainingRow:
        """What the engine trains on."""
        return TrainingRow(self.messages, self.completion)

    def to_json(self) -> SampleRow:
        """Prompt-completion form that `datasets.load_dataset("json")` and trl read."""
        return {
            "prompt": list(self.messages),
            "completion": [{"role": "assistant", "content": self.completion}],
            "predictor": self.predictor,
            "example": self.example,
            "label": self.label,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`. Raises DataError."""
        try:
            prompt = tuple({"role": m["role"], "content": m["content"]} for m in data["prompt"])
            answer = data["completion"]
            text = answer if isinstance(answer, str) else answer[-1]["content"]
            return cls(
                prompt,  # type: ignore[arg-type]
                text,
                data.get("predictor", ""),
                data.get("example", -1),
                data.get("label"),
                data.get("source", "given"),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f'Not a row: {json.dumps(data, default=str)[:200]} ({error!r}). A row is {{"prompt": [messages], '
                '"completion": text or [message], "predictor": name}}.'
            ) from error


def balance_labels(labels: Sequence[str | None], wanted: Sequence[str | None], max_repeat: int = 3) -> list[int]:
    """Positions of `labels`, repeated or left out so that their shares become those of `wanted`.

    A label is repeated at most `max_repeat` times and the total is as large as that allows. Without labels, or where
    a label of `wanted` has no row at all, the others keep their shares. Order is kept.
    """
    positions: dict[str, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        if label is not None:
            positions[label].append(position)
    wanted_counts = Counter(label for label in wanted if label in positions)
    if len(positions) < 2 or wanted_counts.keys() != positions.keys():
        return list(range(len(labels)))
    scale = min(
        max(len(members) / wanted_counts[label] for label, members in positions.items()),
        min(max_repeat * len(members) / wanted_counts[label] for label, members in positions.items()),
    )
    chosen = [position for position, label in enumerate(labels) if label is None]
    for label, members in positions.items():
        target = max(1, round(scale * wanted_counts[label]))
        chosen.extend(members[i % len(members)] for i in range(target))
    return sorted(chosen)


def write_rows(rows: Iterable[Row], path: Path) -> Path:
    """Write rows as JSON lines that `datasets.load_dataset("json")` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Row]:
    """Rows from JSON lines. Raises DataError naming the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a file of JSON lines, one row each.") from error
    rows = []
    # Not splitlines(): JSON strings may hold line separators other than the newline.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(json.loads(line)))
        except (json.JSONDecodeError, DataError) as error:
            raise DataError(f"{path} line {number}: {error}") from error
    return rows
