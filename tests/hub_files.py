"""Files as the hub has them, small: hotpotqa/hotpot_qa and openai/gsm8k in parquet, scikit-learn/iris as CSV; and the
numbers of a table that was printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import two_hops
from table_1 import BEST, STRATEGIES

STRING = datasets.Value("string")
HOTPOTQA = datasets.Features(
    {
        "id": STRING,
        "question": STRING,
        "answer": STRING,
        "type": STRING,
        "level": STRING,
        "supporting_facts": {"title": datasets.List(STRING), "sent_id": datasets.List(datasets.Value("int32"))},
        "context": {"title": datasets.List(STRING), "sentences": datasets.List(datasets.List(STRING))},
    }
)
GSM8K = datasets.Features({"question": STRING, "answer": STRING})
IRIS_HEADER = "Id,SepalLengthCm,SepalWidthCm,PetalLengthCm,PetalWidthCm,Species"


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Hard questions, and before them an easy one, which the task leaves out."""
    easy = {**two_hops.rows(1, seed=99)[0], "id": "easy", "level": "easy"}
    return [easy, *two_hops.rows(count, seed)]


def hotpotqa(folder: Path, train: int = 18, validation: int = 8) -> Path:
    """A folder with both configurations, of which "fullwiki" has the train split in two files and a test split without
    answers, as the hub does."""
    learning, testing = questions(train), questions(validation, seed=1)
    unknown: dict[str, Any] = {"answer": None, "type": None, "level": None}
    unknown["supporting_facts"] = {"title": [], "sent_id": []}
    half = len(learning) // 2
    files = {
        "distractor/train-00000-of-00002": learning[:half],
        "distractor/train-00001-of-00002": learning[half:],
        "distractor/validation-00000-of-00001": testing,
        "fullwiki/train-00000-of-00002": learning[:half],
        "fullwiki/train-00001-of-00002": learning[half:],
        "fullwiki/validation-00000-of-00001": testing,
        "fullwiki/test-00000-of-00001": [{**row, **unknown} for row in testing],
    }
    for name, rows in files.items():
        parquet(folder / f"{name}.parquet", rows, HOTPOTQA)
    return folder


def problem(number: int) -> dict[str, str]:
    """A word problem and its worked answer with a calculator's annotations, as GSM8K has them."""
    red, blue = number + 3, 2 * number + 5
    return {
        "question": f"Ada has {red} red pens and {blue} blue pens. How many pens does she have?",
        "answer": f"Ada has {red} + {blue} = <<{red}+{blue}={red + blue}>>{red + blue} pens.\n#### {red + blue}",
    }


def gsm8k(folder: Path, train: int = 18, test: int = 8) -> Path:
    """A folder with the configuration "main"."""
    parquet(folder / "main/train-00000-of-00001.parquet", [problem(number) for number in range(train)], GSM8K)
    parquet(folder / "main/test-00000-of-00001.parquet", [problem(100 + number) for number in range(test)], GSM8K)
    return folder


def iris(folder: Path, of_each: int = 8) -> Path:
    """`Iris.csv`, in which the lengths of petals tell the species."""
    species = (("Iris-setosa", 1.4, 0.2), ("Iris-versicolor", 4.2, 1.3), ("Iris-virginica", 5.6, 2.1))
    lines = [IRIS_HEADER]
    for name, length, width in species:
        for number in range(of_each):
            lines.append(f"{len(lines)},{5 + number / 10:.1f},3.0,{length + number / 20:.2f},{width},{name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Iris.csv").write_text("\n".join(lines) + "\n")
    return folder


def parquet(path: Path, rows: Sequence[dict[str, Any]], features: datasets.Features) -> None:
    """Write a file of a split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows), features=features).to_parquet(str(path))


def own_numbers(text: str) -> dict[str, str]:
    """Strategy to our column of a printed table."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return {line[0]: line[1] for line in lines if line[0] in (*STRATEGIES, BEST)}
