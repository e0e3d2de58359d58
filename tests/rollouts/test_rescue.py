"""A run that failed is tried again with its label as a hint, and becomes a row that knows nothing of the hint."""

from __future__ import annotations

import enum
import json
import math
from typing import Any, Literal, Optional

import dspy
import numpy as np
import pytest
from fakes import numbers, parity_engine, parity_match, parity_program, plain_lm, reply
from typing_extensions import TypeAliasType

from bettertogether.rollouts.rescue import as_field, hint_for, hint_of, narrow_signatures
from bettertogether.steps.rows_from_traces import Collected
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine, FakeRequest


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


LABELS: list[Any] = [
    (float, 3, 3.0),
    (float, "3.5", 3.5),
    (int, "18", 18),
    (int, 18.0, 18),
    (int, 3.7, 3.7),
    (int, "many", "many"),
    (str, 18, "18"),
    (str, True, "True"),
    (str, Color.RED, "red"),
    (bool, "yes", True),
    (bool, 0, False),
    (Literal["positive", "negative"], "Positive", "positive"),
    (Literal["positive", "negative"], " negative\n", "negative"),
    (Literal["positive", "negative"], "neutral", "neutral"),
    (Literal[1, 2, 3], "2", 2),
    (Literal["1", 1], 1, 1),
    (Color, "red", Color.RED),
    (Color, "BLUE", Color.BLUE),
    (Color, Color.BLUE, Color.BLUE),
    (Level, 2, Level.HIGH),
    (Optional[float], 3, 3.0),  # noqa: UP045
    (float | None, "4", 4.0),
    (str | None, 18, "18"),
    (Literal["a", "b"] | None, "A", "a"),
    (int | str, 5, 5),
    (TypeAliasType("Sentiment", Literal["a", "b"]), "A", "a"),
    (Optional[TypeAliasType("Sentiment", Literal["a", "b"])], "A", "a"),  # noqa: UP045
    (list[str], ["a"], ["a"]),
    (list[float], [1, "2"], [1.0, 2.0]),
    (Any, 5, 5),
]


@pytest.mark.parametrize(("annotation", "label", "expected"), LABELS)
def test_a_label_is_brought_to_the_fields_type(annotation: Any, label: Any, expected: Any) -> None:
    found = as_field(label, annotation)
    assert (type(found), found) == (type(expected), expected)


def program_of(annotation: Any, engine: FakeEngine) -> dspy.Predict:
    fields = {"q": (str, dspy.InputField()), "y": (annotation, dspy.OutputField())}
    program = dspy.Predict(dspy.Signature(fields, "Do it."))
    program.set_lm(plain_lm(engine))
    return program


@pytest.mark.parametrize(
    ("annotation", "label", "narrowed"),
    [
        (str, "odd", Literal["odd"]),
        (str, 18, Literal["18"]),
        (str, "half an emoji \ud83d", str),
        (int, "18", Literal[18]),
        (bool, "yes", Literal[True]),
        (Literal["odd", "even"], "odd", Literal["odd"]),
        (Literal["odd", "even"], "Odd", Literal["odd", "Odd"]),
        (Literal["odd", "even"], "neither", Literal["odd", "even"]),
        (int, "many", int),
        (float, 3, float),
        (Color, "red", Color),
        (list[str], ["a"], list[str]),
    ],
)
def test_a_field_is_narrowed_to_the_label_where_its_type_can_be(annotation: Any, label: Any, narrowed: Any) -> None:
    program = program_of(annotation, FakeEngine(lambda _: ""))
    narrow_signatures({"p": program}, {"y": label})
    assert program.signature.output_fields["y"].annotation == narrowed


def test_a_label_that_comes_again_has_the_signature_that_was_made_for_it() -> None:
    first = program_of(int, FakeEngine(lambda _: "")).signature

    def narrowed(label: Any) -> Any:
        program = dspy.Predict(first)
        narrow_signatures({"p": program}, {"y": label})
        return program.signature

    assert narrowed(1) is narrowed(1)
    assert narrowed(True) is not narrowed(1)
    assert narrowed([1]) is not narrowed([1])


def test_the_hint_shows_the_value_as_the_field_has_it() -> None:
    program = program_of(float, FakeEngine(lambda _: ""))
    narrow_signatures({"p": program}, {"y": 3})
    assert program.signature.instructions == f"Do it.\n\n{hint_of({'y': 3.0})}"
    program = program_of(float, FakeEngine(lambda _: ""))
    narrow_signatures({"p": program}, {"answered_by_none": 3})
    assert program.signature.instructions == f"Do it.\n\n{hint_of({'answered_by_none': 3})}"
    assert hint_of({"y": np.int64(3)}) == "The right final result is known: `y` = 3. Write what leads to it."
    assert hint_of({"y": Color.RED}) == "The right final result is known: `y` = 'red'. Write what leads to it."


def rescued(annotation: Any, label: Any, wrong: Any) -> Collected:
    """The rows of a student that answers rightly only with the hint, as it is spelt in the hint."""

    def answer(request: FakeRequest) -> str:
        hint = request.system.partition("result is known: `y` = ")[2].partition(". Write what")[0]
        return reply(request, y=json.loads(hint.replace("'", '"').lower()) if hint else wrong)

    def lenient(example: Any, prediction: Any, trace: Any = None) -> bool:
        given = prediction.y.value if isinstance(prediction.y, enum.Enum) else prediction.y
        return str(given).lower() == str(as_field(example.y, type(given))).lower() or given == example.y

    examples = [dspy.Example(q="a", y=label).with_inputs("q")]
    return LoRAFinetune(lenient, num_samples=0).collect(program_of(annotation, FakeEngine(answer)), trainset=examples)


@pytest.mark.parametrize(
    ("annotation", "label", "wrong", "shown"),
    [
        (float, 3, 99.5, "3.0"),
        (int, "18", 1, "18"),
        (str, 18, "x", "18"),
        (bool, "true", False, "True"),
        (Literal["positive", "negative"], "Positive", "negative", "positive"),
        (Color, "red", "blue", "red"),
        (float | None, 4, 1.0, "4.0"),
    ],
)
def test_a_rescued_run_is_a_row_with_the_label_as_the_field_writes_it(
    adapter: dspy.Adapter, annotation: Any, label: Any, wrong: Any, shown: str
) -> None:
    (row,) = rescued(annotation, label, wrong).rows
    assert row.source == "rescue"
    assert shown.lower() in row.completion.lower()
    assert "is known" not in repr(row.messages)


def test_an_answer_in_the_labels_own_spelling_is_a_row_in_the_fields_spelling() -> None:
    def answer(request: FakeRequest) -> str:
        return reply(request, y="Positive" if "is known" in request.system else "negative")

    def lenient(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(example.y.lower() == prediction.y.lower())

    program = program_of(Literal["positive", "negative"], FakeEngine(answer))
    examples = [dspy.Example(q="a", y="Positive").with_inputs("q")]
    (row,) = LoRAFinetune(lenient, num_samples=0).collect(program, trainset=examples).rows
    assert row.completion == "[[ ## y ## ]]\npositive\n\n[[ ## completed ## ]]\n"


@pytest.mark.parametrize(("annotation", "wrong"), [(int | None, 1), (Literal["a", None], "a")])
def test_none_is_a_label_where_it_is_a_value_of_the_field(annotation: Any, wrong: Any) -> None:
    def answer(request: FakeRequest) -> str:
        return reply(request, y=None if "is known: `y` = None." in request.system else wrong)

    def same(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(example.y == prediction.y)

    examples = [dspy.Example(q="a", y=None).with_inputs("q")]
    program = program_of(annotation, FakeEngine(answer))
    (row,) = LoRAFinetune(same, num_samples=0).collect(program, trainset=examples).rows
    assert (row.source, row.completion) == ("rescue", "[[ ## y ## ]]\nNone\n\n[[ ## completed ## ]]\n")


def test_none_is_no_label_of_a_field_that_has_no_such_value() -> None:
    program = program_of(str, FakeEngine(lambda request: "a"))
    assert hint_for(program, dspy.Example(q="a", y=None, x=None), ["y", "x"]) == {}
    assert hint_for(program, dspy.Example(q="a", y=math.nan), ["y"]) == {}


def test_the_hint_is_of_the_fields_that_the_program_answers() -> None:
    engine = parity_engine(lambda *_: False)
    examples = [dspy.Example(id=7, level="hard", number=1, parity="odd").with_inputs("number")] * 2
    with pytest.raises(RuntimeError, match="No training rows"):
        LoRAFinetune(parity_match, num_samples=0).collect(parity_program(engine), trainset=examples)
    hints = [request.system.partition("is known: ")[2] for request in engine.requests if "is known" in request.system]
    assert set(hints) == {"`parity` = 'odd'. Write what leads to it."}


def test_labels_are_those_of_the_fields_that_the_program_answers() -> None:
    examples = [dspy.Example(level="hard", **example).with_inputs("number") for example in numbers(6)]
    examples[0].level = "easy"
    card = LoRAFinetune(parity_match).collect(parity_program(parity_engine(lambda *_: True)), trainset=examples).card
    assert card.kept_by_label == {"even": 3, "odd": 3}


def test_a_label_declared_as_an_input_is_no_label_and_a_warning_says_so() -> None:
    examples = [example.with_inputs("number", "parity") for example in numbers(4)]
    collected = LoRAFinetune(parity_match).collect(parity_program(parity_engine(lambda *_: True)), trainset=examples)
    assert collected.card.kept_by_label == {}
    assert collected.card.warnings == (
        "['parity'] of the trainset are declared as inputs, though the program answers them: they are not taken for "
        "labels, so nothing is rescued or balanced. Leave them out of with_inputs(...).",
    )
