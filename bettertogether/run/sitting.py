"""One sitting of a run: the loop, the report of it, and the program that is returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy

from ..callbacks import events
from ..errors import BudgetExceeded
from ..files import atomic_write, json_text
from ..programs.copies import hang
from ..programs.program import copy_for_step, prompt_adapter_name
from ..records import Ledger
from ..report.report import CompileReport
from ..rollouts.failures import all_raised
from ..versions import versions
from . import strategy
from .asked import accelerator, machine
from .budget import Budget
from .directory import RunDirectory
from .loop import Loop
from .plan import Plan
from .selection import rank, select


def carry_out(plan: Plan, directory: RunDirectory, asked: Mapping[str, Any], budget: Budget) -> dspy.Module:
    """Run what is left to do of a plan, report on it in the directory, and return the best program. `asked` is the
    plan as the directory notes it."""
    rounds, earlier = ["", *map(strategy.join, strategy.prefixes(plan.strategies))], directory.rounds()
    noted = [*earlier.values(), *([directory.unscored] if directory.unscored else [])]
    meter = budget.start(directory.spent or Ledger.total(record.ledger for record in noted))
    events.emit(
        "run_start",
        {
            "strategy": plan.strategy,
            "rounds": rounds,
            "finished": [record for name, record in earlier.items() if plan.auto or name in rounds],
            "run_dir": str(directory.path),
            "params": asked,
            "left_s": meter.left_s,
        },
    )
    with events.run_end_on_error():
        events.told(*plan.warnings)
        loop = Loop(plan, directory, meter)
        try:
            loop.run()
        finally:
            directory.note_spent(meter.used)
        report = _report(loop)
        atomic_write(directory.path / "report.json", json_text(report.to_dict()))
        report.to_html(directory.report)
        if loop.error is None:
            directory.finish()
    events.emit("run_end", {"report": report, "error": None if loop.error is None else repr(loop.error)})
    return _best_program(report, loop)


def _report(loop: Loop) -> CompileReport:
    of_steps = [
        f"{record.name}: {warning}" for record in loop.records for warning in (*record.warnings, *record.score_warnings)
    ]
    return CompileReport(
        rounds=tuple(loop.records),
        selected=select(loop.records),
        valset_size=len(loop.plan.valset),
        strategy=loop.plan.strategy,
        seed=loop.plan.seed,
        versions=versions(),
        machine=machine() | accelerator(),
        warnings=(*loop.plan.warnings, *loop.warnings, *of_steps),
        stopped=loop.stopped,
        prompt_adapter=prompt_adapter_name(),
    )


def _best_program(report: CompileReport, loop: Loop) -> dspy.Module:
    """A copy of the selected program with the attributes that `dspy.BetterTogether` gives its result, and ours."""
    rounds, programs = report.rounds, loop.programs
    result = copy_for_step(programs[rounds[report.selected].strategy])
    result._compiled = True
    candidates = [
        {
            "score": None if (score := rounds[i].score) is None else round(100 * score, 2),
            "program": programs[rounds[i].strategy],
            "strategy": rounds[i].strategy,
        }
        for i in rank(rounds, report.selected)
    ]
    failed = not isinstance(loop.error, BudgetExceeded | KeyboardInterrupt | None) or any(map(all_raised, rounds))
    hang(result, candidate_programs=candidates, flag_compilation_error_occurred=failed, report=report)
    return result
