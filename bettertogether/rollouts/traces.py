"""Run a program over examples and judge it: traces with their calls, verdicts and reasons (paper, section 3.2)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from ..callbacks import events
from ..checks import require_threshold
from ..errors import BetterTogetherError, TooManyErrors
from ..records import Ledger, count_text, score_text
from .branches import BranchPoint, branch_points
from .failures import ENDS_ONE_RUN, count_failures, error_text, failure_warning, lm_advice, reason_of_metric
from .graded import with_near_misses
from .labels import label_fields, labels_of, output_names
from .metrics import Metric, Verdict, judge, require_metric, with_trace
from .parallel import parallel_map, thread_count
from .replay import Answer, snapshot
from .rescue import has_leads, hint_for, talks_about_hint
from .rollout import Attempt, Call, Rollout, Source
from .runner import Runner
from .settings import RunSettings
from .tries import Sampling
from .usage import billed


@dataclass(frozen=True)
class Trace:
    """One attempt at one example, judged."""

    index: int
    """Position of the example in the examples given."""
    example: dspy.Example
    prediction: Any
    calls: tuple[Call, ...]
    verdict: Verdict
    source: Source
    attempt: int = 0
    label: str | None = None
    failed: bool = False
    """The program or the metric raised (a parse failure is not counted here)."""
    detail: str | None = None
    """What the program raised, a parse failure too, in one line."""
    ledger: Ledger = field(default_factory=Ledger)
    strangers: int = 0
    """Calls of predictors that are none of the program's."""
    answers: tuple[Answer, ...] = field(default=(), repr=False, compare=False)
    """Of all its calls, for branches of it."""
    strayed: bool = False
    """A branch that never came to its call."""
    unread: tuple[Call, ...] = ()
    """Calls that raised, since their answer could not be read. They are not among `calls`."""

    def every_call(self) -> Iterator[tuple[Call, bool]]:
        """Each call with whether its answer could be read; those that could not come last."""
        yield from ((call, True) for call in self.calls)
        yield from ((call, False) for call in self.unread)

    @property
    def passed(self) -> bool:
        """Whether the metric was satisfied."""
        return self.verdict.passed

    @property
    def score(self) -> float:
        """The metric's number."""
        return self.verdict.score

    @property
    def reason(self) -> str | None:
        """Why the trace can't be learned from."""
        return self.verdict.reason


@dataclass(frozen=True)
class TraceSet:
    """All attempts of a pass, in the order of the examples and attempts."""

    traces: tuple[Trace, ...] = field(repr=False)
    ledger: Ledger
    examples: int
    warnings: tuple[str, ...] = ()
    """What makes the pass meaningless; said already when it was found."""
    branches: tuple[BranchPoint, ...] = field(default=(), repr=False)
    """Calls that were answered anew; the runs in which they were are among the traces."""
    mark: float | None = None
    """Score from which runs passed too, since hardly any reached the full mark: of an example, the best teaches."""

    @property
    def passing(self) -> tuple[Trace, ...]:
        """The attempts that the metric accepted."""
        return tuple(trace for trace in self.traces if trace.passed)

    @property
    def size_text(self) -> str:
        """Such as "12 runs on 4 examples"."""
        return f"{count_text(len(self.traces), 'run')} on {count_text(self.examples, 'example')}"

    def reasons(self) -> dict[str, int]:
        """How many attempts failed, by reason."""
        return dict(Counter(trace.reason or "?" for trace in self.traces if not trace.passed).most_common())


@dataclass
class ExamplePass:
    """Options that every pass over examples shares."""

    metric: Metric | None
    threshold: float | None = None
    settings: RunSettings = field(default_factory=RunSettings)
    phase: str = "run"
    scores_only: bool = False
    """Evaluation: the metric is given None for the trace, as DSPy does, and no verdict is needed."""
    _asked: Metric | None = field(default=None, init=False, repr=False, compare=False)
    """The metric as it is called."""
    _runners: dict[int, Runner] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By the id of their program, which they keep alive: what a program holds is looked through once."""

    def __post_init__(self) -> None:
        require_metric(self.metric, optional=True)
        require_threshold(self.threshold)
        self._asked = None if self.metric is None else with_trace(self.metric)

    def over(
        self,
        program: dspy.Module,
        examples: Sequence[dspy.Example],
        jobs: Sequence[tuple[int, Attempt]],
        labels: Sequence[str | None] | None = None,
    ) -> list[Trace]:
        """Run and judge (example index, attempt) jobs, concurrently. Raises TooManyErrors."""
        return self.over_many([program], examples, [(0, *job) for job in jobs], labels)

    def over_many(
        self,
        programs: Sequence[dspy.Module],
        examples: Sequence[dspy.Example],
        jobs: Sequence[tuple[int, int, Attempt]],
        labels: Sequence[str | None] | None = None,
    ) -> list[Trace]:
        """`over` for several programs at once: (program index, example index, attempt) jobs share the threads."""
        runners = [self._runner_of(program) for program in programs]
        limit = self.settings.most_errors
        threads = max(thread_count(program, self.settings.num_threads) for program in programs)
        failures: dict[int, dict[int, Trace]] = defaultdict(dict)
        done = 0

        def one(job: tuple[int, int, Attempt]) -> Trace:
            program, index, attempt = job
            example, label = examples[index], labels[index] if labels else None
            return self._judged(index, example, runners[program].run(example, attempt), attempt, label)

        def tell(spent: Ledger) -> None:
            event: events.ProgressEvent = {"phase": self.phase, "done": done, "total": len(jobs)}
            event["at_once"] = min(threads, len(jobs))
            event["tokens"] = spent.prompt_tokens + spent.generated_tokens
            event["cost"] = spent.cost
            event["ledger"] = spent
            events.emit("progress", event)

        def note(position: int, trace: Trace) -> None:
            nonlocal done
            done += 1
            tell(trace.ledger)
            failed = failures[jobs[position][0]]
            if trace.failed:
                failed[trace.index] = trace
            if limit is not None and len(failed) > limit:
                raise TooManyErrors(too_many(failed, len(examples), limit))

        tell(Ledger())
        return parallel_map(one, jobs, num_threads=threads, on_result=note)

    def _runner_of(self, program: dspy.Module) -> Runner:
        if id(program) not in self._runners:
            self._runners[id(program)] = Runner(program, seed=self.settings.seed or 0, store=self.settings.store)
        return self._runners[id(program)]

    def _judged(self, index: int, example: dspy.Example, run: Rollout, attempt: Attempt, label: str | None) -> Trace:
        # What the metric does to them must not show where the example is asked, or the run judged, again.
        prediction = snapshot(run.prediction)
        with billed() as bill:
            verdict, failed = self._verdict(snapshot(example), prediction, run)
        answers = (value for call in run.calls for value in call.outputs.values())
        if attempt.source == "rescue" and (verdict.passed or verdict.score) and talks_about_hint(answers):
            verdict = replace(verdict, passed=False, reason="answer talks about the hint")
        judged = run.error is None and self.metric is not None
        return Trace(
            index=index,
            example=example,
            prediction=prediction,
            calls=run.calls,
            verdict=verdict,
            source=attempt.source,
            attempt=attempt.number,
            label=label,
            failed=failed,
            detail=error_text(run.error) if run.error is not None else None,
            ledger=run.ledger + replace(bill.ledger, metric_calls=int(judged)),
            strangers=run.strangers,
            answers=run.answers,
            strayed=run.strayed,
            unread=run.unread,
        )

    def _verdict(self, example: dspy.Example, prediction: Any, run: Rollout) -> tuple[Verdict, bool]:
        """The verdict, and whether something raised that counts against `max_errors`."""
        if isinstance(run.error, BetterTogetherError):
            raise run.error
        if run.failure in ("parse failure", "prompt too long"):
            return Verdict(0.0, False, run.failure), False
        if run.error is not None and run.unread:
            # dspy.Parallel gives None for a call whose answer can't be read, over which the program stumbles.
            return Verdict(0.0, False, "parse failure"), False
        if run.error is not None:
            return Verdict(0.0, False, f"{run.failure}: {error_text(run.error)}"), True
        threshold = float("-inf") if self.scores_only else self.threshold
        try:
            trace = None if self.scores_only else list(run.raw_trace)
            return judge(self._asked, example, prediction, trace, threshold), False
        except BetterTogetherError:
            raise
        except ENDS_ONE_RUN as error:
            if run.unread:
                return Verdict(0.0, False, "parse failure"), False
            return Verdict(0.0, False, reason_of_metric(error, prediction)), True


def too_many(failures: Mapping[int, Trace], examples: int, limit: int) -> str:
    """What to say of a pass that ends since more examples than the limit raised."""
    reasons = Counter(trace.reason for trace in failures.values()).most_common(3)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    service = lm_advice(str(reasons[0][0]).partition(": ")[2])
    return (
        f"{len(failures)} of {count_text(examples, 'example')} raised, more than max_errors={limit} allows. {listed}. "
        f"{service or 'Mend the program or the metric, or give a higher max_errors.'}"
    )


def collect_traces(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    options: ExamplePass,
    *,
    sampling: Sampling = Sampling(),
    teachers: Sequence[dspy.Module] = (),
    label_field: str | None = None,
) -> TraceSet:
    """Traces of every example, as `Sampling.carry_out` says.

    With teachers, each of them makes the first runs instead of the student, and the first teacher the further tries.
    """
    outputs = output_names(program)
    known = label_fields(examples, outputs) if label_field is None else [label_field]
    tries = _Tries(program, teachers, examples, labels_of(examples, label_field, outputs), known, options)
    sampling.carry_out(tries)
    traces = sorted(tries.traces, key=lambda trace: (trace.index, trace.attempt))
    ledger = Ledger.total(trace.ledger for trace in traces)
    found = TraceSet(tuple(traces), ledger, len(examples), tries.warnings, tuple(tries.points))
    return found if options.threshold is not None else _graded(found, sampling.enough, options.phase)


def _graded(traces: TraceSet, enough: int, phase: str) -> TraceSet:
    """Runs that only come near the full mark have passed too, where hardly any reaches it."""
    better = with_near_misses(traces, enough)
    if better.mark is None:
        return traces
    solved = len({trace.index for trace in traces.passing})
    warning = (
        f"{phase}: {solved} of {count_text(traces.examples, 'example')} reach the full mark, 1.0, so the best runs "
        f"from {score_text(better.mark)} on, what the first ones score, count too. threshold= gives another mark."
    )
    return replace(better, warnings=(*traces.warnings, *events.told(warning)))


@dataclass
class _Tries:
    """The traces of some examples, as far as they were tried."""

    program: dspy.Module
    teachers: Sequence[dspy.Module]
    examples: Sequence[dspy.Example]
    labels: Sequence[str | None]
    label_names: Sequence[str]
    options: ExamplePass
    traces: list[Trace] = field(default_factory=list)
    points: list[BranchPoint] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    @property
    def solved(self) -> int:
        return len(self.examples) - len(self._unsolved())

    def first(self) -> None:
        for program in self.teachers or (self.program,):
            attempt = Attempt("teacher" if self.teachers else "student")
            self._add(program, dict.fromkeys(range(len(self.examples)), attempt))
        failures = count_failures(self.traces)
        self.warnings = events.told(failure_warning(failures, len(self.traces), self.options.phase, "run"))

    def sample(self, number: int, temperature: float, *, everyone: bool = False) -> None:
        again = range(len(self.examples)) if everyone else self._unsolved()
        self._add(self._sampler, dict.fromkeys(again, Attempt("sample", number, temperature)))

    def branch(self, temperatures: Sequence[float], *, everyone: bool = False) -> None:
        again = set(range(len(self.examples)) if everyone else self._unsolved())
        first = {trace.index: trace for trace in reversed(self.traces) if not trace.attempt and trace.index in again}
        runs = [first[index] for index in sorted(first)]
        points = branch_points(self._sampler, self.examples, runs, self.options, temperatures, self.labels)
        self.points += points
        self.traces += [branch for point in points for branch in point.branches]

    def rescue(self) -> None:
        """For the predictors before the answer, then for it."""
        hints = {
            index: hint
            for index in self._unsolved()
            if (hint := hint_for(self.program, self.examples[index], self.label_names))
        }
        if has_leads(self._sampler, self.label_names):
            self._add(self._sampler, {i: Attempt("rescue", 1, narrow=hint, leads=True) for i, hint in hints.items()})
        failed = set(self._unsolved())
        self._add(self._sampler, {i: Attempt("rescue", 1, narrow=hint) for i, hint in hints.items() if i in failed})

    @property
    def _sampler(self) -> dspy.Module:
        return self.teachers[0] if self.teachers else self.program

    def _unsolved(self) -> list[int]:
        """The examples without a passing trace."""
        solved = {trace.index for trace in self.traces if trace.passed}
        return [index for index in range(len(self.examples)) if index not in solved]

    def _add(self, program: dspy.Module, attempts: Mapping[int, Attempt]) -> None:
        """Make one attempt at each of these examples."""
        if attempts:
            self.traces += self.options.over(program, self.examples, list(attempts.items()), self.labels)
