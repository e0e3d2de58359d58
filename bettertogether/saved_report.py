"""What report.json and a line of records.jsonl hold, and the check of it, since a report may come with a foreign
artifact. What is only shown may be any plain value: whoever shows it escapes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from .errors import DataError

SCHEMA = 1
"""Version of the JSON form of a report and of a record; a reader refuses any other."""

Shown = str | int | float | bool | None
_Count = Annotated[int, pydantic.Field(ge=0)]
_Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class _Open(pydantic.BaseModel):
    """Holds more than is checked here."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


class _Ledger(_Entry):
    program_calls: _Count = 0
    metric_calls: _Count = 0
    lm_calls: _Count = 0
    cache_hits: _Count = 0
    prompt_tokens: _Count = 0
    generated_tokens: _Count = 0
    trained_tokens: _Count = 0
    seconds: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0


class _Failure(_Entry):
    kind: str
    count: _Count
    reason: str
    example: str


class _Candidate(_Open):
    score: float | None = None


class _HistoryLine(_Open):
    step: float | None = None
    loss: float | None = None
    validation_loss: float | None = None


class _Turn(_Open):
    role: Shown = None
    content: Any = None


class _Sample(_Open):
    prompt: str | Sequence[_Turn] | None = None
    completion: str | Sequence[_Turn] | None = None


class _DataCard(_Open):
    kept_by_predictor: Mapping[str, _Finite] = {}
    kept_by_label: Mapping[str, _Finite] = {}
    kept_by_source: Mapping[str, _Finite] = {}
    dropped_by_reason: Mapping[str, _Finite] = {}
    dropped_by_predictor: Mapping[str, _Finite] = {}
    prompt_tokens: Mapping[str, Shown] = {}
    completion_tokens: Mapping[str, Shown] = {}
    samples: Sequence[_Sample] = ()
    warnings: Sequence[str] = ()


class _Details(_Open):
    candidates: Sequence[_Candidate] = ()
    history: Sequence[_HistoryLine] = ()
    data_card: _DataCard | None = None
    two_by_two: Mapping[str, Sequence[_Finite]] | None = None
    warnings: Sequence[str] = ()
    adapter_folders: Mapping[str, str] = {}


class _Signature(_Open):
    instructions: Shown = None


class _Prompt(_Open):
    signature: _Signature | None = None
    demos: Sequence[Mapping[str, Any]] = ()


class _Round(_Entry):
    schema_: Literal[1] = pydantic.Field(alias="schema")
    index: int
    step: str
    strategy: str
    status: Shown
    score: float | None = None
    scores: Sequence[_Finite] | None = None
    failures: Sequence[_Failure] = ()
    scored_example: str | None = None
    step_gain: float | None = None
    ledger: _Ledger = _Ledger()
    details: _Details = _Details()
    program: Mapping[str, _Prompt] | None = None
    models: Mapping[str, str] = {}
    error: str | None = None


class _Report(_Entry):
    schema_: Literal[1] = pydantic.Field(alias="schema")
    rounds: Sequence[_Round]
    selected: int
    valset_size: Shown
    strategy: str
    seed: Shown = 0
    versions: Mapping[str, Shown] = {}
    machine: Mapping[str, Shown] = {}
    warnings: Sequence[str] = ()
    extra: _Ledger = _Ledger()


def checked_round(data: Any) -> dict[str, Any]:
    """The fields of a record. Raises DataError that names the first wrong one."""
    return _checked(_Round, "record", data)


def checked_report(data: Any) -> dict[str, Any]:
    """The fields of a report. Raises DataError that names the first wrong one."""
    return _checked(_Report, "report", data)


def _checked(kind: type[_Entry], name: str, data: Any) -> dict[str, Any]:
    schema = data.get("schema") if isinstance(data, Mapping) else SCHEMA
    if schema != SCHEMA:
        raise DataError(f"{name} with schema {schema!r}; this version reads schema {SCHEMA}")
    try:
        kind.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise DataError(
            f"The {name} is damaged at {place}: {first['msg']}, got {first['input']!r:.100}. Take the file as it was "
            "written."
        ) from error
    return {key: value for key, value in data.items() if key != "schema"}
