"""Rows of a data set: from the hub, or from files as the hub has them. What is wrong ends the script with a word on
what to do."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

READERS: dict[str, Callable[..., Any]] = {
    ".parquet": datasets.Dataset.from_parquet,
    ".jsonl": datasets.Dataset.from_json,
    ".json": datasets.Dataset.from_json,
    ".csv": datasets.Dataset.from_csv,
}
SPLIT_NAMES = re.compile(r"(train|validation|test)(?![a-z])", re.IGNORECASE)


def cache_folder() -> Path:
    """Where the library keeps what can be made again, and these scripts too."""
    return Path(os.environ.get("BETTERTOGETHER_CACHE") or "~/.cache/bettertogether").expanduser()


def rows_of(hub_id: str, config: str | None, split: str, data: str | None, columns: Sequence[str]) -> datasets.Dataset:
    """One split, with these columns alone. `data` is a file, a folder, or None for the hub."""
    if data is None:
        rows, where = _from_hub(hub_id, config, split), hub_id
    else:
        files = _files(Path(data), config, split)
        try:
            rows = READERS[files[0].suffix](list(map(str, files)), cache_dir=str(cache_folder() / "datasets"))
        except datasets.exceptions.DatasetGenerationError as error:
            raise SystemExit(f"{data}: the files of split {split!r} can't be read: {error.__cause__}") from error
        where = data
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise SystemExit(
            f"{where}: split {split!r} has no column {missing[0]!r}, it has {rows.column_names}. Give the columns that "
            f"{hub_id} has on the hub: {list(columns)}."
        )
    for name in columns:
        if rows.data[name].null_count:
            row = rows[name].index(None) + 1
            raise SystemExit(f"{where}: split {split!r} has no {name!r} in row {row}: complete it, or leave it out.")
    return rows.select_columns(list(columns))


def parts(rows: datasets.Dataset, sizes: Sequence[int], seed: int = 0) -> list[datasets.Dataset]:
    """Disjoint random parts of these sizes; of fewer rows, parts in the same proportion."""
    if len(rows) < len(sizes):
        raise SystemExit(f"There are {len(rows)} rows for {len(sizes)} parts ({sizes}): give more data.")
    total = min(len(rows), sum(sizes))
    order = random.Random(seed).sample(range(len(rows)), total)
    counts = [max(1, size * total // sum(sizes)) for size in sizes]
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return [rows.select(order[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _from_hub(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{hub_id} ({config}, {split}) could not be had from the hub: {type(error).__name__}: {error}\nWithout a "
            "network, give its files with --data FOLDER, as the hub has them (parquet, jsonl or csv)."
        ) from error


def _files(data: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split, which their names begin with, of one kind. Files that name no split at all are `train`, as
    on the hub."""
    if data.is_file():
        found = [data]
    else:
        folder = data / config if config and (data / config).is_dir() else data
        found = sorted(file for file in folder.glob("*") if file.suffix in READERS)
    found = [file for file in found if file.suffix in READERS]
    named = {file: match[1].lower() for file in found if (match := SPLIT_NAMES.match(file.stem))}
    chosen = [file for file in found if named.get(file, "" if named else "train") == split]
    if not chosen:
        listed = ", ".join(file.name for file in found) or "no such file"
        raise SystemExit(
            f"{data}: split {split!r} is not there. Expected: files {split}*.parquet, .jsonl, .json or .csv, in the "
            f"folder or in its folder {config!r}. Found: {listed}."
        )
    return [file for file in chosen if file.suffix == chosen[0].suffix]
