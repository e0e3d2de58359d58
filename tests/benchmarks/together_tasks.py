"""The tasks of the benchmark `together.py`: small enough for 135M parameters on two cores, of nine different kinds.

Inputs have fewer than 80 tokens, answers few; train, validation and test are disjoint, drawn by seed. Where a program
has more than one call, the data have labels for the last one only. `sentence`, `scene` and `reply` have no labels at
all: only the metric knows what is right.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tasks import Iris, Sentiment, iris_data, iris_match, sentiment_data, sentiment_match
from together_texts import FACTS, bought, distinct, hop_question, order_text, sum_question, three_words, ticket

from bettertogether import stratified_split

Split = tuple[list[dspy.Example], list[dspy.Example], list[dspy.Example]]
Sizes = tuple[int, int, int]
"""Examples to train on, to choose on, and of the test, which no step sees."""
SIZES: Sizes = (50, 50, 150)


@dataclass(frozen=True)
class Task:
    """One task of the benchmark."""

    name: str
    draw: Callable[[Sizes, int], Split]
    """Sizes and seed to train, validation and test examples."""
    program: Callable[[], dspy.Module]
    metric: Callable[..., bool]
    max_tokens: int
    sizes: Sizes = SIZES

    def data(self, seed: int, limit: int | None = None, test: int | None = None) -> Split:
        """The three parts; `limit` bounds train and validation, `test` the test."""
        train, val, most = self.sizes
        bound = max(train, val) if limit is None else limit
        return self.draw((min(train, bound), min(val, bound), most if test is None else min(most, test)), seed)


def _generated(make: Callable[..., dspy.Example]) -> Callable[[Sizes, int], Split]:
    def draw(sizes: Sizes, seed: int) -> Split:
        train, val, test = sizes
        examples = distinct(make, sum(sizes), seed)
        return examples[:train], examples[train : train + val], examples[train + val :][:test]

    return draw


def _sentiment(sizes: Sizes, seed: int) -> Split:
    return sentiment_data(*sizes, seed)


def _iris(sizes: Sizes, seed: int) -> Split:
    first, second, third = iris_data(seed)
    train, rest = stratified_split([*first, *second, *third], sizes[0], seed)
    val, test = stratified_split(rest, sizes[1], seed)
    return train, val, test[: sizes[2]]


class Topic(dspy.Signature):
    """Say in a few words what the customer's problem is."""

    message: str = dspy.InputField()
    problem: str = dspy.OutputField(desc="at most five words")


class Route(dspy.Signature):
    """Which team solves this problem?"""

    problem: str = dspy.InputField()
    team: Literal["shipping", "billing", "account", "repairs"] = dspy.OutputField()


class Router(dspy.Module):
    """A message in a few words, and the team from those words alone."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic)
        self.route = dspy.Predict(Route)

    def forward(self, message: str) -> dspy.Prediction:
        return self.route(problem=self.topic(message=message).problem)


class Plan(dspy.Signature):
    """Which person is the question about, and is it about the person's town or pet?"""

    question: str = dspy.InputField()
    person: str = dspy.OutputField()
    about: Literal["town", "pet"] = dspy.OutputField()


class Next(dspy.Signature):
    """Copy the name of the town or of the pet from the fact."""

    fact: str = dspy.InputField()
    about: Literal["town", "pet"] = dspy.InputField()
    name: str = dspy.OutputField()


class FromFact(dspy.Signature):
    """Answer the question from the fact."""

    question: str = dspy.InputField()
    fact: str = dspy.InputField()
    answer: str = dspy.OutputField(desc="one word of the fact")


class TwoHops(dspy.Module):
    """Look up the person, then the town or pet that the person's fact names, and answer from what is known of that."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = dspy.Predict(Plan)
        self.next = dspy.Predict(Next)
        self.answer = dspy.Predict(FromFact)

    def forward(self, question: str) -> dspy.Prediction:
        plan = self.plan(question=question)
        name = self.next(fact=_known(plan.person), about=plan.about).name
        return self.answer(question=question, fact=_known(name))


def _known(query: str) -> str:
    """The fact whose name the query contains."""
    return next((fact for name, fact in FACTS.items() if name in query), "unknown")


class Solve(dspy.Signature):
    """Solve the word problem: write the calculation, then the number alone."""

    question: str = dspy.InputField()
    answer: int = dspy.OutputField()


class Order(pydantic.BaseModel):
    """An order."""

    customer: str
    item: str
    quantity: int
    day: str


class ReadOrder(dspy.Signature):
    """Read the order from the text."""

    text: str = dspy.InputField()
    order: Order = dspy.OutputField()


class Compose(dspy.Signature):
    """Write one sentence of at most twelve words that contains all of the words."""

    words: str = dspy.InputField()
    sentence: str = dspy.OutputField()


class Link(dspy.Signature):
    """Write one sentence of at most sixteen words that contains all of the words, not as a list."""

    words: str = dspy.InputField()
    sentence: str = dspy.OutputField()


class Reply(dspy.Signature):
    """Write the customer one short sentence that names the product."""

    problem: str = dspy.InputField()
    reply: str = dspy.OutputField()


class Desk(dspy.Module):
    """A message in a few words, and the reply from those words alone."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic)
        self.reply = dspy.Predict(Reply)

    def forward(self, message: str) -> dspy.Prediction:
        return self.reply(problem=self.topic(message=message).problem)


def team_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether the team is the label."""
    return bool(example.team == prediction.team)


def answer_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether the answer is the label, upper and lower case and full stops aside."""
    return str(example.answer).casefold() == str(prediction.answer).strip(" .").casefold()


def hop_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether the answer is the label, or a sentence that ends with it."""
    return str(prediction.answer).strip(" .").casefold().endswith(example.answer.casefold())


def order_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether all fields are right."""
    return bool(prediction.order.model_dump() == example.order)


def words_of_one_sentence(text: str) -> list[str]:
    """The words of a text that is one sentence with a full stop, in lower case; none if it is anything else."""
    text = text.strip()
    return re.findall(r"[a-z']+", text.lower()) if text.find(".") == len(text) - 1 else []


def sentence_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether it is one sentence of six to twelve words with all that were asked for."""
    words = words_of_one_sentence(prediction.sentence)
    return 6 <= len(words) <= 12 and set(example.words.split(", ")) <= set(words)


def scene_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether it is one sentence of six to sixteen words with all that were asked for, no two of them only listed."""
    asked, words = example.words.split(", "), words_of_one_sentence(prediction.sentence)
    listed = any(f"{first}, {second}" in prediction.sentence.lower() for first in asked for second in asked)
    return 6 <= len(words) <= 16 and set(asked) <= set(words) and not listed


def reply_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    """Whether it is one sentence of four to twelve words that names the product, even as part of another word."""
    words = words_of_one_sentence(prediction.reply)
    return 4 <= len(words) <= 12 and example.product in " ".join(words)


TASKS = {
    task.name: task
    for task in (
        Task("sentiment", _sentiment, lambda: dspy.Predict(Sentiment), sentiment_match, 32),
        Task("iris", _iris, lambda: dspy.Predict(Iris), iris_match, 32, (50, 40, 60)),
        Task("router", _generated(ticket), Router, team_match, 48),
        Task("hops", _generated(hop_question), TwoHops, hop_match, 32),
        Task("arithmetic", _generated(sum_question), lambda: dspy.ChainOfThought(Solve), answer_match, 64),
        Task("orders", _generated(order_text), lambda: dspy.Predict(ReadOrder), order_match, 64),
        Task("sentence", _generated(three_words), lambda: dspy.Predict(Compose), sentence_match, 32),
        Task("scene", _generated(three_words), lambda: dspy.Predict(Link), scene_match, 40),
        Task("reply", _generated(bought), Desk, reply_match, 32),
    )
}
