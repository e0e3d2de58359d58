"""What a metric said: any kind of metric in, one `Verdict` out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np

from ..errors import ConfigError

Metric = Callable[..., Any]

FULL_MARK = 1.0
"""Score that passes when no threshold is given: True, 1, 1.0."""

EQUAL = 1e-9
"""Scores closer than this are equal: sums of the same numbers in another order."""

ROUNDING = 1e-6
"""By which a score in 32 bits, such as a cosine, may miss what it should be."""

BELOW_THRESHOLD = "score below threshold"
"""Reason of a verdict on a run that did not fail and was not good enough."""


@dataclass(frozen=True)
class Verdict:
    """A metric's answer for one prediction."""

    score: float
    """The metric's number; 0.0 when it gave none."""
    passed: bool
    reason: str | None = None
    """Why it did not pass, in a word or two."""


def full_mark(threshold: float | None) -> float:
    """The score from which an example counts as solved."""
    return FULL_MARK if threshold is None else threshold


def reaches(mean: float, best: float) -> bool:
    """Whether a mean is as high as the best one, but for rounding."""
    return mean >= best - EQUAL


def passes(score: float, mark: float) -> bool:
    """Whether a score is as high as the mark, but for rounding in 32 bits."""
    return score >= mark - ROUNDING


def is_above_one(score: float) -> bool:
    """Whether a score, but for rounding, is none of a metric whose full mark is 1."""
    return score > FULL_MARK + ROUNDING


def require_from_zero(scores: Iterable[float], where: str = "") -> None:
    """Raise ConfigError where a metric gave less than failing does."""
    worst = min(scores, default=0.0)
    if worst < -ROUNDING:
        raise ConfigError(
            f"The metric gave {worst:g}{where}, and an example that fails scores 0, which would be more: a program "
            "that fails often would win. Give a metric whose worst score is 0, such as 1 / (1 + error)."
        )


def with_trace(metric: Metric) -> Metric:
    """A metric of two, three (trace) or five (GEPA: trace, pred_name, pred_trace) arguments as one of three, which need
    not be looked at again for each call. Raises ConfigError for any other."""
    count = _arity(metric)
    return lambda example, prediction, trace: metric(*(example, prediction, trace, None, None)[:count])


def require_metric(metric: Any, *, optional: bool = False) -> None:
    """Check for what can be called as a metric (or None, where that is allowed). Raises ConfigError."""
    if metric is None and optional:
        return
    if not callable(metric):
        raise ConfigError(
            f"metric={metric!r} is not allowed: give a function (example, prediction, trace=None) to a score"
            f"{', or None' if optional else ''}."
        )
    if any(map(inspect.iscoroutinefunction, (_called(metric), type(metric).__call__))):
        raise ConfigError(
            f"metric={metric!r:.100} is async, and would return a coroutine for a score: give a plain function, which "
            "may call asyncio.run(...) on what it waits for."
        )
    _arity(metric)


def _arity(metric: Metric) -> int:
    try:
        signature = inspect.signature(_called(metric))
    except (TypeError, ValueError):
        return 3
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    most = 5 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    if most < 2 or required > 5 or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise ConfigError(
            "metric must take (example, prediction), (example, prediction, trace) or GEPA's five arguments, "
            f"got {signature}."
        )
    # Beyond the trace, what has a default may be an option of the user's own.
    return max(required, min(most, 3))


def _called(metric: Any) -> Any:
    """What a metric's arguments reach: a module hands on all that it is given."""
    if isinstance(metric, functools.partial):
        return functools.partial(_called(metric.func), *metric.args, **metric.keywords)
    if isinstance(metric, dspy.Module):
        # DSPy logs advice not to call `forward` whenever it is read otherwise.
        with contextlib.suppress(AttributeError):
            return object.__getattribute__(metric, "forward")
    return metric


def score_of(value: Any) -> float:
    """The score of what a metric returned: bool, number, `Prediction(score, feedback)` or a mapping.

    Raises TypeError for anything else (None among them).
    """
    score = _without_feedback(value)
    try:
        # Of -0.0, which a negated loss is, the sum is 0.0.
        return float(None if isinstance(score, str) else score) + 0.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            f"the metric must return a bool, a number or Prediction(score=...), it returned {value!r:.100}"
        ) from None


def _without_feedback(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("score")
    if isinstance(value, dspy.Example) or hasattr(value, "score"):
        return getattr(value, "score", None)
    return value


def judge(
    metric: Metric | None,
    example: dspy.Example,
    prediction: Any,
    trace: list[Any] | None,
    threshold: float | None = None,
) -> Verdict:
    """The verdict on one prediction: passed when the score is True, or a number and at least `threshold` (None:
    full mark). The metric takes three arguments, see `with_trace`.

    Raises what the metric raises; ConfigError when scores above 1 come without a threshold, since the full mark of
    such a metric is not known.
    """
    if metric is None:
        return Verdict(FULL_MARK, True)
    value = metric(example, prediction, trace)
    score = score_of(value)
    if not math.isfinite(score):
        return Verdict(0.0, False, f"metric returned {'NaN' if math.isnan(score) else score}")
    if threshold is None and is_above_one(score):
        raise ConfigError(
            f"The metric returned {score:g}. Without a threshold, 1.0 is taken as its full mark: give threshold=... "
            "(the score from which an example counts as solved), or return a score from 0 to 1."
        )
    is_bool = isinstance(_without_feedback(value), bool | np.bool_)
    passed = bool(score) if is_bool else passes(score, full_mark(threshold))
    return Verdict(score, passed, None if passed else BELOW_THRESHOLD)
