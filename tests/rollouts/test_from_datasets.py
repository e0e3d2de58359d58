"""Examples from a `datasets.Dataset`: fields, inputs, labels, and what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import dspy
import pytest
from fakes import parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, evaluate, examples_from, stratified_split
from bettertogether.errors import DataError


def questions() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"q": "one?", "answer": "1", "level": 0}, {"q": "two?", "answer": "2", "level": 1}]
    )


def labelled(*labels: int) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    return datasets.Dataset.from_list([{"text": f"{n}", "label": label} for n, label in enumerate(labels)], features)


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        examples_from(*arguments, **options)
    return str(caught.value)


def test_each_row_is_an_example_with_a_field_a_column_in_order() -> None:
    assert examples_from(questions(), inputs=["q", "level"]) == [
        dspy.Example(q="one?", answer="1", level=0).with_inputs("q", "level"),
        dspy.Example(q="two?", answer="2", level=1).with_inputs("q", "level"),
    ]


def test_a_field_may_have_another_name_than_its_column() -> None:
    examples = examples_from(questions(), inputs=("question",), columns={"question": "q"})
    assert [example.toDict() for example in examples][1] == {"question": "two?", "answer": "2", "level": 1}
    assert [dict(example.inputs()) for example in examples] == [{"question": "one?"}, {"question": "two?"}]


def test_a_column_may_have_the_name_of_an_argument_of_dspys_example() -> None:
    (example,) = examples_from(datasets.Dataset.from_dict({"self": ["a"], "base": ["b"]}), inputs=["self"])
    assert example.toDict() == {"self": "a", "base": "b"}


@pytest.mark.parametrize("name", ["labels", "inputs", "items", "_store"])
def test_a_field_that_dspys_example_has_itself_is_refused_with_another_name(name: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], name: ["joy"]})
    assert refused(rows, ["text"]) == (
        f"Field {name!r} is not allowed: dspy.Example has an attribute of that name, so example.{name} would "
        f"not be the column. Give another name with columns={{'{name}_': {name!r}}}."
    )
    assert f"name with columns={{'keys_': {name!r}}}." in refused(rows, ["text"], columns={"keys": name})
    (example,) = examples_from(rows, ["text"], columns={f"{name}_": name})
    assert example.toDict() == {"text": "a", f"{name}_": "joy"}


def test_two_columns_may_change_names() -> None:
    examples = examples_from(questions(), inputs=["answer"], columns={"answer": "q", "q": "answer"})
    assert examples[0].toDict() == {"answer": "one?", "q": "1", "level": 0}


def test_class_labels_are_names_and_none_where_a_row_has_none() -> None:
    examples = examples_from(labelled(1, 0, -1), inputs=["text"])
    assert [example.label for example in examples] == ["pos", "neg", None]


def test_class_labels_in_lists_and_structs_are_names_too() -> None:
    label = datasets.ClassLabel(names=["neg", "pos"])
    columns = {"text": datasets.Value("string"), "tags": datasets.List(label), "mood": [{"kind": label, "size": label}]}
    rows = [
        {"text": "a", "tags": [1, None, 0], "mood": [{"kind": 1, "size": -1}]},
        {"text": "b", "tags": None, "mood": []},
    ]
    one, two = examples_from(datasets.Dataset.from_list(rows, datasets.Features(columns)), inputs=["text"])
    assert (one.tags, one.mood) == (["pos", None, "neg"], [{"kind": "pos", "size": None}])
    assert (two.tags, two.mood) == (None, [])


def test_values_are_plain_whatever_the_format_of_the_dataset() -> None:
    example = examples_from(questions().with_format("numpy"), inputs=["q"])[0]
    assert [type(value) for value in example.toDict().values()] == [str, str, int]


def test_nested_columns_stay_as_they_are() -> None:
    rows = [{"q": "one?", "facts": {"title": ["A", "B"], "sent_id": [0, 1]}}]
    example = examples_from(datasets.Dataset.from_list(rows), inputs=["q"])[0]
    assert example.facts == {"title": ["A", "B"], "sent_id": [0, 1]}


def test_a_split_is_named_where_there_are_several() -> None:
    splits = datasets.DatasetDict({"train": questions(), "test": questions().select([1])})
    assert [example.q for example in examples_from(splits, inputs=["q"], split="test")] == ["two?"]
    assert refused(splits, ["q"], split="dev") == ("split='dev' is not in the dataset: give one of ['train', 'test'].")
    assert refused(splits, ["q"]) == "split=None is not in the dataset: give one of ['train', 'test']."
    assert refused(questions(), ["q"], split="train") == (
        "split='train' was given, but the dataset is one split already: leave split= out."
    )


def test_a_missing_input_column_is_named_with_those_there_are() -> None:
    assert refused(questions(), inputs=["question"]) == (
        "inputs=['question']: there is no column 'question', the dataset has ['answer', 'level', 'q']. Where it has "
        "another name, give columns={'question': its name}."
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"question": "query"}, "there is no such column, the dataset has ['q', 'answer', 'level']."),
        ({"answer": "q"}, "Field 'answer' would be column 'q', but there is a column 'answer' too"),
        (["q"], "columns=['q'] is not allowed: give a dict from a field to its column."),
    ],
)
def test_columns_that_can_t_be_are_refused(columns: Any, words: str) -> None:
    assert words in refused(questions(), inputs=["q"], columns=columns)


@pytest.mark.parametrize("inputs", ["q", [], None])
def test_inputs_are_a_list_of_names(inputs: Any) -> None:
    assert refused(questions(), inputs=inputs) == (
        f'inputs={inputs!r} is not allowed: give a list of field names, such as ["question"].'
    )


def test_a_stream_and_what_is_no_dataset_are_refused() -> None:
    assert "dataset is a IterableDataset, which may have no end" in refused(questions().to_iterable_dataset(), ["q"])
    assert refused([{"q": "one?"}], ["q"]) == (
        "dataset is a list: give a datasets.Dataset, or a DatasetDict and split=."
    )


@pytest.mark.parametrize("name", ["trainset", "valset", "step", "evaluate", "split"])
def test_a_dataset_in_place_of_examples_is_refused_with_the_way_to_make_them(name: str) -> None:
    student = parity_program(parity_engine(lambda request, number: True))
    rows = datasets.Dataset.from_list([{"number": n, "parity": "even"} for n in range(0, 20, 2)])
    examples = examples_from(rows, inputs=["number"])
    calls = {
        "trainset": lambda: BetterTogether(parity_match).compile(student, trainset=rows),
        "valset": lambda: BetterTogether(parity_match).compile(student, trainset=examples, valset=rows),
        "step": lambda: LoRAFinetune(parity_match).compile(student, trainset=rows),
        "evaluate": lambda: evaluate(student, rows, parity_match),
        "split": lambda: stratified_split(rows, 2, 0),
    }
    with pytest.raises(DataError, match=r"is a datasets.Dataset, .* give bettertogether.examples_from\(dataset, inp"):
        calls[name]()


def test_a_program_is_compiled_on_what_comes_of_a_dataset() -> None:
    rows = datasets.Dataset.from_list([{"n": n, "parity": ["even", "odd"][n % 2]} for n in range(20)])
    examples = examples_from(rows, inputs=["number"], columns={"number": "n"})
    student = parity_program(parity_engine(lambda request, number: request.demos > 0))
    p = BootstrapFewShotRS(parity_match)
    compiled = BetterTogether(parity_match, p=p).compile(student, trainset=examples, strategy="p", progress=False)
    assert [round_.score for round_ in compiled.report.rounds] == [0.0, 1.0]
