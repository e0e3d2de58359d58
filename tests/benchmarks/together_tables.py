"""The tables of the benchmark `together.py`, from its result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from together_results import finished

PAPER = "p -> w -> p"
STRATEGIES = ("", "p", "w", "w -> w", "w -> r", "w -> g", "p -> w", "w -> p", PAPER)
ADDED = ("repeats", "preference", "policy")
"""Sides whose rounds stand beside ours."""
RESAMPLES = 4000

Scores = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Result:
    """The finished cells of one task and seed under one ablation: the compile, and what it is compared with."""

    task: str
    seed: int
    ours: Mapping[str, Any]
    auto: Mapping[str, Any] | None = None
    theirs: Mapping[str, Any] | None = None

    def has(self, *strategies: str) -> bool:
        """Whether ours ran all of these rounds."""
        return self.ours["rounds"].keys() >= set(strategies)

    def test(self, strategy: str) -> np.ndarray[Any, Any]:
        """Test scores of a round of ours."""
        return scores_of(self.ours, strategy)

    def gain(self, strategy: str, other: str) -> np.ndarray[Any, Any] | None:
        """Of a round over another, by example; None where one of them did not run."""
        return self.test(strategy) - self.test(other) if self.has(strategy, other) else None

    def val(self, strategy: str) -> float:
        """Validation score of a round of ours."""
        return float(self.ours["rounds"][strategy]["val"])

    def returned(self, side: str = "ours", key: str = "returned") -> np.ndarray[Any, Any] | None:
        """Test scores of what a side returned; None where it did not run."""
        data = getattr(self, side) or {}
        return scores_of(data, data[key]) if key in data else None

    def better_alone(self, *, by_test: bool) -> np.ndarray[Any, Any] | None:
        """The better of p alone and w alone: by validation score (equals: by test), or by the mean on the test."""
        if not self.has("p", "w"):
            return None
        return self.test(max("pw", key=lambda key: (0.0 if by_test else self.val(key), self.test(key).mean())))

    def both_over_better(self, *, by_test: bool) -> np.ndarray[Any, Any] | None:
        """Of "p -> w -> p" over the better of p alone and w alone."""
        return _minus(self.test(PAPER), self.better_alone(by_test=by_test)) if self.has(PAPER) else None

    def interaction(self) -> np.ndarray[Any, Any] | None:
        """What weights and prompts give together beyond the sum of each alone, by example."""
        if "two_by_two" not in self.ours:
            return None
        cells = {name: np.array(self.ours["tests"][key], float) for name, key in self.ours["two_by_two"].items()}
        return cells["tuned_new"] - cells["tuned_old"] - cells["base_new"] + cells["base_old"]


def scores_of(data: Mapping[str, Any], strategy: str) -> np.ndarray[Any, Any]:
    """Test scores of one round."""
    return np.array(data["tests"][data["rounds"][strategy]["test"]], float)


Groups = dict[tuple[str, str], list[Result]]
"""Model and ablation to their results, by task and seed."""


def load(folder: Path) -> Groups:
    """The finished cells of a results folder. Theirs, which have no ablations, stand beside each of ours; rounds that
    were added also stand where ours did not run."""
    names = ("side", "model", "ablation", "task", "seed")
    done = {tuple(data["cell"][name] for name in names): data for data in finished(folder)}
    groups: Groups = {}
    for model, ablation, task, seed in dict.fromkeys(key[1:] for key in done if key[0] in ("ours", *ADDED)):
        parts = [data for side in (*ADDED, "ours") if (data := done.get((side, model, ablation, task, seed)))]
        ours = dict(done.get(("ours", model, ablation, task, seed), {}))
        for name in ("rounds", "tests"):
            ours[name] = {key: value for part in parts for key, value in part[name].items()}
        auto = done.get(("auto", model, ablation, task, seed))
        theirs = done.get(("theirs", model, "default", task, seed))
        groups.setdefault((model, ablation), []).append(Result(task, seed, ours, auto, theirs))
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "default", item[0][1])))


@dataclass(frozen=True)
class Gain:
    """A mean difference with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mark = " +" if self.low > 0 else " -" if self.high < 0 else ""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{mark}"


def gain_of(parts: Mapping[str, Sequence[np.ndarray[Any, Any]]]) -> Gain:
    """The mean over tasks of the mean over seeds of differences by example, and its percentile bootstrap interval,
    examples resampled within each task and seed. `parts`: task to the differences of each seed."""
    rng = np.random.default_rng(0)
    means, samples = [], []
    for seeds in parts.values():
        means.append(np.mean([part.mean() for part in seeds]))
        drawn = [part[rng.integers(0, len(part), (RESAMPLES, len(part)))].mean(axis=1) for part in seeds]
        samples.append(np.mean(drawn, axis=0))
    low, high = np.quantile(np.mean(samples, axis=0), (0.025, 0.975))
    return Gain(float(np.mean(means)), float(low), float(high))


Difference = Callable[[Result], "np.ndarray[Any, Any] | None"]


def _minus(one: np.ndarray[Any, Any] | None, other: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
    return None if one is None or other is None else one - other


DIFFERENCES: dict[str, Difference] = {
    "returned - untouched": lambda r: _minus(r.returned(), r.test("")),
    "p->w->p - better of p, w (by validation)": lambda r: r.both_over_better(by_test=False),
    "p->w->p - better of p, w (by test)": lambda r: r.both_over_better(by_test=True),
    "returned - better of p, w (by validation)": lambda r: _minus(r.returned(), r.better_alone(by_test=False)),
    "w->r - w": lambda r: r.gain("w -> r", "w"),
    "w->g - w": lambda r: r.gain("w -> g", "w"),
    "auto - untouched": lambda r: _minus(r.returned("auto"), r.test("")),
    "auto - better of p, w (by validation)": lambda r: _minus(r.returned("auto"), r.better_alone(by_test=False)),
    "returned - dspy's": lambda r: _minus(r.returned(), r.returned("theirs")),
    "auto - dspy's": lambda r: _minus(r.returned("auto"), r.returned("theirs")),
    "2x2 of p -> w: interaction": lambda r: r.interaction(),
}


def by_task(results: Sequence[Result], value: Callable[[Result], Any]) -> dict[str, list[Any]]:
    """Task to the values of its seeds, those that are None left out."""
    found: dict[str, list[Any]] = {}
    for result in results:
        if (one := value(result)) is not None:
            found.setdefault(result.task, []).append(one)
    return found


def _mean(values: Mapping[str, Sequence[float]]) -> float:
    """Mean over tasks of the mean over seeds."""
    return float(np.mean([np.mean(seeds) for seeds in values.values()])) if values else float("nan")


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _number(value: float, digits: int = 3) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def _columns(results: Sequence[Result]) -> dict[str, Callable[[Result], float | None]]:
    """Column of the table of means to its value."""

    def of_side(side: str, key: str = "returned") -> Callable[[Result], float | None]:
        return lambda r: None if (scores := r.returned(side, key)) is None else float(scores.mean())

    columns: dict[str, Callable[[Result], float | None]] = {
        strategy or "untouched": lambda r, s=strategy: float(r.test(s).mean()) if s in r.ours["rounds"] else None  # type: ignore[misc]
        for strategy in STRATEGIES
    }
    columns["returned"] = of_side("ours")
    columns["of all rounds"] = of_side("ours", "returned_of_all")
    columns["auto"] = of_side("auto")
    columns["dspy's"] = of_side("theirs")
    return {name: value for name, value in columns.items() if any(value(r) is not None for r in results)}


def means_table(results: Sequence[Result]) -> str:
    """Mean on the test by task (over seeds) and strategy; the last line: the mean of the tasks."""
    columns = {name: by_task(results, value) for name, value in _columns(results).items()}
    rows = [["test mean", "seeds", "n", *columns]]
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        shares = [_number(_mean({task: values[task]})) if task in values else "" for values in columns.values()]
        rows.append([task, str(len(of_task)), str(len(of_task[0].test(""))), *shares])
    return grid([*rows, ["all tasks", "", "", *(_number(_mean(values)) for values in columns.values())]])


def differences_table(results: Sequence[Result]) -> str:
    """Each difference pooled and by task; + and - mark intervals above and below 0."""
    lines = []
    for name, difference in DIFFERENCES.items():
        parts = by_task(results, difference)
        if parts:
            rows = [["  pooled", str(gain_of(parts))]]
            rows += [[f"  {task}", str(gain_of({task: seeds}))] for task, seeds in parts.items()]
            lines.append(f"{name} ({sum(map(len, parts.values()))} runs)\n{grid(rows)}")
    return "\n".join(lines)


def two_by_two_table(results: Sequence[Result]) -> str:
    """The 2x2 of "p -> w" on the test: base and tuned weights with the student's prompts and with p's."""
    names = ("base_old", "base_new", "tuned_old", "tuned_new")
    titles = ("base, zero-shot", "base, p's", "tuned, zero-shot", "tuned, p's")

    def cell(result: Result, name: str) -> float:
        return float(np.mean(result.ours["tests"][result.ours["two_by_two"][name]]))

    columns = [by_task(results, lambda r, n=name: cell(r, n)) for name in names]  # type: ignore[misc]
    rows = [["2x2 on test", *titles]]
    rows += [[task, *(_number(_mean({task: c[task]})) for c in columns)] for task in columns[0]]
    return grid([*rows, ["all tasks", *(_number(_mean(c)) for c in columns)]])


def costs_table(results: Sequence[Result]) -> str:
    """Minutes and LM calls (no cache hits) of each step and of scoring its round on validation, means over seeds."""
    rows = [["minutes / LM calls", *(strategy or "untouched" for strategy in STRATEGIES), "auto in all", "dspy's"]]

    def shown(costs: Sequence[tuple[float, float]]) -> str:
        return f"{np.mean([c[0] for c in costs]):.1f} / {np.mean([c[1] for c in costs]):.0f}" if costs else ""

    def total(data: Mapping[str, Any]) -> tuple[float, float]:
        rounds = data["rounds"].values()
        return data.get("minutes", sum(r.get("minutes", 0) for r in rounds)), data.get(
            "lm_calls", sum(r.get("lm_calls", 0) for r in rounds)
        )

    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        rounds = [[found for r in of_task if (found := r.ours["rounds"].get(each))] for each in STRATEGIES]
        costs = [shown([(each["minutes"], each["lm_calls"]) for each in seeds]) for seeds in rounds]
        others = [shown([total(d) for r in of_task if (d := getattr(r, side))]) for side in ("auto", "theirs")]
        rows.append([task, *costs, *others])
    return grid(rows)


def choices_table(results: Sequence[Result]) -> str:
    """What each compile returned, by seed."""

    def name(data: Mapping[str, Any] | None) -> str:
        if data is None:
            return ""
        return (data["returned"] or "untouched") + (" (a step failed)" if data.get("step_failed") else "")

    rows = [["returned", "ours", "of all rounds", "auto", "dspy's"]]
    for r in results:
        of_all = r.ours["returned_of_all"] or "untouched"
        rows.append([f"{r.task} s{r.seed}", name(r.ours), of_all, name(r.auto), name(r.theirs)])
    return grid(rows)


def ablation_table(groups: Groups, model: str) -> str:
    """Each ablation beside the default, on the tasks and seeds that both have: pooled means on the test, and the
    ablation's gain over the default."""
    base = {(r.task, r.seed): r for r in groups.get((model, "default"), []) if "returned" in r.ours}
    rows = [
        [
            "ablation",
            "runs",
            "w",
            "p -> w",
            PAPER,
            "returned",
            "interaction",
            f"{PAPER}: gain over default",
            "returned: gain",
        ]
    ]
    for (of_model, ablation), results in groups.items():
        both = [r for r in results if of_model == model and (r.task, r.seed) in base and "returned" in r.ours]
        if not both or ablation == "default":
            continue
        for name, these in (("default", [base[r.task, r.seed] for r in both]), (ablation, both)):
            means = [_mean(by_task(these, lambda r, s=s: float(r.test(s).mean()))) for s in ("w", "p -> w", PAPER)]  # type: ignore[misc]
            means.append(_mean(by_task(these, lambda r: float(scores_of(r.ours, r.ours["returned"]).mean()))))
            means.append(_mean(by_task(these, lambda r: None if (x := r.interaction()) is None else float(x.mean()))))
            gains = (
                ["", ""]
                if name == "default"
                else [
                    str(gain_of(by_task(these, lambda r: r.test(PAPER) - base[r.task, r.seed].test(PAPER)))),
                    str(gain_of(by_task(these, lambda r: _minus(r.returned(), base[r.task, r.seed].returned())))),
                ]
            )
            rows.append([name, str(len(both)), *map(_number, means), *gains])
    return grid(rows) if len(rows) > 1 else ""


def tables(groups: Groups) -> str:
    """Everything that the results say."""
    parts = []
    for (model, ablation), results in groups.items():
        ordered = sorted(results, key=lambda r: (r.task, r.seed))
        parts += [f"== {model}, {ablation} ==", means_table(ordered), differences_table(ordered)]
        if whole := [result for result in ordered if "returned" in result.ours]:
            parts.append(two_by_two_table(whole))
        parts.append(costs_table(ordered))
        if whole:
            parts.append(choices_table(whole))
    for model in dict.fromkeys(model for model, _ in groups):
        if compared := ablation_table(groups, model):
            parts.append(f"== {model}, ablations (each pair of lines: the same tasks and seeds) ==\n{compared}")
    return "\n\n".join(parts) if parts else "No finished cell yet."
