"""Rows of tokens in an Arrow file: on disk, and in memory only while they are looked at.

Of a Python list a token takes up to 36 bytes, in the file 4. The file is read through `datasets`, which maps it into
memory; other processes read the same one.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from .packing import TokenizedRow

MANY_ROWS = 5_000
"""From so many rows on they are kept on disk. Fewer take less memory than the package that reads the file."""

_AT_ONCE = 100
"""Rows that are made or written together."""


class ArrowRows(Sequence[TokenizedRow]):
    """The rows of a file that `write_arrow` wrote. Each is made anew when it is asked for."""

    def __init__(self, path: Path) -> None:
        import datasets

        self.path = path
        self._table = datasets.Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...

    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        if isinstance(index, slice):
            return _rows_of(self._table[index])
        return TokenizedRow(**self._table[index])

    def __iter__(self) -> Iterator[TokenizedRow]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]


def _rows_of(columns: dict[str, list[Any]]) -> list[TokenizedRow]:
    return [TokenizedRow(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def write_arrow(rows: Iterable[TokenizedRow], path: Path) -> ArrowRows:
    """Write rows to a file, a few at a time."""
    # Here, as the package takes a second to load, which small trainings do without.
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    tokens = List(Value("int32"))
    features = Features(
        prompt_ids=tokens,
        completion_ids=tokens,
        forms=List(tokens),
        forced=List(Value("bool")),
        fields=List(Value("string")),
        rejected_ids=tokens,
        rejected_forced=List(Value("bool")),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(path), features=features, writer_batch_size=_AT_ONCE) as writer:
        for row in rows:
            writer.write(vars(row))
        writer.finalize()
    return ArrowRows(path)


def arrow_file(rows: Sequence[TokenizedRow], path: Path) -> Path:
    """The file that holds these rows: theirs, else one that is written at `path`."""
    return (rows if isinstance(rows, ArrowRows) else write_arrow(rows, path)).path


@contextlib.contextmanager
def row_folder(parent: Path) -> Iterator[Path]:
    """A folder for files of rows, made when there are any, which goes at the end of the block."""
    folder = parent.absolute() / f".rows-{uuid.uuid4().hex}.tmp"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept(rows: Iterable[TokenizedRow], number: int, path: Path) -> Sequence[TokenizedRow]:
    """Rows, of which there are `number` at most, to be looked at again and again: a list of them, or where they are
    many those of a file at `path`."""
    return list(rows) if number < MANY_ROWS else write_arrow(rows, path)
