"""Training rows: what one is, files of them, and their labels in proportion."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import is_number
from ..engines.protocol import ChatMessage, FieldSpan, TrainingRow
from ..errors import DataError
from ..files import atomic_file
from ..records import SampleRow

Messages = tuple[ChatMessage, ...]

NO_EXAMPLE = -1
"""Where a row doesn't say of which example it is."""


@dataclass(frozen=True)
class Row:
    """One call to learn, and where it comes from."""

    messages: Messages
    """The prompt, as the engine receives it."""
    completion: str
    predictor: str
    example: int
    """Position of the example in the trainset, or `NO_EXAMPLE`."""
    label: str | None = None
    source: str = "student"
    """"student", "teacher", "sample", "rescue", or "given" for rows of the user's own."""
    forms: tuple[Messages, ...] = ()
    """Prompts with demos that the call is shown with as well; the one of a number has the same demos in all rows of
    the predictor."""
    response_format: Mapping[str, Any] | None = None
    """What the request asks of the answer, as the engine gets it."""
    fields: tuple[FieldSpan, ...] = ()
    """Where the values of output fields stand in the completion."""
    rejected: str | None = None
    """A worse answer to the same prompt; with it the row is a pair."""

    @property
    def prompt(self) -> str:
        """The prompt as one text, which rows with the same prompt share."""
        return repr(self.messages)

    @property
    def training_row(self) -> TrainingRow:
        """What the engine trains on."""
        return TrainingRow(
            self.messages,
            self.completion,
            forms=self.forms,
            response_format=self.response_format,
            fields=self.fields,
            rejected=self.rejected,
        )

    def to_json(self) -> dict[str, Any]:
        """Prompt-completion form that `datasets.load_dataset("json")` and trl read; a pair has "rejected" besides."""
        # As text, since every schema is of another shape, and a column of a table has one.
        asked = None if self.response_format is None else json.dumps(self.response_format, ensure_ascii=False)
        known = {
            "forms": [list(form) for form in self.forms],
            "response_format": asked,
            "fields": [span._asdict() for span in self.fields],
        }
        return {**self.sample, **{name: value for name, value in known.items() if value}}

    @property
    def sample(self) -> SampleRow:
        """The row as a data card shows it, without its other forms."""
        sample: SampleRow = {
            "prompt": list(self.messages),
            "completion": [{"role": "assistant", "content": self.completion}],
            "predictor": self.predictor,
            "example": self.example,
            "label": self.label,
            "source": self.source,
        }
        if self.rejected is not None:
            sample["rejected"] = [{"role": "assistant", "content": self.rejected}]
        return sample

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`; null is missing. Raises DataError."""
        try:
            text = _text(data["completion"])
            asked, label = data.get("response_format"), data.get("label")
            return cls(
                _messages(data["prompt"]),
                text,
                data.get("predictor") or "",
                _example(data.get("example")),
                None if label is None else str(label),
                data.get("source") or "given",
                tuple(_messages(form) for form in data.get("forms") or ()),
                None if asked is None else json.loads(asked),
                tuple(_span(span, text) for span in data.get("fields") or ()),
                _text(data["rejected"]) if data.get("rejected") else None,
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(
                f'Not a row: {json.dumps(data, default=str)[:200]} ({error!r}). A row is {{"prompt": [messages], '
                '"completion": text or [message], "predictor": name}}; a pair has "rejected" too, like "completion".'
            ) from error


def _text(answer: Any) -> str:
    """Of an answer that is text or messages."""
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text


def _example(number: Any) -> int:
    """A whole number, also as pandas writes a column of them that lacks some (3.0)."""
    if number is None:
        return NO_EXAMPLE
    if not is_number(number) or number != int(number):
        raise ValueError(f"example={number!r} is no whole number")
    return int(number)


def _messages(turns: Iterable[Mapping[str, str]]) -> Messages:
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _span(data: Mapping[str, Any], text: str) -> FieldSpan:
    span = FieldSpan(data["name"], data["start"], data["end"])
    if not 0 <= span.start <= span.end <= len(text):
        raise ValueError(f"{span} lies outside of the completion")
    return span


def balance_labels(labels: Sequence[str | None], wanted: Sequence[str | None], max_repeat: int = 3) -> list[int]:
    """Positions of `labels`, all of which `wanted` has, repeated or left out so that their shares become its own.

    A label is repeated at most `max_repeat` times and the total is as large as that allows. Without labels, or where
    a label of `wanted` has no row at all, the others keep their shares. Order is kept.
    """
    positions: dict[str, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        if label is not None:
            positions[label].append(position)
    wanted_counts = Counter(label for label in wanted if label in positions)
    if len(positions) < 2:
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


SPELT_OUT = 100
"""Rows of a file whose forms are written in full. So many that a few rows can be deleted by hand."""
BEGINNING = "beginning"
"""Role of the one message that stands for a form of a later row: the hash of what comes before its question."""


def write_rows(rows: Iterable[Row], path: Path) -> Path:
    """Write rows as JSON lines that `datasets.load_dataset("json")` reads.

    Forms show the same few demo sets in all rows. After `SPELT_OUT` rows, a form whose beginning (all but the row's own
    question) was written before is [{"role": "beginning", "content": its hash}].
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beginnings = _Beginnings()
    with atomic_file(path) as file:
        for number, row in enumerate(rows):
            shown = replace(row, forms=beginnings.shortened(row, spelt_out=number < SPELT_OUT))
            file.write((json.dumps(shown.to_json(), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    return path


def read_rows(path: str | Path) -> list[Row]:
    """Rows from JSON lines; `~` is the home folder. Raises DataError naming the line."""
    path, rows, beginnings = Path(path).expanduser(), [], _Beginnings()
    try:
        # Split at newlines alone: JSON strings may hold other line separators.
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(beginnings.spelt_out(Row.from_json(json.loads(line))))
                except (json.JSONDecodeError, DataError) as error:
                    raise DataError(f"{path} line {number}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a file of JSON lines, one row each.") from error
    return rows


def question_of(prompt: Messages) -> Messages:
    """A zero-shot prompt without its system message."""
    return prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt


class _Beginnings:
    """What comes before the questions of forms, by hash."""

    def __init__(self) -> None:
        self._by_hash: dict[str, Messages] = {}
        self._hashes: dict[tuple[int, ...], tuple[Messages, str]] = {}
        """By the ids of the messages, which are kept with them; rows share them."""

    def shortened(self, row: Row, spelt_out: bool) -> tuple[Messages, ...]:
        """The forms of a row as they are written."""
        forms: list[Messages] = []
        for form in row.forms:
            key, known = self._note(form, row)
            forms.append(({"role": BEGINNING, "content": key},) if known and not spelt_out else form)
        return tuple(forms)

    def spelt_out(self, row: Row) -> Row:
        """A row as it was before it was written. Raises DataError."""
        forms: list[Messages] = []
        for form in row.forms:
            if form and form[0]["role"] == BEGINNING:
                key = form[0]["content"]
                if key not in self._by_hash:
                    raise DataError(
                        f"no line before has the form whose beginning has the hash {key!r}: keep the first "
                        f"{SPELT_OUT} rows of the file, or leave the forms out."
                    )
                form = self._by_hash[key] + question_of(row.messages)
            else:
                self._note(form, row)
            forms.append(form)
        return replace(row, forms=tuple(forms)) if forms else row

    def _note(self, form: Messages, row: Row) -> tuple[str, bool]:
        """Hash of a form's beginning, and whether it is known from an earlier form; "" where it has none."""
        question = question_of(row.messages)
        if not question or form[-len(question) :] != question:
            return "", False
        beginning = form[: -len(question)]
        ids = tuple(map(id, beginning))
        if ids not in self._hashes:
            text = json.dumps(beginning).encode()
            self._hashes[ids] = beginning, hashlib.sha256(text).hexdigest()[:12]
        key = self._hashes[ids][1]
        known = key in self._by_hash
        self._by_hash.setdefault(key, beginning)
        return key, known
