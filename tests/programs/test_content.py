"""Values, functions and programs are told apart by their content, the same in every process."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import types
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from fakes import parity_engine, plain_lm

from bettertogether.errors import DataError
from bettertogether.programs.content import dataset_hash, example_content, fingerprint
from bettertogether.rollouts.examples import example_key
from bettertogether.rollouts.rollout import Attempt, RolloutStore
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine


class Passage(pydantic.BaseModel):
    title: str


class Opaque:
    def __init__(self, value: int) -> None:
        self.value = value


def example(**fields: Any) -> dspy.Example:
    return dspy.Example(**fields).with_inputs("question")


def test_a_dataset_hash_sees_values_order_and_input_keys() -> None:
    first, second = example(question="a", answer="b"), example(question="c", answer="d")
    assert dataset_hash([first, second]) == dataset_hash([first.copy(), second.copy()])
    assert dataset_hash([first, second]) != dataset_hash([second, first])
    assert dataset_hash([first]) != dataset_hash([first.with_inputs("question", "answer")])
    assert dataset_hash([first]) != dataset_hash([example(question="a", answer="B")])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (Passage(title="x"), Passage(title="x"), Passage(title="y")),
        (Opaque(1), Opaque(1), Opaque(2)),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        ({"a", "b"}, {"b", "a"}, {"a"}),
    ],
)
def test_a_dataset_hash_goes_by_the_content_of_objects_not_their_address(one: Any, same: Any, other: Any) -> None:
    assert dataset_hash([example(question=one)]) == dataset_hash([example(question=same)])
    assert dataset_hash([example(question=one)]) != dataset_hash([example(question=other)])


class Quiet:
    """Its repr is the same whatever it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        return "Quiet()"


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Slotted()"


@dataclasses.dataclass
class Record:
    name: str
    hidden: int = dataclasses.field(default=0, repr=False)


class Text(str):
    note: str


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


Point = collections.namedtuple("Point", "x y")


def array(position: int | None, value: float = 1.0) -> np.ndarray[Any, Any]:
    numbers = np.zeros(5000)
    if position is not None:
        numbers[position] = value
    return numbers


def image(last: str) -> dspy.Image:
    return dspy.Image("data:image/png;base64," + "A" * 5000 + last + "==")


def itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "long arrays": (lambda: array(2500), lambda: array(2501)),
    "array dtypes": (lambda: np.zeros(2, np.float32), lambda: np.zeros(2, np.int32)),
    "array shapes": (lambda: np.zeros((2, 3)), lambda: np.zeros((3, 2))),
    "arrays of objects": (lambda: np.array([{"a": 1}], object), lambda: np.array([{"a": 2}], object)),
    "long images": (lambda: image("A"), lambda: image("B")),
    "models": (lambda: Passage(title="x"), lambda: Passage(title="y")),
    "dataclasses": (lambda: Record("a", 1), lambda: Record("a", 2)),
    "objects of one repr": (lambda: Quiet(1), lambda: Quiet(2)),
    "objects in objects": (lambda: Quiet([Quiet(array(1))]), lambda: Quiet([Quiet(array(2))])),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "sets": (lambda: {"a", "b", "c"}, lambda: {"a", "b", "d"}),
    "bytes": (lambda: b"a" * 99, lambda: b"a" * 98 + b"b"),
    "bytes and text": (lambda: b"a", lambda: "a"),
    "True, 1 and 1.0": (lambda: True, lambda: 1),
    "1 and 1.0": (lambda: 1, lambda: 1.0),
    "NaN and None": (lambda: math.nan, lambda: None),
    "lists and tuples": (lambda: [1, 2], lambda: (1, 2)),
    "how lists are nested": (lambda: [[1], [2]], lambda: [[1, 2]]),
    "the order of a dict": (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
    "kinds of key": (lambda: {1: "x"}, lambda: {"1": "x"}),
    "members of an enum": (lambda: Color.RED, lambda: Color.BLUE),
    "named tuples": (lambda: Point(1, 2), lambda: Point(1, 3)),
    "dates": (lambda: datetime.date(2026, 1, 1), lambda: datetime.date(2026, 1, 2)),
    "decimals": (lambda: decimal.Decimal("1.0"), lambda: decimal.Decimal("1.00")),
    "paths": (lambda: pathlib.Path("a"), lambda: pathlib.Path("b")),
    "patterns": (lambda: re.compile("a"), lambda: re.compile("a", re.IGNORECASE)),
    "texts of a class": (lambda: Text("a"), lambda: Text("b")),
    "functions": (lambda: lambda: 1, lambda: lambda: 2),
    "views of dicts": (lambda: types.MappingProxyType({"a": 1}), lambda: types.MappingProxyType({"a": 2})),
    "views of bytes": (lambda: memoryview(b"a"), lambda: memoryview(b"b")),
    "partials": (lambda: functools.partial(int, base=2), lambda: functools.partial(int, base=3)),
    "types": (lambda: list[int], lambda: list[str]),
    "examples": (lambda: example(question="a"), lambda: example(question="b")),
    "long texts": (lambda: "x" * 10**6, lambda: "x" * (10**6 - 1) + "y"),
}


@pytest.mark.parametrize("what", list(DIFFERENT))
def test_content_is_told_apart_and_the_same_content_is_the_same(what: str) -> None:
    one, other = DIFFERENT[what]
    if what not in ("functions",):
        assert fingerprint(one()) == fingerprint(one())
        assert fingerprint(other()) == fingerprint(other())
    assert fingerprint(one()) != fingerprint(other())
    assert example_key(example(question=one())) != example_key(example(question=other()))


def test_data_frames_are_told_apart_by_every_cell() -> None:
    pandas = pytest.importorskip("pandas")

    def frame(value: int) -> Any:
        return pandas.DataFrame({"a": range(500), "b": ["x"] * 499 + [str(value)]})

    assert fingerprint(frame(1)) == fingerprint(frame(1))
    assert fingerprint(frame(1)) != fingerprint(frame(2))


def test_the_order_of_an_examples_fields_does_not_matter_but_which_are_inputs_does() -> None:
    one = dspy.Example(question="a", answer="b").with_inputs("question")
    assert example_key(one) == example_key(dspy.Example(answer="b", question="a").with_inputs("question"))
    assert example_key(one) != example_key(one.with_inputs("question", "answer"))


def test_a_prediction_goes_by_its_fields() -> None:
    one, same, other = (dspy.Prediction(score=score) for score in (1.0, 1.0, 0.5))
    assert fingerprint([one]) == fingerprint([same])
    assert fingerprint([one]) != fingerprint([other])


def test_what_holds_itself_has_a_fingerprint() -> None:
    assert fingerprint(itself()) == fingerprint(itself())
    assert fingerprint(itself()) != fingerprint([[]])


def test_what_is_nested_too_deep_is_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DataError, match="nested too deep"):
        fingerprint(deep)


def test_what_has_no_content_to_see_is_said_to_have_none() -> None:
    assert example_content(example(question=1))[1] is True
    assert example_content(example(question=[threading.Lock()]))[1] is False
    assert fingerprint(threading.Lock()) == fingerprint(threading.Lock())


PRINTED = """
import numpy as np, re, datetime, enum, dspy
from bettertogether.programs.content import fingerprint
print(fingerprint([{"a", "b", "c"}, np.arange(3), re.compile("a"), datetime.date(2026, 1, 1), frozenset({(1, "x")}),
                   dspy.Example(a=1, b={"x"}).with_inputs("a"), lambda x: x in {"a", "b", "c"}]))
"""


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINTED],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1


def test_attempts_are_told_apart_by_the_content_of_the_label() -> None:
    keys = {Attempt("rescue", 1, 1.0, {"answer": value}).key for value in (Quiet(1), Quiet(2), array(1), array(2))}
    assert len(keys) == 4
    assert Attempt("rescue", 1, 1.0, {"answer": Quiet(1)}).key == Attempt("rescue", 1, 1.0, {"answer": Quiet(1)}).key


class Total(dspy.Module):
    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self.say = dspy.Predict("number: int -> parity")
        self.say.lm = plain_lm(engine)

    def forward(self, numbers: Any) -> dspy.Prediction:
        return self.say(number=int(sum(numbers)))


def test_runs_are_shared_by_the_whole_content_of_the_inputs() -> None:
    engine = parity_engine(lambda request, number: True)
    runner = Runner(Total(engine), store=RolloutStore())
    answers = [
        runner.run(dspy.Example(numbers=array(2500, value)).with_inputs("numbers")).prediction.parity
        for value in (1, 2, 3, 2)
    ]
    assert answers == ["odd", "even", "odd", "even"]
    assert len(engine.requests) == 3


def test_a_run_on_inputs_whose_content_cannot_be_seen_is_not_shared() -> None:
    engine = parity_engine(lambda request, number: True)
    runner = Runner(Total(engine), store=RolloutStore())
    for parts in ([1], [2]):
        one = dspy.Example(numbers=(n for n in parts)).with_inputs("numbers")
        assert runner.run(one).prediction.parity == ("odd" if parts == [1] else "even")
