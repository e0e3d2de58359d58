"""The prompt step: `BootstrapFewShotRS`, the paper's BFRS (section 3.1), done once and in parallel.

Bootstrap traces once; sample few-shot sets from them; score each on other examples, those of the valset or a part of
the trainset; keep the best.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from ..callbacks import events
from ..checks import require_pass_options, require_switch, require_threshold, require_whole
from ..errors import DataError
from ..files import adapters_cache
from ..other_names import knows
from ..programs.program import as_programs, copy_for_step, require_program, with_prompts
from ..records import RaceResult
from ..rollouts.examples import check_examples
from ..rollouts.labels import split_apart, stratified_split
from ..rollouts.metrics import FULL_MARK, Metric, full_mark, require_metric
from ..rollouts.rollout import RolloutStore, stable_seed
from ..rollouts.settings import RunSettings
from ..rollouts.traces import ExamplePass, TraceSet, collect_traces
from ..rollouts.tries import TEMPERATURES, Sampling
from .candidate_scores import CandidateScores, all_equal
from .demo_sets import Candidate, DemoSets
from .outcome import Outcome
from .race import choose, expected_calls, run_race, solves_all
from .select_traces import select_traces, unseen_calls
from .step import Step, StepContext, StepResult
from .strengths import TriedAdapters, at_strengths, checked_strengths, no_strengths
from .work import ExpectedTries, Outlook, Work

TRAIN_SHARE = 0.3
"""Share of the examples that demos are bootstrapped from; the paper's 100 of 350 and 15 of 50."""
MOST_TRAIN, MOST_VALIDATION = 100, 250
ENOUGH_TO_SPLIT = 20
"""Examples of a trainset from which a small valset is not chosen on."""
SMALL_SHARE = 1 / 3
"""A valset of less than this share of the trainset is small: it has not half of what the trainset could hold out."""
FEWEST_NEW = 2
"""Of the demo sets, those that are sampled, at least, however many earlier rounds found."""
SAMPLING_TRIES = 5
"""How often a demo set that was sampled before is sampled again."""


@knows(
    num_candidate_programs="num_candidates=...",
    max_rounds="num_samples=...",
    metric_threshold="threshold=...",
    teacher_settings="compile(teacher=...), a program with LMs of its own",
)
class BootstrapFewShotRS(Step, Teleprompter):
    """Few-shot demos from the program's own successful runs, chosen by score.

    Args:
        metric: `(example, prediction, trace=None)` to a bool, a number or `Prediction(score, feedback)`.
        num_candidates: Demo sets to try, besides the prompts given, the zero-shot prompt and the labels alone: the best
            that earlier rounds of a strategy found, two fewer than this at most, and new ones.
        max_bootstrapped_demos: Demos of a set that come from traces, at most.
        max_labeled_demos: Demos of a set in all, filled up with labelled examples of the trainset.
        train_size: Examples to bootstrap from; None: all of the trainset, or 30% where it is split; at most 100.
        val_size: Examples to score candidates on, none of which is bootstrapped from; None: all of the valset, or where
            the trainset is split the rest of it, at most 250.
        threshold: Score from which an example counts as solved; None: 1.0, the full mark, or where hardly any run gets
            that from a metric that grades, the mean of the first runs (see `rollouts/graded.py`).
        restart: Start from the original prompts (`restart_from=` of `compile`), as the paper does, not from the prompts
            given. Those are a candidate either way, so the step never loses what it was given.
        strengths: Strengths of the program's adapters, where it has any, at which the best prompts are tried as well.
            Only one that scores better than the adapters as they are (1.0) is taken. (): none.
        race: Stop candidates that a paired bound says can't win, and those that answer as a simpler one does; False
            scores all of them fully.
        num_samples, temperature, rescue: How hard to try for a trace of each example, see `LoRAFinetune`; up to 8 tries
            where fewer than twice `max_bootstrapped_demos` are solved.
        num_threads, max_errors, seed: As in `dspy.Evaluate`; `compile` may be given its own.
    """

    def __init__(
        self,
        metric: Metric,
        *,
        num_candidates: int = 6,
        max_bootstrapped_demos: int = 3,
        max_labeled_demos: int = 3,
        train_size: int | None = None,
        val_size: int | None = None,
        threshold: float | None = None,
        restart: bool = True,
        strengths: Sequence[float] = (0.5, 0.75),
        race: bool = True,
        num_samples: int = 1,
        temperature: float | Sequence[float] = TEMPERATURES,
        rescue: bool = True,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int = 0,
    ) -> None:
        require_whole("num_candidates", num_candidates, 0)
        require_whole("max_bootstrapped_demos", max_bootstrapped_demos, 0)
        require_whole("max_labeled_demos", max_labeled_demos, 0)
        require_whole("train_size", train_size, 1, optional=True)
        require_whole("val_size", val_size, 1, optional=True)
        require_switch("restart", restart)
        require_switch("race", race)
        require_metric(metric)
        require_pass_options(num_threads, max_errors, seed)
        require_threshold(threshold)
        self.metric = metric
        self.num_candidates = num_candidates
        self.max_bootstrapped_demos = max_bootstrapped_demos
        self.max_labeled_demos = max_labeled_demos
        self.train_size = train_size
        self.val_size = val_size
        self.threshold = threshold
        self.restart = restart
        self.strengths = checked_strengths(strengths)
        self.race = race
        self.sampling = Sampling(num_samples, temperature, rescue, enough=2 * max_bootstrapped_demos)
        self.num_threads = num_threads
        self.max_errors = max_errors
        self.seed = seed

    @classmethod
    def paper(cls, metric: Metric, **options: Any) -> Self:
        """The paper's setting: 6 candidates, at most 3 demos, 100 + 250 examples, one run each, every candidate
        scored fully, adapters as they are. (On Iris the paper took train_size=15, val_size=35.)"""
        paper: dict[str, Any] = {
            "train_size": 100,
            "val_size": 250,
            "strengths": (),
            "race": False,
            "num_samples": 0,
            "rescue": False,
        }
        return cls(metric, **(paper | options))

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        restart_from: dspy.Module | None = None,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int | None = None,
        store: RolloutStore | None = None,
    ) -> dspy.Module:
        """A copy of the student with the best prompts found, its LMs kept.

        `valset`, when given, is what candidates are scored on, and demos come from the trainset. `restart_from`
        is the program whose prompts a restart starts from; None: the student without demos. The result has
        `candidate_programs` (dicts with score, program, name; best first): all but those at other strengths that were
        not taken, whose adapters are deleted. Raises ProgramError, DataError, ConfigError (a score below 0),
        TooManyErrors.
        """
        settings = RunSettings(num_threads, max_errors, seed, store)
        context = StepContext(trainset, valset, as_programs(teacher), restart_from=restart_from, settings=settings)
        return self.run_alone(student, context)

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """`compile` with its arguments in one, and all that it found out in its result."""
        started = time.monotonic()
        require_program(student)
        check_examples(context.trainset, "trainset")
        check_examples(context.valset or (), "valset")
        if context.restart_from is not None:
            require_program(context.restart_from, "restart_from")
        settings = self._settings(context.settings)
        seed = settings.seed or 0
        train, validation = self.split(context.trainset, context.valset, seed)
        start = self._start(student, context.restart_from)
        options = ExamplePass(self.metric, self.threshold, settings, phase="bootstrap demos")
        traces = collect_traces(start, train, options, sampling=self.sampling, teachers=context.teachers)
        unsaid = [*self._no_demos(traces), no_strengths(student, self.strengths)]
        warnings = [*traces.warnings, *events.told(*unsaid)]
        chosen = select_traces(traces.traces, near_misses=traces.mark is not None)
        sets = DemoSets(start, chosen, train)
        candidates = self._candidates(student, start, context.earlier, sets, seed)
        scoring = CandidateScores(candidates[:1], validation, self.metric, settings)
        candidates, race = self._race(candidates, len(validation), scoring, context)
        warnings += scoring.broken
        warnings += scoring.warnings or events.told(all_equal(candidates, self.threshold))
        outcome = Outcome(candidates, len(validation))
        warnings += events.told(*_left_out(sets))
        return StepResult(
            outcome.program(),
            (traces.ledger + scoring.ledger).with_seconds(time.monotonic() - started),
            outcome.details(traces, race, sets),
            # On a valset a gain is in the round's score; it is no evidence besides.
            None if context.valset else outcome.gain(),
            tuple(warnings),
        )

    def sparing(self, context: StepContext, *, is_tuned: bool) -> StepContext:
        """Without its valset where the trainset has enough examples for demos and for the choice, or the valset too few
        for the choice. Else all of the trainset is for demos. Tuned weights answer the trainset by heart under any
        prompt, so theirs are always chosen on the valset."""
        size = len(context.trainset)
        enough = size >= (self.train_size or MOST_TRAIN) + (self.val_size or MOST_VALIDATION)
        small = size >= ENOUGH_TO_SPLIT and len(context.valset or ()) < SMALL_SHARE * size
        return replace(context, valset=None) if not is_tuned and (enough or small) else context

    @property
    def demos(self) -> int:  # type: ignore[override]
        """Demos that a prompt shows, at most."""
        return max(self.max_bootstrapped_demos, self.max_labeled_demos)

    def work(self, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work:
        """The tries for demos and the races of the prompts and strengths, as the outlook has them."""
        train, validation = self.split(context.trainset, context.valset, self._settings(context.settings).seed or 0)
        tries = ExpectedTries.of(student, train, outlook, len(context.teachers))
        self.sampling.carry_out(tries)
        size = len(validation)
        prompts = 1 + outlook.has_demos + bool(self.max_labeled_demos) + self.num_candidates
        scaled = len(set(self.strengths) - {1.0}) if outlook.is_tuned else 0
        if context.valset and self._can_be_won and outlook.contest[0] == FULL_MARK:
            # The prompts given may have it, and be the simplest.
            calls = float(size)
        else:
            calls = expected_calls(prompts, size, outlook.contest, race=self.race)
            if scaled:
                # The best has its scores already.
                calls += expected_calls(1 + scaled, size, outlook.contest, race=self.race) - size
        whole = len(context.trainset)
        calls -= size * outlook.is_scored if context.valset else _surely_known(size, outlook.known, whole)
        race = Work(demo_runs=calls, prompts=prompts + scaled, known=0 if context.valset else size)
        if context.teachers:
            return race + Work(teacher_runs=tries.runs)
        runs = tries.unknown(_surely_known(len(train), outlook.bare, whole))
        return race + Work(plain_runs=runs, given=0 if outlook.has_demos else len(train), bare=len(train))

    def _settings(self, given: RunSettings) -> RunSettings:
        own = given.or_else(num_threads=self.num_threads, max_errors=self.max_errors, seed=self.seed)
        # What is run twice, such as the prompts given, is then answered once.
        return own if own.store is not None else replace(own, store=RolloutStore())

    def split(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, seed: int
    ) -> tuple[list[dspy.Example], list[dspy.Example]]:
        """The examples that demos come from and those that candidates are scored on. Raises DataError where they are
        too few."""
        if not trainset:
            raise DataError("trainset cannot be empty: give the examples to bootstrap demos from.")
        if valset:
            train = stratified_split(trainset, self.train_size or MOST_TRAIN, seed)[0]
            return train, stratified_split(valset, self.val_size or len(valset), seed)[0]
        share = min(MOST_TRAIN, round(TRAIN_SHARE * len(trainset)))
        train, rest = split_apart(trainset, self.train_size or share, seed)
        if not train:
            raise DataError(
                f"trainset has one example, or asks the same in all of its {len(trainset)}: give two or more that "
                "differ, or a valset."
            )
        return train, rest[: self.val_size or MOST_VALIDATION]

    def _start(self, student: dspy.Module, restart_from: dspy.Module | None) -> dspy.Module:
        """The program that demos are added to: original prompts (restart) or current ones, without demos."""
        restarts = self.restart and restart_from is not None
        start = with_prompts(student, restart_from) if restarts else copy_for_step(student)
        for predictor in start.predictors():
            predictor.demos = []
        return start

    def _candidates(
        self, student: dspy.Module, start: dspy.Module, earlier: Sequence[dspy.Module], sets: DemoSets, seed: int
    ) -> list[Candidate]:
        found = [sets.of("current", copy_for_step(student)), sets.of("zero-shot", start)]
        if self.max_labeled_demos:
            found.append(sets.candidate("labels", 0, self.max_labeled_demos, seed))
        again = (sets.earlier(f"earlier {n}", with_prompts(student, each)) for n, each in enumerate(earlier, 1))
        known = list(islice(filter(None, again), max(0, self.num_candidates - FEWEST_NEW)))
        new = range(1, self.num_candidates - len(known) + 1)
        found += [*known, *(self._sampled(sets, number, seed) for number in new)]
        return [candidate for candidate in found if candidate is not None]

    def _sampled(self, sets: DemoSets, number: int, seed: int) -> Candidate | None:
        """A set of demos that was not sampled before; None when a few tries find none."""
        for attempt in range(SAMPLING_TRIES):
            own_seed = stable_seed("demos", seed, number, attempt)
            size = self.max_bootstrapped_demos
            if number > 1 and size:
                size = random.Random(own_seed).randint(1, size)
            if candidate := sets.candidate(f"demos {number}", size, self.max_labeled_demos, own_seed):
                return candidate
        return None

    def _race(
        self, candidates: list[Candidate], size: int, scoring: CandidateScores, context: StepContext
    ) -> tuple[list[Candidate], RaceResult]:
        """The race of the prompts, then that of the winner's against themselves at other strengths; with all that
        took part."""
        mark = full_mark(self.threshold)
        # A valset the program given was scored on as a round: its answers are kept, so all of them count.
        given, *others = candidates
        prompts = run_race([given] if context.valset else [], size, scoring, race=False)
        if self._is_best(given, size):
            # Equals are chosen by their demos.
            others = [each for each in others if each.demos < given.demos]
        scoring.add(others)
        candidates = [given, *others]
        prompts += run_race(candidates, size, scoring, race=self.race, full_mark=mark)
        best = choose(candidates, size)
        with TriedAdapters(adapters_folder(context)) as tried:
            scaled = [] if self._is_best(best, size) else at_strengths(best, self.strengths, tried)
            scoring.add(scaled)
            strengths = run_race([best, *scaled], size, scoring, race=self.race, full_mark=mark)
            tried.keep(choose([*candidates, *scaled], size).program)
        return [*candidates, *scaled], prompts + strengths

    def _is_best(self, candidate: Candidate, size: int) -> bool:
        """Whether a race is won."""
        return self._can_be_won and solves_all(candidate, size)

    @property
    def _can_be_won(self) -> bool:
        """Whether a race may end at the full mark: without a threshold no metric goes above it."""
        return self.race and self.threshold is None

    def _no_demos(self, traces: TraceSet) -> list[str]:
        """Why no demo comes from a run, where that was to be."""
        if not self.max_bootstrapped_demos or any(trace.calls for trace in traces.passing):
            return []
        if traces.passing:
            return [f"bootstrap demos: no demo comes from a run. {unseen_calls(len(traces.passing))}"]
        if traces.warnings:
            return []
        reasons = ", ".join(f"{count} x {reason}" for reason, count in traces.reasons().items())
        return [
            f"bootstrap demos: the metric accepted none of {traces.size_text} "
            f"({reasons}), so no demo comes from a run. Give a threshold= that runs can reach, or a teacher, or "
            "mend the metric."
        ]


def _surely_known(part: int, share: float, whole: int) -> float:
    """Examples of a part that are among the known ones, a share of the whole: no more than must be."""
    return max(0.0, part - (1 - share) * whole)


def adapters_folder(context: StepContext) -> Path:
    """Where the adapters go that the step makes."""
    return adapters_cache() if context.folder is None else Path(context.folder)


def _left_out(sets: DemoSets) -> Iterator[str]:
    for name, reasons in sets.problems().items():
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        yield f"Not all examples can be demos of predictor {name!r}: {listed}."
