"""What the paper's three programs share: arguments, all eight strategies over the seeds, and the table.

As in the paper (section 4): BootstrapFewShotRS.paper and LoRAFinetune.paper, temperature 0.1, top_p 0.97, 1024 tokens,
3 seeds. Otherwise than there: every round is scored on the validation examples, from which the row "best on dev" comes,
and a prompt step after a weight step chooses its prompts on those, with what earlier rounds found among them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from table_1 import BEST, STRATEGIES, table

import bettertogether
from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, default_model, evaluate, local_lm

FAMILIES = {"p": ["p -> p", "p -> w -> p"], "w": ["w -> p", "w -> w"]}
"""A compile run for each first step: where there is nothing to train on, it ends, and the other goes on."""
ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter}
Examples = list[dspy.Example]


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks."""

    name: str
    """As in TABLE_1."""
    metric: Callable[..., bool]
    measure: str
    """The metric in words."""
    sizes: tuple[int, int, int]
    """Examples to train on, to choose on, and of the test."""
    prompt_sizes: tuple[int, int] = (100, 250)
    """Of the train examples, those that a prompt step bootstraps from and those that it scores on."""

    def limited(self, limit: int | None) -> tuple[int, int, int]:
        """The sizes, none above the limit."""
        train, dev, test = self.sizes
        most = max(self.sizes) if limit is None else limit
        return min(train, most), min(dev, most), min(test, most)

    def steps(self, settings: str, trainset: Examples) -> dict[str, Any]:
        """The steps "p" and "w"; of a smaller trainset a prompt step takes the same shares."""
        train, val = self.prompt_sizes
        if len(trainset) < train + val:
            train = max(1, len(trainset) * train // (train + val))
            val = max(1, len(trainset) - train)
        if settings == "paper":
            p = BootstrapFewShotRS.paper(self.metric, train_size=train, val_size=val)
            return {"p": p, "w": LoRAFinetune.paper(self.metric)}
        return {"p": BootstrapFewShotRS(self.metric, train_size=train, val_size=val), "w": LoRAFinetune(self.metric)}


def parser(task: Task, description: str | None) -> argparse.ArgumentParser:
    """Arguments that all three scripts take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="folder or hub id; without it SmolLM2-135M-Instruct")
    made.add_argument("--seeds", type=int, default=3, help="how many; the paper took 3")
    made.add_argument("--limit", type=int, help="examples of each part at most, to try it out")
    made.add_argument("--data", help="file or folder in the hub's own format; see the top of the script")
    made.add_argument("--run-dir", default=f"runs/{task.name.lower()}", help="the same command goes on in it")
    made.add_argument("--settings", choices=("paper", "default"), default="paper", help="of both steps")
    made.add_argument("--adapter", choices=tuple(ADAPTERS), default="chat", help="json: answers are held to a schema")
    made.add_argument("--max-tokens", type=int, default=1024)
    return made


def exact_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the answer is the label but for case, articles, punctuation and white space."""
    return bool(dspy.evaluate.answer_exact_match(example, prediction))


def run(
    task: Task,
    options: argparse.Namespace,
    program: dspy.Module,
    data: tuple[Examples, Examples, Examples],
    lm: dspy.LM | None = None,
) -> str:
    """Compile and test what is not done yet; print and return the table."""
    if options.seeds < 1 or (options.limit is not None and options.limit < 2):
        raise SystemExit("--seeds must be 1 or more, --limit 2 or more.")
    folder = Path(options.run_dir)
    if lm is None:
        model = options.model or default_model()
        lm = local_lm(model, temperature=0.1, top_p=0.97, max_tokens=options.max_tokens)
    _same_command(folder, options, data, lm)
    dspy.configure_cache(enable_disk_cache=False)
    program.set_lm(lm)
    with dspy.context(adapter=ADAPTERS[options.adapter]()):
        seeds = [
            _run_seed(task, options, program, data, seed, folder / f"seed-{seed}") for seed in range(options.seeds)
        ]
    name = lm.model.removeprefix("local/").partition("#")[0]
    text = _heading(task, options, [len(part) for part in data]) + table(task.name, name, _percent(seeds))
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return text


def _heading(task: Task, options: argparse.Namespace, sizes: Sequence[int]) -> str:
    return (
        f"{task.name}: {task.measure} in percent; {options.seeds} seed(s), mean (lowest to highest).\n"
        f"Train, dev, test: {sizes}, in the paper {list(task.sizes)}. Settings: {options.settings}.\nThe last three "
        'columns are Table 1 of the paper. "-": no run passed, so that there was nothing to train on.\n\n'
    )


def _same_command(folder: Path, options: argparse.Namespace, data: Sequence[Examples], lm: dspy.LM) -> None:
    """Refuse a folder of another command, data, model or version, but for more seeds."""
    asked = {name: value for name, value in vars(options).items() if name not in ("seeds", "run_dir")}
    examples = json.dumps([[example.toDict() for example in part] for part in data])
    digest = hashlib.sha256(examples.encode()).hexdigest()
    asked |= {"examples": digest, "lm": lm.model, "version": bettertogether.__version__}
    path = folder / "command.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != asked:
            others = {name: before.get(name) for name in before | asked if before.get(name) != asked.get(name)}
            raise SystemExit(f"{folder} belongs to another command, with {others}. Give another --run-dir.")
    _write(path, asked)


def _run_seed(
    task: Task,
    options: argparse.Namespace,
    program: dspy.Module,
    data: tuple[Examples, Examples, Examples],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Scores of every strategy: {"dev": percent, "test": [a number an example]}, or None without training data."""
    trainset, devset, testset = data
    path = folder / "scores.json"
    done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for first, strategies in FAMILIES.items():
        wanted = [name for name in STRATEGIES if name.startswith(first)]
        if done.keys() >= {"vanilla", *wanted}:
            continue
        compiled = BetterTogether(task.metric, **task.steps(options.settings, trainset)).compile(
            program,
            trainset=trainset,
            valset=devset,
            strategy=strategies,
            seed=seed,
            run_dir=folder / first,
            two_by_two=False,
        )
        for candidate in compiled.candidate_programs:
            name = candidate["strategy"] or "vanilla"
            if name not in done:
                phase = f"seed {seed}: test {name}"
                tested = evaluate(candidate["program"], testset, task.metric, seed=seed, phase=phase)
                done[name] = {"dev": candidate["score"], "test": list(tested.scores)}
                _write(path, done)
        last = compiled.report.rounds[-1]
        if last.status != "complete" and "NoTrainingDataError" not in (last.error or ""):
            raise SystemExit(f"Seed {seed} ended at {last.strategy!r}. The same command goes on.\n{last.error}")
        done |= {name: None for name in wanted if name not in done}
        _write(path, done)
    return done


def _percent(seeds: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    def test(scores: dict[str, Any] | None) -> float | None:
        return None if scores is None else 100 * sum(scores["test"]) / len(scores["test"])

    percent = {name: [test(seed[name]) for seed in seeds] for name in STRATEGIES}
    best = [max((scores for scores in seed.values() if scores), key=lambda scores: scores["dev"]) for seed in seeds]
    return {**percent, BEST: [test(scores) for scores in best]}


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
