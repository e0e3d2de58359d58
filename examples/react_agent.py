"""An agent that uses tools: dspy.ReAct, whose every thought and tool call is learned from the answers that were right.

    python examples/react_agent.py --model Qwen/Qwen2.5-1.5B-Instruct

Shows that an agent is optimized as it is: the metric sees the final answer alone, and of each run that gave the right
one, all turns become training rows. An agent needs a model that follows instructions: with the default of 135M
parameters hardly a run succeeds.

Hardware: a GPU for the model above; minutes and scores are not measured yet. (135M parameters on one core of a 2.5 GHz
server need 12 minutes for the 24 questions of one evaluation alone, as each turn writes all of its 160 tokens.)
"""

from __future__ import annotations

import argparse
import random

import dspy

from bettertogether import BetterTogether, compare, default_model, evaluate, local_lm

PRICES = {"lamp": 12, "chair": 45, "desk": 130, "rug": 38, "clock": 9, "shelf": 64}


def price(item: str) -> int:
    """The price of one item, in crowns."""
    return PRICES[item]


def multiply(a: int, b: int) -> int:
    """The product of two numbers."""
    return a * b


class Buy(dspy.Signature):
    """Say what the purchase costs."""

    question: str = dspy.InputField()
    cost: int = dspy.OutputField(desc="in crowns")


def purchases(number: int, seed: int) -> list[dspy.Example]:
    """Questions with their answers, no two alike."""
    pairs = [(item, count) for item in PRICES for count in range(2, 31)]
    return [
        dspy.Example(question=f"What do {count} pieces of {item} cost?", cost=count * PRICES[item]).with_inputs(
            "question"
        )
        for item, count in random.Random(seed).sample(pairs, number)
    ]


def match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.cost == prediction.cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of another model")
    parser.add_argument(
        "--limit", type=int, default=24, help="questions for each of training, validation and test, at most 58"
    )
    arguments = parser.parse_args()

    dspy.configure(adapter=dspy.JSONAdapter())
    agent = dspy.ReAct(Buy, tools=[price, multiply], max_iters=4)
    agent.set_lm(local_lm(arguments.model or default_model(), max_tokens=160))
    size = arguments.limit
    examples = purchases(3 * size, seed=0)
    trainset, valset, testset = examples[:size], examples[size : 2 * size], examples[2 * size :]

    before = evaluate(agent, testset, match)
    compiled = BetterTogether(match).compile(agent, trainset=trainset, valset=valset)
    after = evaluate(compiled, testset, match)
    print(compiled.report)
    print(f"\nOn {len(testset)} other purchases:\n{compare({'untouched': before, 'compiled': after})}")
    for name, value in compiled(question=testset[0].question).trajectory.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
