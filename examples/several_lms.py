"""Two models in one program: a big one that stays as it is, and a small one that is trained.

    python examples/several_lms.py --big Qwen/Qwen2.5-1.5B-Instruct

Shows an LM for each predictor, and `frozen=`: the weight step leaves those predictors' weights alone, the prompt step
may still give them demos. A predictor whose LM is an API is left alone without being named.

Hardware: a GPU for the big model above; its scores are not measured yet. It has to be able to summarise: with
Gemma-3-270M, a base model, in its place (10 minutes on one core of a 2.5 GHz server), nothing of a message reaches the
small model, and 0.333 of the test are right before and after.
"""

from __future__ import annotations

import argparse

import dspy
from tasks import Route, team_match, ticket_data

from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    compare,
    default_model,
    evaluate,
    local_lm,
)


class SummariseThenRoute(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.summarise = dspy.Predict("message -> problem: str")
        self.route = dspy.Predict(Route)

    def forward(self, text: str) -> dspy.Prediction:
        return self.route(text=self.summarise(message=text).problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of another small model")
    parser.add_argument("--big", default="Qwen/Qwen2.5-1.5B-Instruct", help="folder or hub id of the big model")
    parser.add_argument("--limit", type=int, help="messages to use at most")
    arguments = parser.parse_args()

    dspy.configure(adapter=dspy.JSONAdapter())
    program = SummariseThenRoute()
    program.summarise.lm = local_lm(arguments.big, max_tokens=64)
    program.route.lm = local_lm(arguments.model or default_model(), max_tokens=64)
    trainset, valset, testset = ticket_data(arguments.limit)

    before = evaluate(program, testset, team_match)
    compiled = BetterTogether(
        team_match,
        p=BootstrapFewShotRS(team_match),
        w=LoRAFinetune(team_match, frozen=["summarise"]),
    ).compile(program, trainset=trainset, valset=valset)
    after = evaluate(compiled, testset, team_match)
    print(compiled.report)
    for name, predictor in compiled.named_predictors():
        print(f"{name}: {predictor.lm.model}")
    print(f"\nOn {len(testset)} other messages:\n{compare({'untouched': before, 'compiled': after})}")


if __name__ == "__main__":
    main()
