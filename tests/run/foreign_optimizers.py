"""Each of DSPy's optimizers, as small as it goes."""

from __future__ import annotations

from typing import Any

import dspy
import numpy as np
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import numbers, parity_match

TRAIN = numbers(16)


def gepa_metric(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> float:
    return float(gold.parity == pred.parity)


def letters(texts: Any) -> np.ndarray[Any, Any]:
    """An embedder: how often each digit occurs."""
    return np.array([[float(text.count(str(digit))) for digit in range(10)] for text in texts])


def foreign(name: str, lm: Any = None) -> Teleprompter:
    """Each of DSPy's optimizers, as small as it goes."""
    if name == "LabeledFewShot":
        return dspy.LabeledFewShot(k=2)
    if name == "BootstrapFewShot":
        return dspy.BootstrapFewShot(metric=parity_match, max_bootstrapped_demos=2, max_labeled_demos=1, max_rounds=2)
    if name == "BootstrapFewShotWithRandomSearch":
        return dspy.BootstrapFewShotWithRandomSearch(
            metric=parity_match, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=2
        )
    if name == "KNNFewShot":
        return dspy.KNNFewShot(k=2, trainset=TRAIN, vectorizer=letters, metric=parity_match)
    if name == "COPRO":
        return dspy.COPRO(metric=parity_match, breadth=3, depth=1)
    if name == "MIPROv2":
        pytest.importorskip("optuna")
        return dspy.MIPROv2(metric=parity_match, auto=None, num_candidates=2, prompt_model=lm, task_model=lm)
    if name == "SIMBA":
        return dspy.SIMBA(metric=parity_match, bsize=8, num_candidates=2, max_steps=2, max_demos=2)
    if name == "InferRules":
        return dspy.InferRules(metric=parity_match, num_candidates=1, num_rules=2, max_bootstrapped_demos=1)
    if name == "GEPA":
        return dspy.GEPA(metric=gepa_metric, max_metric_calls=40, reflection_lm=lm)
    if name == "BootstrapFinetune":
        return dspy.BootstrapFinetune(metric=parity_match)
    raise AssertionError(name)


PROMPT_OPTIMIZERS = (
    "LabeledFewShot",
    "BootstrapFewShot",
    "BootstrapFewShotWithRandomSearch",
    "COPRO",
    "MIPROv2",
    "SIMBA",
    "InferRules",
    "GEPA",
)


OVERRIDES: dict[str, dict[str, Any]] = {
    "MIPROv2": {"num_trials": 2, "minibatch": False, "max_bootstrapped_demos": 1, "max_labeled_demos": 1},
    "COPRO": {"eval_kwargs": {"num_threads": 4, "display_progress": False}},
}
