"""Every wrong argument of `BetterTogether` and `compile` is an error of ours before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, Budget
from bettertogether.callbacks import Callback
from bettertogether.errors import BetterTogetherError
from bettertogether.testing import FakeEngine

WRONG: dict[str, list[Any]] = {
    "student": [5, None, "program", dspy.Predict],
    "trainset": [5, None, "text", {"a": 1}, [5], [{"number": 1}], [], (example for example in numbers(4))],
    "valset": [5, 0, "text", "", [5], {"a": 1}, (example for example in numbers(4))],
    "teacher": [5, "teacher", [5], {"a": 1}, dspy.Predict, (number for number in range(0))],
    "num_threads": ["x", 0, -1, True, 1.5, [2]],
    "max_errors": ["x", -1, True, 1.5],
    "seed": ["x", -1, True, 1.5, 2**32],
    "provide_traceback": ["x", 5],
    "valset_ratio": ["x", None, -0.1, 1, float("nan"), True, [0.1]],
    "shuffle_trainset_between_steps": ["x", None, 5],
    "strategy": [5, None, [], "", "  ", [5], ["p", ""], {"p": 1}, {"p"}, b"p", "p -> ", "p -> q", ["p", None]],
    "optimizer_compile_args": [5, "x", [], {"p": 5}, {"p": None}, {"q": {}}, {"p": {5: 1}}, {5: {}}],
    "run_dir": [5, "", "  ", b"run", "a\0b", True, ["run"], "~nobody-of-this-name/run"],
    "callbacks": [5, None, [5], "x", [Callback], Callback(), [lambda event: None], {"a": Callback()}],
    "progress": ["x", None, 5],
    "budget": [5, "1h", {"minutes": 5}, Budget, True],
    "on_step_error": ["ignore", None, 5],
    "two_by_two": ["x", None, 5],
    "max_rounds": ["x", 0, -1, True, None, 1.5],
}  # fmt: skip


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_argument_is_an_error_of_ours_before_any_work(
    engine: FakeEngine, tmp_path: Path, name: str, value: Any
) -> None:
    arguments = {
        "student": parity_program(engine), "trainset": numbers(24), "valset": numbers(10), "strategy": "p",
        "run_dir": tmp_path / "run", "progress": False,
    }  # fmt: skip
    arguments[name] = value
    optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=1))
    with pytest.raises(
        BetterTogetherError, match=name if name in ("num_threads", "seed", "budget", "callbacks") else ""
    ):
        optimizer.compile(arguments.pop("student"), **arguments)
    assert engine.requests == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metric", [None, 5, "accuracy", [parity_match], lambda prediction: 1.0, lambda: 1.0])
def test_what_is_no_metric_is_an_error(metric: Any) -> None:
    with pytest.raises(BetterTogetherError, match=r"^metric(=.* is not allowed: give a function| must take)"):
        BetterTogether(metric)


@pytest.mark.parametrize("optimizer", [5, "p", None, BootstrapFewShotRS, [BootstrapFewShotRS(parity_match)]])
def test_what_is_no_optimizer_is_an_error(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="Optimizer 'p' must be a Teleprompter"):
        BetterTogether(parity_match, p=optimizer)


def test_a_class_in_place_of_an_optimizer_is_told_by_its_name() -> None:
    with pytest.raises(TypeError, match="must be a Teleprompter, got the class BootstrapFewShotRS"):
        BetterTogether(parity_match, p=BootstrapFewShotRS)


@pytest.mark.parametrize("value", ["x", -1, 0, True, float("nan"), [1]])
@pytest.mark.parametrize("name", ["minutes", "metric_calls", "tokens"])
def test_a_wrong_limit_of_a_budget_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(BetterTogetherError, match=rf"Budget\({name}="):
        Budget(**{name: value})


def test_a_home_folder_in_run_dir_is_found(engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    BetterTogether(parity_match, p=dspy.LabeledFewShot(k=1)).compile(
        parity_program(engine), trainset=numbers(24), valset=numbers(10), strategy="p", run_dir="~/run", progress=False
    )
    assert (tmp_path / "run" / "run.json").exists()
