"""What failed in a pass over examples, and what makes a score or a step meaningless.

The rules, for the report and for the log line that is written at once:
- A failed example scores 0 and is counted by kind, however few there are.
- Where more than half of the examples failed, a warning says how many, the commonest reason and one of them.
- Where all of them failed, the score says nothing: the round is not selected unless there is no other, and where all
  of them raised (program, metric, a metric without a finite number) the result's flag is set as for a failed step, and
  a later call with its directory scores the round again.
- Where all scores of a round are equal, they tell nothing apart. The first round with a score below the full mark on
  every example gets a warning with an answer as an example; so does a student with the full mark on every example,
  since nothing is left to gain. A later round that reaches the full mark everywhere is a success.
- Where all rounds have the same score on each example, below the full mark, a warning says that the scores did not
  select.
The full mark is 1, or the highest threshold of a step where that is higher.
"""

from __future__ import annotations

import asyncio
import os
import re
import reprlib
import sysconfig
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.utils.exceptions import AdapterParseError

from ..records import Failure, StepRecord, failure_reason
from ..redaction import masked, remember_asked
from .metrics import BELOW_THRESHOLD, passes

if TYPE_CHECKING:
    from .traces import Trace

ENDS_ONE_RUN = (Exception, SystemExit, asyncio.CancelledError)
"""What a program or a metric may raise that is its own failure on one example: code that it runs may exit. Ctrl-C ends
all."""

_LONGEST = 200
_PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
NOT_RAISED = frozenset({"parse failure", "prompt too long"})
"""Kinds of failures that are of the answers, not of the program or the metric."""
_ADVICE = {
    "metric error": "Mend the metric.",
    "program error": "Mend the program.",
    "timeout": "Give the LM a longer timeout, or fewer threads.",
    "parse failure": "The answers lack the program's output fields: constrain them (dspy.JSONAdapter with "
    "bettertogether[structured]), raise max_tokens where they are cut, or take a larger model.",
    "prompt too long": "Shorten the inputs or give fewer demos, or take a model with a longer context.",
}
_LM_ADVICE = {
    (
        "LMAuthError",
        "LMBillingError",
    ): "The LM's service refuses the key or the account: check the LM's api_key, and the account.",
    (
        "LMConfigurationError",
        "LMNotConfiguredError",
    ): "The LM can't be asked as it is configured: check its api_key, its api_base and the environment.",
    (
        "LMRateLimitError",
    ): "The LM's service limits the rate of calls: give the LM a higher num_retries, or take a lower num_threads.",
    (
        "LMServerError",
        "LMTransportError",
    ): "The LM's service failed or was not reached: check it and the LM's api_base, or "
    "give the LM a higher num_retries or a longer timeout.",
    ("LMTimeoutError",): _ADVICE["timeout"],
    ("LMInvalidRequestError", "LMUnsupportedModelError", "LMUnsupportedFeatureError"): "The LM's service refuses the "
    "request: check the model's name and the LM's options.",
}
"""For errors of an LM's service, by the names of DSPy's classes, whether the program or the metric asked it."""
_NOT_CALLABLE = " The program that this step returned can't be called as the student is."
_METRIC_ADVICE = "Let the metric return a finite number."
_PYDANTIC_LINK = re.compile(r"For further information visit \S+")
_REFUSED = "a value is refused: "
_REFUSED_ADVICE = (
    "A field's type or validator refuses values: say in the field's description what is allowed, loosen the type or "
    "the validator, or take a larger model."
)

_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (Path(__file__).parents[1], Path(dspy.__file__).parents[1], *map(sysconfig.get_path, _PATHS))
)
"""Where code lies that is none of the user's."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def error_text(error: BaseException) -> str:
    """The error in one line, without secrets, and where the user's own code raised it; of an answer that can't be
    parsed, what is wrong, and the answer."""
    remember_asked(error)
    if isinstance(error, AdapterParseError):
        return f"{_why_unread(error)} in the answer {_short.repr(error.lm_response)}"
    return _cut(_line(f"{type(error).__name__}: {error}")) + _place_of(error)


def _place_of(error: BaseException) -> str:
    """The innermost line that is of no library: " (program.py:12 in forward)"."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_LIBRARIES, "<frozen")):
            return f" ({Path(frame.filename).name}:{frame.lineno} in {frame.name})"
    return ""


def _why_unread(error: AdapterParseError) -> str:
    """The fields that are missing, or the value that a field's type or validator refuses."""
    missing = [name for name in error.signature.output_fields if name not in (error.parsed_result or {})]
    said = _line(str(error).partition("\n\nAdapter ")[0])
    if missing and not said.startswith("Failed to parse field "):
        return f"{', '.join(missing)} not found"
    # The reason comes after the value, which may be long.
    return f"{_REFUSED}{said if len(said) <= _LONGEST else f'{said[:99]}…{said[-100:]}'}"


def _line(text: str) -> str:
    return masked(" ".join(_PYDANTIC_LINK.sub("", text).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def reason_of_metric(error: BaseException, prediction: Any) -> str:
    """Why a metric raised: the program's fault where it returned what no metric can judge."""
    if prediction is None or isinstance(prediction, Generator | AsyncGenerator | Awaitable):
        returned = "None" if prediction is None else f"a {type(prediction).__name__}"
        return f"program error: it returned {returned}, of which the metric says {error_text(error)}"
    return f"metric error: {error_text(error)}"


def count_failures(traces: Sequence[Trace]) -> tuple[Failure, ...]:
    """The failed runs of a pass by kind, the commonest first. A score below the threshold is no failure."""
    by_kind: dict[str, list[Trace]] = {}
    for trace in traces:
        if not trace.passed and trace.reason not in (None, BELOW_THRESHOLD):
            by_kind.setdefault(str(trace.reason).partition(":")[0], []).append(trace)
    counted = [_failure(kind, failed) for kind, failed in by_kind.items()]
    return tuple(sorted(counted, key=lambda failure: -failure.count))


def _failure(kind: str, traces: Sequence[Trace]) -> Failure:
    reasons = Counter(_reason(trace) for trace in traces)
    commonest = reasons.most_common(1)[0][0]
    first = next(trace for trace in traces if _reason(trace) == commonest)
    return Failure(kind, len(traces), commonest, _shown_inputs(first))


def _reason(trace: Trace) -> str:
    """The reason without its kind, where there is more to say."""
    return str(trace.reason).partition(": ")[2] or trace.detail or str(trace.reason)


def _shown_inputs(trace: Trace) -> str:
    return f"example {trace.index}: {_fields(dict(trace.example.inputs()))}"


def _fields(values: Mapping[str, Any]) -> str:
    return _cut(", ".join(f"{name}={_short.repr(value)}" for name, value in values.items()))


def scored_example(traces: Sequence[Trace]) -> str | None:
    """The first example that did not fail, with its answer, in short; None when all failed."""
    for trace in traces:
        if trace.reason in (None, BELOW_THRESHOLD):
            answer = trace.prediction
            text = _fields(dict(answer.items())) if hasattr(answer, "items") else _short.repr(answer)
            return f"{_shown_inputs(trace)} -> {text}"
    return None


def failure_warning(failures: Sequence[Failure], total: int, what: str, unit: str = "example") -> str | None:
    """What to say of a pass over `total` examples (or runs) of which more than half failed; None of any other."""
    most, failed = commonest(failures, total), sum(failure.count for failure in failures)
    if most is None:
        return None
    counts = f"all {total} {unit}s" if failed == total else f"{failed} of {total} {unit}s"
    if total == 1:
        counts = f"the only {unit}"
    says = "nothing" if failed == total else "little"
    return (
        f"{what}: {counts} failed, so the result says {says}: {failure_reason(failures)} "
        f"({most.example}). {advice(most)}"
    )


def commonest(failures: Sequence[Failure], total: int) -> Failure | None:
    """The commonest failure where more than half of `total` failed."""
    return failures[0] if 2 * sum(failure.count for failure in failures) > total else None


def advice(failure: Failure) -> str:
    """What to do about it, in a sentence."""
    if failure.reason.startswith(_REFUSED):
        return _REFUSED_ADVICE
    if failure.kind in ("program error", "metric error") and (of_lm := lm_advice(failure.reason)):
        return of_lm
    return _ADVICE.get(failure.kind, _METRIC_ADVICE)


def lm_advice(reason: str) -> str | None:
    """What to do where an LM's service refused or failed; None for any other reason."""
    return next((text for names, text in _LM_ADVICE.items() if reason.partition(":")[0] in names), None)


def cuts(traces: Sequence[Trace]) -> list[bool]:
    """Of every answer, whether it ended at max_tokens."""
    return [call.cut for trace in traces for call, _ in trace.every_call()]


def cut_warning(traces: Sequence[Trace]) -> str | None:
    """How many answers of a pass ended at max_tokens, which a grammar may have closed; None where none did."""
    cut = cuts(traces)
    if not any(cut):
        return None
    return (
        f"{sum(cut)} of {len(cut)} answers were cut at max_tokens, also where they read as whole ones: give the LM a "
        "larger max_tokens."
    )


def all_failed(record: StepRecord) -> bool:
    """Whether no example of a scored round got a score."""
    return bool(record.scores) and record.failed == len(record.scores or ())


def all_raised(record: StepRecord) -> bool:
    """Whether the program or the metric was broken on every example of a scored round."""
    return all_failed(record) and not any(failure.kind in NOT_RAISED for failure in record.failures)


def _program_broken(record: StepRecord) -> bool:
    first = record.failures[0] if all_failed(record) else None
    return first is not None and first.kind == "program error" and lm_advice(first.reason) is None


def round_warnings(records: Sequence[StepRecord], full_mark: float) -> list[str]:
    """What is meaningless in the rounds so far, in their order; only grows with further rounds."""
    said: set[float] = set()
    warnings = []
    for record in records:
        scores, name = record.scores or (), record.name
        if warning := failure_warning(record.failures, len(scores), name):
            broke = record.strategy and _program_broken(record) and not all_failed(records[0])
            warnings.append(f"{warning}{_NOT_CALLABLE}" if broke else warning)
        elif len(scores) > 1 and len(set(scores)) == 1 and scores[0] not in said:
            said.add(scores[0])
            warnings += _equal_scores(record, name, full_mark)
    return warnings


def _equal_scores(record: StepRecord, name: str, full_mark: float) -> list[str]:
    score, count = (record.scores or (0.0,))[0], len(record.scores or ())
    if not passes(score, full_mark):
        seen = f" ({record.scored_example})" if record.scored_example else ""
        return [
            f"{name}: each of the {count} examples scores {score:g}, so nothing can be told apart by it: check the "
            f"metric, and what the program answers{seen}."
        ]
    if record.strategy:
        return []
    return [
        f"{name}: each of the {count} examples has the full score {score:g}: nothing is left to gain on them. Give a "
        "harder valset."
    ]


def no_difference(records: Sequence[StepRecord], full_mark: float) -> str | None:
    """What to say at the end where no step changed any example's score; None where it was said why before."""
    scored = [record.scores for record in records if record.status == "complete" and record.scores]
    if len(scored) < 2 or len(scored[0]) < 2 or len(set(scored)) > 1:
        return None
    if any(map(all_failed, records)) or passes(min(scored[0]), full_mark):
        return None
    return (
        f"The {len(scored)} rounds have the same score on each of the {len(scored[0])} validation examples: the scores "
        "did not tell them apart, and the rule for ties selected."
    )
