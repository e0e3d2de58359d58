"""Passages for a query: BM25 over any collection of passages, or a ColBERTv2 server."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import numpy as np
from hub import cache_folder

READING = b"2"
"""Of the way in which passages are read: an index of another one is made anew."""

Search = Callable[[str, int], list[str]]
"""A query and how many passages at most, to passages, the best first."""


@dataclass(frozen=True)
class Bm25:
    """Search by BM25. It holds the name of an index, not the index, so that copies of a program are small and a run
    directory knows the collection by its content."""

    key: str

    def __call__(self, query: str, k: int) -> list[str]:
        """The best passages that share a word with the query."""
        # The cache alone would let each thread of a first moment open the index for itself.
        with _OPENING:
            index = _opened(self.folder)
        return index.find(query, k)

    @property
    def folder(self) -> Path:
        """Where the index is."""
        return cache_folder() / "bm25" / self.key

    def titles(self) -> set[str]:
        """Titles of all passages."""
        return set(json.loads((self.folder / "titles.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class ColBERT:
    """Search by a ColBERTv2 server."""

    url: str

    def __call__(self, query: str, k: int) -> list[str]:
        """The passages that the server ranks best."""
        return list(dspy.ColBERTv2(url=self.url)(query, k=k, simplify=True))


@dataclass(frozen=True)
class Passage:
    """A piece of text under a title."""

    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.title} | {self.text}" if self.title else self.text


def search_over(place: str) -> Bm25 | ColBERT:
    """`place`: the address of a ColBERTv2 server; or a JSONL file, or a folder of JSONL and text files, see
    `read_passages`."""
    if not place.startswith(("http://", "https://")):
        files = _passage_files(Path(place))
        digest = hashlib.sha256(READING)
        for file in files:
            with file.open("rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return _indexed(digest.hexdigest(), (each for file in files for each in read_passages(file)), place)
    server = ColBERT(place)
    try:
        server("first search", 1)
    except Exception as error:
        raise SystemExit(
            f"--passages {place}: no answer as a ColBERTv2 server gives it ({type(error).__name__}: {error}). Give the "
            "address that dspy.ColBERTv2(url=...) takes, or a folder or JSONL file of passages."
        ) from error
    return server


def search_among(passages: Sequence[Passage]) -> Bm25:
    """BM25 over these passages."""
    digest = hashlib.sha256("\n".join(map(str, passages)).encode()).hexdigest()
    return _indexed(digest, passages, "the questions' own paragraphs")


def read_passages(file: Path) -> Iterator[Passage]:
    """A JSONL file has an object a line, with "text" (a text or a list of sentences) and, where there is one, "title",
    as the wiki-2017 abstracts have them. A text file is one passage, whose title is the file's name."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                yield from (_passage(line, f"{file}, line {number}") for number, line in enumerate(lines, 1))
            else:
                yield Passage(file.stem, lines.read().strip())
    except UnicodeDecodeError as error:
        raise SystemExit(f"{file} is not in UTF-8 ({error}): save it as UTF-8.") from error


def _passage(line: str, place: str) -> Passage:
    try:
        row = json.loads(line)
        text = row["text"] if isinstance(row["text"], str) else " ".join(map(str.strip, row["text"]))
        return Passage(str(row.get("title") or ""), text)
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f'{place}: {line.strip()[:80]!r} is no passage: give {{"title": ..., "text": ...}}, the text a string or a '
            "list of sentences."
        ) from error


def _passage_files(place: Path) -> list[Path]:
    kinds = (".jsonl", ".txt", ".md")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in kinds)
    if not files or files[0].suffix not in kinds:
        raise SystemExit(
            f"--passages {place}: there are no passages. Give a JSONL file with a passage a line, a folder of such "
            "files or of .txt files, or the address of a ColBERTv2 server."
        )
    return files


def _indexed(key: str, passages: Iterable[Passage], place: str) -> Bm25:
    """The index of this collection, made where there is none yet. It is there whole or not at all."""
    search = Bm25(key[:32])
    if search.folder.exists():
        return search
    titles: list[str] = []
    texts: list[str] = []
    for passage in passages:
        if passage.text:
            titles.append(passage.title)
            texts.append(str(passage))
    if not texts:
        raise SystemExit(f"--passages {place}: all passages are empty. Give texts to search in.")
    bm25s = _bm25s()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en"))
    temporary = search.folder.with_name(f".{search.key}-{os.getpid()}")
    try:
        index.save(str(temporary), corpus=texts)
        (temporary / "titles.json").write_text(json.dumps(titles), encoding="utf-8")
        os.replace(temporary, search.folder)
    except OSError:
        # Another process may have made it meanwhile.
        if not search.folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return search


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=4)
def _opened(folder: Path) -> _Index:
    return _Index(folder)


class _Index:
    def __init__(self, folder: Path) -> None:
        self._bm25s = _bm25s()
        self._index = self._bm25s.BM25.load(str(folder), load_corpus=True, mmap=True, show_progress=False)
        # Its passages are read through one position in one file.
        self._in_turn = threading.Lock()

    def find(self, query: str, k: int) -> list[str]:
        """Of equally good passages those that come first in the collection."""
        (words,) = self._bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        if not words:
            return []
        scores = self._index.get_scores(words)
        # Not retrieve(), which sorts a score for each passage of the collection.
        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        with self._in_turn:
            return [self._index.corpus[place]["text"] for place in best.tolist()]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise SystemExit(
            "Searching a collection needs bm25s, which is not installed: pip install 'bettertogether[examples]'."
        ) from error
    # It would tell of each query that has no word of the collection.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
