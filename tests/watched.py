"""Programs and helpers of the tests of watched calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
from fakes import Parity, numbers, parity_engine, parity_match, plain_lm

from bettertogether.rollouts.rollout import Rollout
from bettertogether.rollouts.runner import Runner
from bettertogether.steps.rows import Row
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine

ALWAYS = parity_engine(lambda *_: True)


def over(program: dspy.Module, engine: FakeEngine) -> Any:
    program.set_lm(plain_lm(engine))
    return program


def runs_of(program: dspy.Module, count: int, num_threads: int = 4) -> list[Rollout]:
    runner = Runner(program)
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(runner.run, numbers(count)))


def rows_of(program: dspy.Module, count: int, **options: Any) -> tuple[Row, ...]:
    optimizer = LoRAFinetune(parity_match, **{"num_samples": 0, "rescue": False, "balance": False, **options})
    return optimizer.collect(program, trainset=numbers(count)).rows


def prompts(engine: FakeEngine) -> set[str]:
    return {repr(request.messages) for request in engine.requests}


class One(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = dspy.Predict(Parity)


class Pooled(One):
    """Calls its predictor in threads of its own, for this number and the next."""

    def forward(self, number: int) -> dspy.Prediction:
        with ThreadPoolExecutor(2) as pool:
            first, _ = pool.map(lambda n: self.p(number=n), [number, number + 1])
            return first
