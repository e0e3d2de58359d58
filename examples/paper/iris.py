"""The paper's Iris: the species of a flower from four lengths (section 5), by all eight strategies beside Table 1.

    pip install '.[structured,examples]'
    python examples/paper/iris.py --adapter json --max-tokens 96 --settings default

The 150 flowers come with scikit-learn; or `--data Iris.csv`, the file of scikit-learn/iris on the hub.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import dspy
from experiment import Task, exact_match, parser, run
from hub import rows_of

from bettertogether import examples_from, stratified_split

TASK = Task("Iris", exact_match, "exact match", (50, 50, 50), (15, 35))
FIELDS = {
    "petal_length": "PetalLengthCm",
    "petal_width": "PetalWidthCm",
    "sepal_length": "SepalLengthCm",
    "sepal_width": "SepalWidthCm",
    "answer": "Species",
}
"""Fields of the program to columns on the hub."""


class Iris(dspy.Signature):
    """Given the petal and sepal dimensions in cm, predict the iris species."""

    petal_length: float = dspy.InputField()
    petal_width: float = dspy.InputField()
    sepal_length: float = dspy.InputField()
    sepal_width: float = dspy.InputField()
    answer: str = dspy.OutputField(desc="setosa, versicolor, or virginica")


def flowers(data: str | None) -> list[dspy.Example]:
    """All flowers, from a file or with scikit-learn."""
    columns = tuple(FIELDS.values())
    rows = rows_of("scikit-learn/iris", None, "train", data, columns) if data else _from_sklearn()
    examples = examples_from(rows, [name for name in FIELDS if name != "answer"], columns=FIELDS)
    for example in examples:
        example.answer = example.answer.removeprefix("Iris-")
    return examples


def _from_sklearn() -> datasets.Dataset:
    try:
        from sklearn.datasets import load_iris
    except ImportError as error:
        raise SystemExit("The flowers come with scikit-learn: pip install 'bettertogether[examples]'.") from error
    bunch = load_iris()
    names = ("SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm", "Species")
    species = [str(bunch.target_names[target]) for target in bunch.target]
    return datasets.Dataset.from_dict(dict(zip(names, [*bunch.data.T.tolist(), species], strict=True)))


def main(arguments: Sequence[str] | None = None, lm: dspy.LM | None = None) -> str:
    """Run the script; `lm` instead of the model."""
    options = parser(TASK, __doc__).parse_args(arguments)
    train_size, dev_size, test_size = TASK.limited(options.limit)
    found = flowers(options.data)
    if len(found) < train_size + dev_size + test_size:
        raise SystemExit(
            f"There are {len(found)} flowers for {train_size} + {dev_size} + {test_size}: give all 150 of the "
            "hub's file, or a lower --limit."
        )
    train, rest = stratified_split(found, train_size, 0)
    dev, test = stratified_split(rest, dev_size, 0)
    return run(TASK, options, dspy.ChainOfThought(Iris), (train, dev, test[:test_size]), lm)


if __name__ == "__main__":
    main()
