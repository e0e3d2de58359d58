"""Score a program on examples, example by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dspy
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import with_callbacks

from ..callbacks import events
from ..callbacks.display import EvaluationDisplay
from ..checks import require_switch
from ..errors import ConfigError, DataError, ProgramError
from ..printable import printable
from ..programs.content import dataset_hash
from ..programs.program import require_lms
from ..records import Failure, Ledger, count_text, failure_reason, failure_text, score_text
from ..report.intervals import Interval, mean_interval, paired_interval, within_one
from .examples import check_examples
from .failures import count_failures, cut_warning, failure_warning
from .metrics import Metric, require_metric
from .rollout import Attempt, RolloutStore
from .settings import RunSettings
from .traces import ExamplePass, Trace

Kind = Literal["eval_full", "eval_minibatch", "eval_2x2"]
"""What DSPy's callbacks are told of an evaluation within a compile, in the words of DSPy's own optimizers: all
validation examples, some of them; and what those don't have."""


@dataclass(frozen=True)
class Evaluation:
    """A program's scores on a list of examples."""

    scores: tuple[float, ...]
    """The metric on each example, in order; 0.0 where the program or the metric failed."""
    ledger: Ledger
    traces: tuple[Trace, ...] = ()

    @property
    def mean(self) -> float:
        """Mean score, in the metric's unit; NaN without examples."""
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    def __repr__(self) -> str:
        failed = f", failed: {failure_reason(self.failures)}" if self.failures else ""
        return f"Evaluation(mean {score_text(self.mean)} of {count_text(len(self.scores), 'example')}{failed})"

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The examples that failed and so scored 0, by kind, the commonest first."""
        return count_failures(self.traces)


def evaluate(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    metric: Metric,
    *,
    num_threads: int | None = None,
    max_errors: int | None = None,
    seed: int = 0,
    store: RolloutStore | None = None,
    phase: str = "evaluate",
    progress: bool = True,
) -> Evaluation:
    """Run `program` on every example and score it with `metric` (called with trace=None, as DSPy evaluates), and show
    how far it is, unless `progress=False`, under the name `phase`. `num_threads` examples at once; None: what the local
    engine likes to have in flight. `seed` is that of sampled answers. Runs that are in `store` are not made again.

    A parse failure scores 0. An example whose program or metric raises scores 0 too, and counts against `max_errors`
    (None: `dspy.settings.max_errors`); raises TooManyErrors above it. Where more than half of the examples fail, the
    log says so at once, with the commonest reason; see `Evaluation.failures`. So it does where answers were cut at
    max_tokens. Raises ProgramError, DataError and ConfigError before any work.
    """
    require_switch("progress", progress)
    settings = RunSettings(num_threads, max_errors, seed, store)
    display = EvaluationDisplay() if progress and not events.watched() else None
    with events.listening([] if display is None else [display]):
        evaluation = Evaluator(metric, settings).evaluate([program], examples, phase)[0]
        if warning := failure_warning(evaluation.failures, len(evaluation.scores), phase):
            events.warn(warning)
        if warning := cut_warning(evaluation.traces):
            events.warn(f"{phase}: {warning}")
        if display is not None:
            display.done(f"{phase}: {score_text(evaluation.mean)} on {count_text(len(evaluation.scores), 'example')}")
    return evaluation


class Evaluator:
    """`evaluate` for several programs at once, whose calls share the engine's batches, and again on further examples:
    each is looked through and copied for its threads once. The programs must not change meanwhile."""

    def __init__(self, metric: Metric, settings: RunSettings) -> None:
        require_metric(metric)
        self._pass = ExamplePass(metric, settings=settings, scores_only=True)

    def evaluate(
        self,
        programs: Sequence[dspy.Module],
        examples: Sequence[dspy.Example],
        phase: str,
        kind: Kind | None = None,
    ) -> list[Evaluation]:
        """The evaluation of each program, which DSPy's callbacks see: that of one program as it begins and ends, those
        of several one after another when they are done. Raises as `evaluate` does."""
        for program in programs:
            if not isinstance(program, dspy.Module):
                raise ProgramError(f"program={program!r:.100} is not allowed: give a dspy.Module.")
            require_lms(program)
        examples = check_examples(examples, "examples")
        self._pass.phase = phase
        seen = _Evaluate(self._pass, examples)
        if len(programs) == 1:
            return [seen.of(programs[0], lambda: self._scored(programs, examples)[0], kind)]
        scored = self._scored(programs, examples)
        return [seen.of(*each, kind) for each in zip(programs, [lambda e=e: e for e in scored], strict=True)]

    def _scored(self, programs: Sequence[dspy.Module], examples: Sequence[dspy.Example]) -> list[Evaluation]:
        size, attempt = len(examples), Attempt()
        jobs = [(number, index, attempt) for number in range(len(programs)) for index in range(size)]
        traces = self._pass.over_many(programs, examples, jobs) if jobs else []
        parts = [tuple(traces[size * number : size * (number + 1)]) for number in range(len(programs))]
        return [_evaluation(part) for part in parts]


class _Evaluate(dspy.Evaluate):
    """What DSPy's callbacks are shown as the evaluator: one of theirs, whose call does our work."""

    def __init__(self, examples_pass: ExamplePass, examples: Sequence[dspy.Example]) -> None:
        settings = examples_pass.settings
        super().__init__(
            devset=list(examples),
            metric=examples_pass.metric,
            num_threads=settings.num_threads,
            max_errors=settings.max_errors,
        )

    def of(self, program: dspy.Module, work: Callable[[], Evaluation], kind: Kind | None) -> Evaluation:
        """The evaluation that `work` makes."""
        self._work = work
        self(program, callback_metadata=None if kind is None else {"metric_key": kind})
        return self._done

    @with_callbacks  # type: ignore[untyped-decorator]
    def __call__(self, program: dspy.Module, callback_metadata: dict[str, Any] | None = None) -> EvaluationResult:
        self._done = self._work()
        results = [(trace.example, _prediction(trace), trace.score) for trace in self._done.traces]
        return EvaluationResult(score=round(100 * self._done.mean, 2), results=results)


def _prediction(trace: Trace) -> Any:
    """As DSPy has it: an empty one where the program failed."""
    return dspy.Prediction() if trace.prediction is None else trace.prediction


def _evaluation(traces: tuple[Trace, ...]) -> Evaluation:
    ledger = Ledger.total(trace.ledger for trace in traces)
    return Evaluation(tuple(trace.score for trace in traces), ledger, traces)


def compare(evaluations: Mapping[str, Evaluation]) -> str:
    """A line for each evaluation: its mean with a 95% interval, and from the second on its gain over the first on the
    same examples, with a paired 95% interval; and how many examples failed, by kind. Scores in the metric's unit.
    Raises ConfigError, and DataError for evaluations of other examples."""
    if not isinstance(evaluations, Mapping) or not evaluations:
        raise ConfigError(f"evaluations={evaluations!r:.100} is not allowed: give a dict from a name to an Evaluation.")
    for name, evaluation in evaluations.items():
        if not isinstance(name, str) or not isinstance(evaluation, Evaluation):
            raise ConfigError(f"evaluations[{name!r}]={evaluation!r:.100} is not allowed: give an Evaluation by name.")
    first_name, first = next(iter(evaluations.items()))
    width = max(map(len, evaluations))
    largest = max((abs(each.mean) for each in evaluations.values() if each.scores), default=0.0)
    ends_at_one = within_one(each.scores for each in evaluations.values())

    def shown(value: float, interval: Interval, *, sign: bool = False) -> str:
        mean, low, high = (score_text(each, largest, sign=sign) for each in (value, *interval))
        return f"{mean} [{low}, {high}]"

    lines = []
    for name, evaluation in evaluations.items():
        line = f"{name:<{width}}  {shown(evaluation.mean, mean_interval(evaluation.scores, ends_at_one=ends_at_one))}"
        if evaluation is not first:
            if evaluation.traces and first.traces and _examples(evaluation) != _examples(first):
                raise DataError(
                    f"evaluations[{name!r}] and evaluations[{first_name!r}] are not of the same examples: evaluate "
                    "both programs on one list, in one order."
                )
            interval = paired_interval(evaluation.scores, first.scores, ends_at_one=ends_at_one)
            line += f"   gain {shown(evaluation.mean - first.mean, interval, sign=True)}"
        failed = failure_text(evaluation.failures)
        lines.append(f"{line}   failed: {failed}" if failed else line)
    return printable("\n".join(lines))


def _examples(evaluation: Evaluation) -> str:
    return dataset_hash(trace.example for trace in evaluation.traces)
