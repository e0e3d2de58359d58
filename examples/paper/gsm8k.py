"""The paper's GSM8K: ChainOfThought("question -> answer") (section 5), by all eight strategies beside Table 1.

    pip install '.[structured,examples]'
    python examples/paper/gsm8k.py --model meta-llama/Meta-Llama-3-8B-Instruct

Problems: openai/gsm8k from the hub; or `--data FOLDER` with its files (`main/train-00000-of-00001.parquet` and
`main/test-00000-of-00001.parquet`); or `--data reasoning-gym`, problems of the same style that the package of that name
makes (gsm_symbolic; pip install reasoning-gym): these are not the paper's, so neither are their scores.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from decimal import Decimal

import datasets
import dspy
from experiment import Task, parser, run
from hub import parts, rows_of

from bettertogether import examples_from

HUB_ID = "openai/gsm8k"
GYM = "reasoning-gym"
NUMBER = re.compile(r"(?:(?<![\w)\]}%])([-\u2212])\\?[$€£]?)?(\d[\d,]*(?:\.\d+)?)")
"""A minus (hyphen or U+2212), which stands before a currency too, and the number. After a number, word or bracket it is
no sign: "2-3"."""


def final_number(text: str) -> Decimal | None:
    """The last number in a text."""
    found = NUMBER.findall(text)
    if not found:
        return None
    sign, digits = found[-1]
    return Decimal(("-" if sign else "") + digits.replace(",", ""))


def same_number(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether the final number of the answer is that of the label."""
    return final_number(str(prediction.answer)) == final_number(example.answer)


TASK = Task("GSM8K", same_number, "final number right", (1000, 500, 1319))


def load(options: argparse.Namespace) -> list[datasets.Dataset]:
    """Rows to train on, to choose on and of the test."""
    train, dev, test = TASK.limited(options.limit)
    if options.data == GYM:
        return parts(_gym_rows(train + dev + test), (train, dev, test))
    learning, testing = (
        rows_of(HUB_ID, "main", split, options.data, ("question", "answer")) for split in ("train", "test")
    )
    return [*parts(learning, (train, dev)), *parts(testing, (test,))]


def _gym_rows(count: int) -> datasets.Dataset:
    """Different problems."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise SystemExit(f"--data {GYM} needs the package: pip install reasoning-gym. ({error})") from error
    made: dict[str, str] = {}
    seed = 0
    while len(made) < count:
        for item in reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed):
            made.setdefault(item["question"], item["answer"])
        seed += 1
    return datasets.Dataset.from_dict({"question": list(made)[:count], "answer": list(made.values())[:count]})


def examples(rows: datasets.Dataset) -> list[dspy.Example]:
    """The answer is what stands after "####", where the hub has the way to it before."""
    made = examples_from(rows, inputs=["question"])
    for example in made:
        example.answer = str(example.answer).rpartition("####")[2].strip()
        if final_number(example.answer) is None:
            raise SystemExit(
                f"The problem {example.question[:80]!r} has the answer {example.answer[:80]!r}, which has no number: "
                'give answers as GSM8K has them, such as "7 + 5 = 12 #### 12".'
            )
    return made


def main(arguments: Sequence[str] | None = None, lm: dspy.LM | None = None) -> str:
    """Run the script; `lm` instead of the model."""
    options = parser(TASK, __doc__).parse_args(arguments)
    train, dev, test = map(examples, load(options))
    return run(TASK, options, dspy.ChainOfThought("question -> answer"), (train, dev, test), lm)


if __name__ == "__main__":
    main()
