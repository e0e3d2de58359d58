"""Programs that write code and run it: their predictors are seen and learned as any other's. dspy's `LocalInterpreter`
stands for Deno."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import Parity, numbers, outputs_of, parity_match, plain_lm, reply

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, evaluate
from bettertogether.artifact import load, save
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine, FakeRequest

KINDS: dict[str, Callable[..., dspy.Module]] = {
    "ProgramOfThought": dspy.ProgramOfThought,
    "CodeAct": functools.partial(dspy.CodeAct, tools=[]),
    "RLM": dspy.RLM,
}
EXPECTED = {
    "ProgramOfThought": ["code_generate.predict", "code_regenerate.predict", "generate_output.predict"],
    "CodeAct": ["codeact", "codeact", "extractor.predict"],
    "RLM": ["generate_action", "generate_action"],
}


def program(kind: str, code: Callable[[FakeRequest], str], **options: Any) -> Any:
    def answer(request: FakeRequest) -> str:
        known = {"reasoning": "r", "generated_code": code(request), "finished": went_wrong(request), "parity": "even"}
        known["code"] = known["generated_code"]
        return reply(request, **{name: known[name] for name in outputs_of(request)})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        factory = functools.partial(dspy.LocalInterpreter, **options)
        made = KINDS[kind](Parity, max_iters=2, interpreter_factory=factory)
    made.set_lm(plain_lm(FakeEngine(answer)))
    return made


def went_wrong(request: FakeRequest) -> bool:
    return "ZeroDivisionError" in request.user


def mended(request: FakeRequest) -> str:
    submit = "SUBMIT(parity='even')" if "code" in outputs_of(request) else "SUBMIT({'parity': 'even'})"
    return submit if went_wrong(request) else "1 / 0"


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_is_seen_those_that_mend_code_among_them(kind: str) -> None:
    run = Runner(program(kind, mended)).run(numbers(1)[0])
    assert (run.error, run.prediction.parity) == (None, "even")
    assert [call.predictor for call in run.calls] == EXPECTED[kind]
    assert [call.signature for call in run.calls] == [None] * len(run.calls)


@pytest.mark.parametrize(
    ("code", "options", "reason"),
    [
        ("import os; os._exit(3)", {}, "Python worker exited unexpectedly."),
        ("while True: pass", {"execution_timeout": 0.5}, "Python worker exceeded execution timeout of 0.5 seconds."),
    ],
)
def test_an_interpreter_that_ends_is_a_failure_of_its_example_alone(code: str, options: Any, reason: str) -> None:
    made = program("RLM", lambda request: code if "\n    1\n" in request.user else "1", **options)
    done = evaluate(made, numbers(3), parity_match, num_threads=2)
    failed = [(failure.kind, failure.count, failure.reason) for failure in done.failures]
    assert failed == [("program error", 1, f"CodeInterpreterError: {reason}")]


def test_a_repl_that_reads_its_own_history_is_compiled_and_restored_with_its_demos(tmp_path: Path) -> None:
    def code(request: FakeRequest) -> str:
        if "not interacted" in request.user:
            return "print(number)"
        knows = request.demos or request.learned
        return f"SUBMIT(parity='even' if number % 2 == {0 if knows else 'number % 2'} else 'odd')"

    made = program("RLM", code)
    steps = {"p": BootstrapFewShotRS(parity_match, num_candidates=1), "w": LoRAFinetune(parity_match)}
    compiled: Any = BetterTogether(parity_match, **steps).compile(
        made, trainset=numbers(4), valset=numbers(4, 30), strategy="p -> w", progress=False
    )
    save(compiled, tmp_path / "a")
    loaded: Any = load(tmp_path / "a", into=made, base_model=made.generate_action.lm.engine)
    histories = [[demo.repl_history for demo in each.generate_action.demos] for each in (compiled, loaded)]
    assert histories[0] == histories[1]
    assert len(histories[0]) > 0
    assert {round_.scores for round_ in compiled.report.rounds[1:]} == {(1.0,) * 4}
