"""The paper's Iris program (section 5) on the default model: ChainOfThought, 50/50/50 flowers.

    pip install 'torch==2.13.*' '.[structured]' scikit-learn && python examples/iris.py

Hard for 135M parameters: most of what there is to gain here needs a larger `--model`.
"""

from __future__ import annotations

import argparse
from typing import Any

import dspy
from tasks import Iris, iris_data, iris_match

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    TrainingConfig,
    compare,
    default_model,
    evaluate,
    local_lm,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder or hub id of another model")
    parser.add_argument("--strategy", default="p -> w -> p")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--paper", action="store_true", help="the paper's settings for both steps")
    arguments = parser.parse_args()

    lm = local_lm(arguments.model or default_model(), max_tokens=arguments.max_tokens)
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(adapter=dspy.JSONAdapter())
    trainset, valset, testset = iris_data(arguments.seed)
    student = dspy.ChainOfThought(Iris)
    student.set_lm(lm)

    sizes: dict[str, Any] = {"train_size": 15, "val_size": 35}
    if arguments.paper:
        steps = {"p": BootstrapFewShotRS.paper(iris_match, **sizes), "w": LoRAFinetune.paper(iris_match)}
    else:
        training = TrainingConfig(learning_rate=3e-4)
        steps = {"p": BootstrapFewShotRS(iris_match, **sizes), "w": LoRAFinetune(iris_match, training=training)}
    before = evaluate(student, testset, iris_match, phase="test the untouched program")
    compiled = BetterTogether(iris_match, **steps).compile(
        student, trainset=trainset, valset=valset, strategy=arguments.strategy, seed=arguments.seed
    )
    after = evaluate(compiled, testset, iris_match, phase="test the compiled program")
    print(compiled.report)
    print(f"\nOn {len(testset)} test flowers:\n{compare({'untouched': before, 'compiled': after})}")


if __name__ == "__main__":
    main()
