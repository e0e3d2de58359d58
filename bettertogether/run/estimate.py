"""What a compile run will take: amounts by the steps themselves, prices by a probe of this machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..programs.behaviour import program_key
from ..programs.program import predictors_of
from ..records import STUDENT, Ledger
from ..report.text import compact
from ..report.view import cost_text
from ..steps.adapter_step import AdapterStep
from ..steps.step import StepContext, as_step
from ..steps.work import Outlook, Work
from . import strategy
from .auto import kind_of
from .plan import Plan
from .probe import Probe, probe
from .strategy import Steps

ERROR = 0.25
"""What is measured on the probe's few examples may be off by so much: tokens and time of a run or a training row."""
PASSES_OF_OTHERS = (0, 5, 20)
"""Over trainset and valset, by an optimizer that is not ours: at least, likely and at most."""
NEAR, FAR = 0.75, 0.5
"""Mean scores of the best prompts in a likely race, and of the others."""


@dataclass(frozen=True)
class RoundEstimate:
    """A round: the work of its step, and of scoring it."""

    name: str
    """Its strategy, or "student"."""
    low: Ledger
    """Where races and trainings end as early as they can, and failed examples are solved at once."""
    likely: Ledger
    high: Ledger
    """Where no race and no training ends early, and no try of a failed example helps."""


@dataclass(frozen=True)
class Estimate:
    """What a compile run will take on this machine. Shown as a table by `print`."""

    strategy: str
    rounds: tuple[RoundEstimate, ...]
    """The untouched student first."""
    solved: float
    """Share of the probe's examples that were solved at the first run."""
    probe: Ledger
    """What the probe itself cost."""
    memory_gib: float | None
    """Most memory of this process until now, a batch of training included; None where the system doesn't tell."""
    device_memory_gib: float | None
    """The same of the accelerator; None without one."""
    notes: tuple[str, ...] = ()
    """What is not known."""

    @property
    def low(self) -> Ledger:
        """All rounds at least."""
        return Ledger.total(each.low for each in self.rounds)

    @property
    def likely(self) -> Ledger:
        """All rounds, as it is most likely."""
        return Ledger.total(each.likely for each in self.rounds)

    @property
    def high(self) -> Ledger:
        """All rounds at most."""
        return Ledger.total(each.high for each in self.rounds)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    __repr__ = __str__


def estimate(plan: Plan) -> Estimate:
    """Probe this machine and estimate the run of a plan."""
    measured = probe(plan)
    rounds = _rounds(plan)
    cases = [
        [
            _within(_price(measured, work, steps), 1 + (case - 1) * ERROR)
            for steps, work in zip(rounds, _works(plan, rounds, case, outlook), strict=True)
        ]
        for case, outlook in enumerate(_outlooks(plan, measured))
    ]
    others = sorted({steps[-1] for steps in rounds if steps and as_step(plan.optimizers[steps[-1]]) is None})
    notes = [f"{key} ({type(plan.optimizers[key]).__name__}) is not ours: its range is a guess." for key in others]
    notes += [
        f"{key}: no run of the probe could be learned from, so its training is not counted."
        for key, step in plan.optimizers.items()
        if isinstance(step, AdapterStep) and key not in measured.trainings
    ]
    if plan.auto:
        notes.append('"auto" chooses its rounds as it goes, and stops when nothing gains: these are the most it runs.')
    return Estimate(
        strategy=plan.strategy,
        rounds=tuple(
            RoundEstimate(strategy.join(steps) or STUDENT, *ledgers)
            for steps, *ledgers in zip(rounds, *cases, strict=True)
        ),
        solved=sum(measured.passed) / len(measured.passed),
        probe=measured.spent,
        memory_gib=measured.memory_gib,
        device_memory_gib=measured.device_memory_gib,
        notes=tuple(notes),
    )


def _rounds(plan: Plan) -> list[Steps]:
    """The untouched student, and every round of the strategies; with "auto", all steps in turn."""
    if not plan.auto:
        return [(), *strategy.prefixes(plan.strategies)]
    keys = tuple(itertools.islice(itertools.cycle(plan.optimizers), plan.max_rounds))
    return [keys[:length] for length in range(len(keys) + 1)]


def _outlooks(plan: Plan, measured: Probe) -> tuple[Outlook, Outlook, Outlook]:
    """The least, the likely and the most work."""
    count = len(measured.passed)
    solved, margin = sum(measured.passed) / count, 1 / math.sqrt(count)
    fewest, most = max(0.0, solved - margin), min(1.0, solved + margin)
    per_run = measured.plain.calls / measured.plain.runs
    trained = [step for step in plan.optimizers.values() if isinstance(step, AdapterStep)]
    predictors = len(predictors_of(plan.student))
    share = max((len(step.trainable(plan.student)) for step in trained), default=0) / max(1, predictors)
    likely = Outlook(
        solved=solved,
        again=solved / 2,
        hinted=1.0,
        learned=None,
        graded=measured.graded,
        contest=(NEAR, FAR),
        patience=0.5,
        calls=per_run * share,
        branch_runs=measured.branch_runs,
        has_demos=any(predictor.demos for predictor in plan.student.predictors()),
        is_scored=bool(plan.valset) and program_key(plan.student) is not None,
    )
    least = replace(
        likely, solved=most, again=most, learned=fewest, graded=False, contest=(1.0, 0.0), patience=0.0, forms=0.0
    )
    return (
        least,
        likely,
        replace(likely, solved=fewest, again=0.0, hinted=0.0, learned=1.0, contest=(0.0, 0.0), patience=1.0, forms=1.0),
    )


def _works(plan: Plan, rounds: Sequence[Steps], case: int, start: Outlook) -> Iterator[Work]:
    """The work of each round."""
    outlooks: dict[Steps, Outlook] = {}
    keeps = program_key(plan.student) is not None
    for steps in rounds:
        if not steps:
            outlooks[steps] = start
            yield Work.of_runs(len(plan.valset), start)
            continue
        before = outlooks[steps[:-1]]
        kind = kind_of(plan.optimizers[steps[-1]])
        better = before.solved + (0.0, 1 / 3, 0.0)[case] * (1 - before.solved)
        after = replace(
            before,
            solved=1.0 if case == 0 else better,
            # At least, the prompts stay as they were.
            has_demos=before.has_demos or (kind != "weight" and case > 0),
            is_tuned=before.is_tuned or kind == "weight",
            known=0.0,
            bare=0.0,
            tried=False,
        )
        work = _step_work(plan, steps, case, before)
        if keeps:
            known, bare = (_share(plan, examples, case) for examples in (work.given, work.bare))
            seen = replace(before, known=max(before.known, known), bare=max(before.bare, bare), tried=case == 0)
            outlooks[steps[:-1]] = seen
            if kind != "weight":
                known = (1.0, work.known / len(plan.trainset), 0.0)[case]
                after = replace(after, known=known, bare=seen.bare, tried=seen.tried)
        outlooks[steps] = after
        yield work + _score_work(plan, steps, before, after)


def _share(plan: Plan, examples: float, case: int) -> float:
    """Of the trainset; at least, the examples that a step runs on are those that another runs on."""
    return examples / len(plan.trainset) if case else float(examples > 0)


def _context(plan: Plan, steps: Steps, outlook: Outlook) -> StepContext | None:
    """What a step of ours is given."""
    step = as_step(plan.optimizers[steps[-1]])
    if step is None:
        return None
    context = StepContext(plan.trainset, plan.valset or None, plan.teachers, plan.student, settings=plan.settings)
    context = step.sparing(context, is_tuned=outlook.is_tuned)
    return context.with_arguments(plan.compile_args.get(steps[-1], {}))


def _step_work(plan: Plan, steps: Steps, case: int, outlook: Outlook) -> Work:
    step, context = as_step(plan.optimizers[steps[-1]]), _context(plan, steps, outlook)
    work = step.work(plan.student, context, outlook) if step and context else None
    return work or Work(demo_runs=PASSES_OF_OTHERS[case] * (len(plan.trainset) + len(plan.valset)))


def _score_work(plan: Plan, steps: Steps, before: Outlook, after: Outlook) -> Work:
    """Scoring the round, and the cells of its 2x2 that no other round has scored."""
    context, size = _context(plan, steps, before), len(plan.valset)
    is_weight = kind_of(plan.optimizers[steps[-1]]) == "weight"
    chosen_on_valset = not is_weight and context is not None and context.valset and before.is_scored
    work = Work() if chosen_on_valset else Work.of_runs(size, after)
    if plan.two_by_two and is_weight and before.has_demos:
        work += Work(plain_runs=size) if before.is_scored else Work(plain_runs=2 * size, demo_runs=2 * size)
    return work


def _price(measured: Probe, work: Work, steps: Steps) -> Ledger:
    runs = measured.plain.of(work.plain_runs) + measured.shown.of(work.demo_runs)
    if measured.teacher is not None:
        runs += measured.teacher.of(work.teacher_runs)
    total = runs + Ledger(seconds=measured.prompt_s * work.prompts)
    costs = measured.trainings.get(steps[-1]) if steps else None
    if costs is None or not work.trainings:
        return total
    tokens = costs.row_tokens * work.trained_rows
    forms = measured.demo_tokens * work.form_batches
    seconds = costs.row_s * work.trained_rows + costs.held_out_row_s * work.held_out_rows
    seconds += costs.set_up_s * work.trainings
    seconds += forms * costs.row_s / max(1.0, costs.row_tokens)
    return total + Ledger(trained_tokens=round(tokens + forms), seconds=min(seconds, costs.most_s * work.trainings))


def _within(ledger: Ledger, factor: float) -> Ledger:
    """With what was measured, not counted, times a factor."""
    scaled = ledger.times(factor)
    counts = ("program_calls", "metric_calls", "lm_calls", "cache_hits")
    return replace(scaled, **{name: getattr(ledger, name) for name in counts})


def _lines(given: Estimate) -> Iterator[str]:
    yield (
        f"{given.strategy}: an estimate, from {given.probe.program_calls} runs and a few training steps "
        f"({given.probe.seconds:.0f} s), of which {given.solved:.0%} solved their example"
    )
    yield ""
    total = RoundEstimate("total", given.low, given.likely, given.high)
    header = ["round", "LM calls", "tokens in and out", "tokens trained", "minutes"]
    costly = given.high.cost != 0
    rows = [[*header, *(["cost"] if costly else [])]]
    for each in (*given.rounds, total):
        cases = (each.likely, each.low, each.high)
        cells = [
            each.name,
            _cell([compact(case.lm_calls) for case in cases]),
            _cell([compact(case.prompt_tokens + case.generated_tokens) for case in cases]),
            _cell([compact(case.trained_tokens) for case in cases]),
            _cell([f"{case.seconds / 60:.1f}" for case in cases]),
        ]
        rows.append([*cells, *([_cell([cost_text(case.cost) for case in cases])] if costly else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    yield f"likely (least to most, which allow {ERROR:.0%} for what the probe measured)"
    for name, gib in (("memory", given.memory_gib), ("memory of the accelerator", given.device_memory_gib)):
        if gib is not None:
            yield f"{name}: {gib:.1f} GiB so far, a batch of training included; longer examples take more"
    yield from given.notes


def _cell(texts: Sequence[str]) -> str:
    likely, low, high = texts
    return likely if likely == low == high else f"{likely} ({low} to {high})"
