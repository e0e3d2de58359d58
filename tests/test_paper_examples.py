"""The paper's three programs on files of the hub's format: with a model that knows the answers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import experiment
import gsm8k
import hotpotqa
import hub_files
import iris
import pytest
from fakes import field_of, outputs_of, plain_lm, reply
from search import search_among
from table_1 import BEST, MODELS, STRATEGIES, TABLE_1, table

import bettertogether
from bettertogether import LoRAConfig, TrainingConfig, evaluate
from bettertogether.testing import FakeEngine, FakeRequest


def hotpotqa_values(request: FakeRequest) -> dict[str, Any]:
    """A query by what the passages say so far, or the answer that they give."""
    question, context = field_of(request, "question"), field_of(request, "context")
    person = re.search(r"(?:where|that) (\w+ \w+) (?:lives|works)", question)
    one, other = re.findall(r"(\w+) or (\w+)\?", question)[0] if person is None else ("", "")
    works, lives = r"works for ([^.]+)\.", r"is a \w+ who lives in (\w+)\."
    place = person and re.search(f"{person[1]} {works if 'make' in question else lives}", context)
    if "search_query" in outputs_of(request):
        if person is None:
            return {"search_query": other if f"{one} |" in context else one}
        return {"search_query": place[1] if place else person[1]}
    return {"answer": _from_passages(question, context, place[1] if place else "", (one, other))}


def _from_passages(question: str, context: str, place: str, towns: tuple[str, str]) -> str:
    if towns[0]:
        years = {town: re.findall(rf"{town} \| .*?founded in (\d+)", context) for town in towns}
        return min(towns, key=lambda town: int(years[town][0]) if years[town] else 9999)
    passage = context.partition(f"{place} | ")[2]
    found = re.search(
        r"makes (\w+)|county of (\w+)" if "make" in question or "county" in question else r"river (\w+)", passage
    )
    return next(filter(None, found.groups()), "") if found else "unknown"


def gsm8k_values(request: FakeRequest) -> dict[str, Any]:
    return {"answer": f"She has {sum(map(int, re.findall(r'[0-9]+', field_of(request, 'question'))))} pens."}


def iris_values(request: FakeRequest) -> dict[str, Any]:
    length = float(field_of(request, "petal_length"))
    return {"answer": "setosa" if length < 2.5 else "versicolor" if length < 5 else "virginica"}


TASKS: dict[str, tuple[Any, Callable[[Path], Path], Callable[[FakeRequest], dict[str, Any]], str]] = {
    "hotpotqa": (hotpotqa, hub_files.hotpotqa, hotpotqa_values, "question"),
    "gsm8k": (gsm8k, hub_files.gsm8k, gsm8k_values, "question"),
    "iris": (iris, hub_files.iris, iris_values, "sepal_length"),
}


class WatchedEngine(FakeEngine):
    """Keeps what it was asked to train with."""

    def __init__(self, answer: Callable[[FakeRequest], Any]) -> None:
        super().__init__(answer)
        self.asked: list[tuple[Any, ...]] = []

    def finetune(self, rows: Any, **options: Any) -> Any:
        self.asked.append((options["lora"], options["training"], rows))
        return super().finetune(rows, **options)


def student_engine(name: str) -> WatchedEngine:
    """Writes every query right; gives the final answer where a field's text has an even length or digit sum, and
    everywhere with demos in the prompt or after training."""
    values, told = TASKS[name][2:]

    def answer(request: FakeRequest) -> str:
        outputs = values(request)
        easy = sum(map(ord, field_of(request, told))) % 2 == 0
        if "answer" in outputs and not (easy or request.demos or request.trained_on):
            outputs = {"answer": "no idea"}
        return reply(request, reasoning="So it is.", **outputs)

    return WatchedEngine(answer)


def arguments(name: str, folder: Path, *more: str) -> list[str]:
    data = TASKS[name][1](folder / "data")
    return ["--data", str(data), "--run-dir", str(folder / "run"), "--seeds", "1", "--limit", "8", *more]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole run of a task."""

    name: str
    command: list[str]
    run_dir: Path
    table: str
    engine: WatchedEngine


@pytest.fixture(scope="module", params=TASKS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    command, engine = arguments(name, folder), student_engine(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BETTERTOGETHER_CACHE", str(folder / "cache"))
        return Whole(name, command, folder / "run", TASKS[name][0].main(command, lm=plain_lm(engine)), engine)


def test_all_eight_strategies_are_compiled_tested_and_printed_beside_table_1(whole: Whole) -> None:
    numbers = hub_files.own_numbers(whole.table)
    assert 0 < float(numbers["vanilla"]) < 100
    assert numbers == {**dict.fromkeys([*STRATEGIES[1:], BEST], "100.0"), "vanilla": numbers["vanilla"]}


def test_weight_steps_train_with_the_papers_settings_on_zero_shot_prompts(whole: Whole) -> None:
    assert len(whole.engine.asked) == 3, "w and w -> w, and p -> w"
    for lora, training, rows in whole.engine.asked:
        assert lora == LoRAConfig.paper()
        assert dataclasses.replace(training, seed=0) == TrainingConfig.paper()
        assert {(len(row.messages), row.forms) for row in rows} == {(2, ())}


def test_a_finished_run_prints_its_table_again_without_a_call(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    engine = student_engine(whole.name)
    TASKS[whole.name][0].main(whole.command, lm=plain_lm(engine))
    assert engine.requests == []
    assert capsys.readouterr().out.strip() == whole.table.strip()


@pytest.mark.parametrize("whole", ["iris"], indirect=True)
def test_a_run_directory_of_another_command_is_refused_but_takes_more_seeds(whole: Whole, tmp_path: Path) -> None:
    command = [*whole.command, "--run-dir", str(shutil.copytree(whole.run_dir, tmp_path / "run"))]
    with pytest.raises(SystemExit, match="belongs to another command"):
        iris.main([*command, "--settings", "default"], lm=plain_lm(student_engine("iris")))
    text = iris.main([*command, "--seeds", "2"], lm=plain_lm(student_engine("iris")))
    assert "2 seed(s)" in text
    assert hub_files.own_numbers(text)["p"] == "100.0 (100.0 to 100.0)"


@pytest.mark.parametrize("whole", ["iris"], indirect=True)
@pytest.mark.parametrize("other", ["examples", "lm", "version"])
def test_seeds_of_other_data_models_or_versions_are_not_mixed(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    run_dir = shutil.copytree(whole.run_dir, tmp_path / "run")
    engine: FakeEngine = student_engine("iris")
    command = [*whole.command, "--run-dir", str(run_dir), "--seeds", "2"]
    if other == "examples":
        monkeypatch.setattr(iris, "flowers", lambda data, read=iris.flowers: read(data)[::-1])
    elif other == "lm":
        engine = FakeEngine(engine.answer, base_name="other")
    else:
        monkeypatch.setattr(bettertogether, "__version__", "0.0.1")
    before = json.loads((run_dir / "command.json").read_text())[other]

    with pytest.raises(SystemExit) as refused:
        iris.main(command, lm=plain_lm(engine))

    message = f"{run_dir} belongs to another command, with {{{other!r}: {before!r}}}. Give another --run-dir."
    assert str(refused.value) == message
    assert not (run_dir / "seed-1").exists()


@pytest.mark.parametrize("whole", ["hotpotqa"], indirect=True)
def test_seeds_of_other_passages_are_not_mixed(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = shutil.copytree(whole.run_dir, tmp_path / "run")
    before = json.loads((run_dir / "command.json").read_text())["search"]
    monkeypatch.setattr(hotpotqa, "search_among", lambda passages: search_among(passages[::-1]))

    with pytest.raises(SystemExit) as refused:
        hotpotqa.main([*whole.command, "--run-dir", str(run_dir)], lm=plain_lm(student_engine("hotpotqa")))

    message = f"{run_dir} belongs to another command, with {{'search': {before!r}}}. Give another --run-dir."
    assert str(refused.value) == message


def test_a_stopped_run_goes_on_after_the_last_strategy_that_was_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments("gsm8k", tmp_path)
    phases: list[str] = []
    stop = 2

    def stopping(*parts: Any, **options: Any) -> Any:
        if len(phases) == stop:
            raise KeyboardInterrupt
        phases.append(options["phase"])
        return evaluate(*parts, **options)

    monkeypatch.setattr(experiment, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        gsm8k.main(command, lm=plain_lm(student_engine("gsm8k")))
    done = json.loads((tmp_path / "run/seed-0/scores.json").read_text())
    stop = -1
    gsm8k.main(command, lm=plain_lm(student_engine("gsm8k")))
    assert len(done) == 2
    assert sorted(phases) == sorted(f"seed 0: test {name}" for name in STRATEGIES)


def test_hotpotqa_searches_twice_with_a_predictor_each_and_answers_from_both() -> None:
    program = hotpotqa.MultiHop(lambda query, k: [f"{query} {k}", "same"])
    names = [name for name, _ in program.named_predictors()]
    assert names == ["queries[0].predict", "queries[1].predict", "answer.predict"]

    def answer(request: FakeRequest) -> str:
        return reply(request, reasoning="So it is.", **{list(outputs_of(request))[-1]: "x"})

    engine = FakeEngine(answer)
    program.set_lm(plain_lm(engine))
    assert program(question="?").context == ["x 3", "same"]
    asked = [list(outputs_of(request))[-1] for request in engine.requests]
    assert asked == ["search_query", "search_query", "answer"]
    assert ["same" in field_of(request, "context") for request in engine.requests] == [False, True, True]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 7 + 5 = 12 pens.", 12),
        ("$1,234.50", 1234.5),
        ("-3 degrees", -3),
        ("72.0", 72),
        ("none", None),
        ("She has -$1,234 left.", -1234),
        (r"\boxed{-\$5}", -5),
        ("$-5", -5),
        ("x=\u22129", -9),
        ("It takes 2-3 days", 3),
        ("16-3-4", 4),
        ("(5+6)-7", 7),
        ("5%-10%", 10),
        ("$5-$10", 10),
    ],
)
def test_the_final_number_of_a_text_is_read(text: str, number: float | None) -> None:
    assert gsm8k.final_number(text) == number


def test_the_sizes_are_the_papers() -> None:
    assert [task.TASK.sizes for task in (hotpotqa, gsm8k, iris)] == [(1000, 500, 1500), (1000, 500, 1319), (50, 50, 50)]
    assert [task.TASK.prompt_sizes for task in (hotpotqa, gsm8k, iris)] == [(100, 250), (100, 250), (15, 35)]
    p = gsm8k.TASK.steps("paper", [dspy.Example()] * 1000)["p"]
    assert (p.train_size, p.val_size) == (100, 250)
    p = iris.TASK.steps("paper", [dspy.Example()] * 50)["p"]
    assert (p.train_size, p.val_size) == (15, 35)


def test_table_1_has_three_models_by_eight_strategies_for_each_task() -> None:
    assert {task: [len(column) for column in columns] for task, columns in TABLE_1.items()} == {
        "HotPotQA": [8, 8, 8],
        "GSM8K": [8, 8, 8],
        "Iris": [8, 8, 8],
    }
    line = table("Iris", "tiny", {name: [None, 10.0, 20.0] for name in (*STRATEGIES, BEST)}).splitlines()[3]
    assert re.split("  +", line) == ["w", "15.0 (10.0 to 20.0), 1 x -", "29.3", "-", "37.3"]
    assert len(MODELS) == 3
