"""What the benchmark `baselines.py` compares, and its table. No dspy, so that reading is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from together_results import finished
from together_tables import grid

from bettertogether.report.intervals import mean_interval, paired_interval

NO_MODEL = "none"
"""In place of a language model's name, for tools that use none."""
ROUNDS = 10
"""Passes over the validation examples that a prompt optimizer of dspy's may spend: 400 runs, about as many LM calls
as the quickstart makes."""
SETS, DEMOS = 6, 3
"""Demo sets and demos that dspy.BetterTogether's prompt step tries, as `together_theirs.py` has them."""


@dataclass(frozen=True)
class Baseline:
    """One line of the table."""

    title: str
    settings: str
    """What a reader has to know to judge the numbers."""
    needs_lm: bool = True


BASELINES: Mapping[str, Baseline] = {
    "untouched": Baseline("untouched model", "zero-shot"),
    "tfidf": Baseline("tf-idf + logistic regression", "scikit-learn's defaults, on the training messages", False),
    "tfidf_all": Baseline(
        "  the same, train + validation",
        "on those that the others choose by as well, since it chooses nothing",
        False,
    ),
    "setfit": Baseline(
        "setfit", "all-MiniLM-L6-v2 (22M parameters), setfit's defaults, on the training messages", False
    ),
    "setfit_all": Baseline("  the same, train + validation", "on those that the others choose by as well", False),
    "labeled": Baseline("dspy.LabeledFewShot", "16 demos, its default"),
    "bootstrap": Baseline(
        "dspy.BootstrapFewShotWithRandomSearch",
        f"its default demos (4 runs, labels up to 16), {ROUNDS} programs on all of validation",
    ),
    "mipro": Baseline(
        "dspy.MIPROv2",
        f"its default demos (4), 6 candidates, {ROUNDS - 1} trials on all of validation; the model proposes for itself",
    ),
    "gepa": Baseline("dspy.GEPA", f"{ROUNDS} x validation metric calls; the model reflects on itself"),
    "together": Baseline(
        "dspy.BetterTogether", f'"p -> w -> p", {SETS} demo sets of {DEMOS}, weights by this engine\'s trainer'
    ),
    "ours": Baseline("bettertogether", 'the quickstart: "p -> w -> p", 3 epochs'),
}


def title(name: str) -> str:
    """A baseline's name where it stands alone."""
    return BASELINES[name].title.replace("  the same", BASELINES[name.removesuffix("_all")].title)


@dataclass(frozen=True)
class Line:
    """A baseline's results, over all seeds that finished."""

    name: str
    scores: tuple[float, ...]
    """Of each test example, seed by seed."""
    seeds: tuple[int, ...]
    minutes: float
    """Of wall time, to fit or compile; mean over seeds."""
    cpu_minutes: float
    """Of the processor, summed over cores: what a busy machine does not change."""
    lm_calls: float
    answer_ms: float
    """Processor time of one test example."""

    @property
    def baseline(self) -> Baseline:
        """What it is."""
        return BASELINES[self.name]

    @property
    def title(self) -> str:
        """Its name where it stands alone."""
        return title(self.name)

    @property
    def mean(self) -> float:
        """Share of test examples that are right."""
        return sum(self.scores) / len(self.scores)


def load(folder: Path) -> dict[str, list[Line]]:
    """Model name to the lines of its table, from the finished cells of a folder. Tools without a model are in each."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for data in finished(folder):
        found.setdefault((data["cell"]["model"], data["cell"]["side"]), []).append(data)
    models = {model for model, _ in found} - {NO_MODEL} or {NO_MODEL}
    return {
        model: [line_of(name, cells) for name in BASELINES for cells in (of(found, model, name),) if cells]
        for model in sorted(models)
    }


def of(found: Mapping[tuple[str, str], list[dict[str, Any]]], model: str, name: str) -> list[dict[str, Any]]:
    """A baseline's cells under a model, by seed."""
    cells = found.get((model if BASELINES[name].needs_lm else NO_MODEL, name), [])
    return sorted(cells, key=lambda data: data["cell"]["seed"])


def line_of(name: str, cells: Sequence[Mapping[str, Any]]) -> Line:
    """One line from the cells of its seeds."""

    def mean(key: str) -> float:
        return float(sum(data[key] for data in cells) / len(cells))

    scores = tuple(score for data in cells for score in data["tests"]["returned"])
    seeds = tuple(data["cell"]["seed"] for data in cells)
    return Line(name, scores, seeds, mean("minutes"), mean("cpu_minutes"), mean("lm_calls"), mean("answer_ms"))


def reference(lines: Sequence[Line]) -> Line:
    """What the others are compared with: ours, or the best where ours has not been run."""
    return next((line for line in lines if line.name == "ours"), max(lines, key=lambda line: line.mean))


def gain(line: Line, other: Line) -> tuple[float, float, float] | None:
    """Mean gain over another line and its 95% interval, on the same examples; None where they have other seeds."""
    if line.seeds != other.seeds:
        return None
    return line.mean - other.mean, *paired_interval(line.scores, other.scores)


def signed(values: tuple[float, float, float] | None) -> str:
    """A gain as text."""
    return "" if values is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def table(lines: Sequence[Line]) -> str:
    """The table of one model, and the settings of each line."""
    base = reference(lines)
    rows = [
        [
            "",
            "test [95% interval]",
            "- ours" if base.name == "ours" else "- the highest",
            "minutes",
            "CPU min",
            "LM calls",
            "CPU ms an answer",
        ]
    ]
    for line in lines:
        low, high = mean_interval(line.scores)
        rows.append(
            [
                line.baseline.title,
                f"{line.mean:.3f} [{low:.3f}, {high:.3f}]",
                "" if line is base else signed(gain(line, base)),
                f"{line.minutes:.1f}",
                f"{line.cpu_minutes:.1f}",
                f"{line.lm_calls:.0f}",
                f"{line.answer_ms:.1f}",
            ]
        )
    settings = "\n".join(f"{line.title}: {line.baseline.settings}" for line in lines)
    return f"{grid(rows)}\n\n{settings}"


def reading(lines: Sequence[Line]) -> str:
    """What the numbers say, in sentences: which tool wins over ours, which is not told apart from it and cheaper, which
    loses."""
    base = reference(lines)
    best = max(lines, key=lambda line: line.mean)
    said = [f"Highest on the test: {best.title}, {best.mean:.3f}."]
    whom = "ours" if base.name == "ours" else base.title
    if base.name != "ours":
        said.append(f"Ours was not run: the others are compared with {base.title}.")
    others = [line for line in lines if line is not base]
    gains = {line: values for line in others if (values := gain(line, base))}
    said += [
        f"{line.title} wins over {whom}: {signed(gains[line])}{costs(line, base)}"
        for line in gains
        if gains[line][1] > 0
    ]
    for line, values in gains.items():
        if values[1] <= 0 <= values[2]:
            said.append(f"{line.title} is not told apart from {whom}: {signed(values)}{costs(line, base)}")
    if lost := [f"{line.title} {signed(values)}" for line, values in gains.items() if values[2] < 0]:
        said.append(f"Lower than {whom}: {'; '.join(lost)}.")
    if unpaired := [line.title for line in others if line not in gains]:
        said.append(f"Not compared, for they have other seeds: {', '.join(unpaired)}.")
    return "\n".join(said)


def costs(line: Line, base: Line) -> str:
    """What a tool takes, beside the line that it is compared with; the end of a sentence."""
    cheaper = "cheaper, " if line.cpu_minutes < base.cpu_minutes else ""
    calls = f"{line.lm_calls:.0f} LM calls against {base.lm_calls:.0f}" if line.baseline.needs_lm else "no LM"
    return (
        f"; {cheaper}{line.cpu_minutes:.1f} CPU minutes against {base.cpu_minutes:.1f}, {calls}, "
        f"{line.answer_ms:.1f} ms an answer against {base.answer_ms:.1f}."
    )


def tables(folder: Path) -> str:
    """Everything that a results folder says."""
    groups = load(folder)
    parts = []
    for model, lines in groups.items():
        if lines:
            seeds = sorted({seed for line in lines for seed in line.seeds})
            size = len(lines[0].scores) // len(lines[0].seeds)
            head = f"== {model}, {size} test messages, seeds {' '.join(map(str, seeds))} =="
            parts.append(f"{head}\n{table(lines)}\n\n{reading(lines)}")
    finished = {line.name for lines in groups.values() for line in lines}
    if missing := [title(name) for name in BASELINES if name not in finished]:
        parts.append(f"Not run, or not finished: {'; '.join(missing)}.")
    return "\n\n".join(parts)
