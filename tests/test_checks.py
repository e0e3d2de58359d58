"""Arguments of the public names are checked before any call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import numbers, parity_engine, parity_match, parity_program

from bettertogether.checks import require_whole
from bettertogether.errors import ConfigError
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.parallel import thread_count
from bettertogether.rollouts.settings import RunSettings
from bettertogether.rollouts.traces import ExamplePass
from bettertogether.rollouts.tries import Sampling
from bettertogether.steps.prompt_step import BootstrapFewShotRS
from bettertogether.steps.rows_from_traces import RowOptions
from bettertogether.steps.weight_step import LoRAFinetune

WRONG_OF_BOTH: dict[str, list[Any]] = {
    "num_threads": ["x", 0, -1, 2.5, True],
    "max_errors": ["x", -1, 1.5],
    "seed": ["x", -1, 0.5],
    "threshold": ["x", [1], float("nan")],
    "num_samples": ["x", -1, 1.5, None, True],
    "temperature": ["1", 0, 3, None, (), ("x",), True],
    "rescue": ["yes", 1, None],
}
WRONG: dict[Any, dict[str, list[Any]]] = {
    LoRAFinetune: {
        **WRONG_OF_BOTH,
        "lora": [5, {"r": 8}],
        "training": [None, "fast"],
        "train_prompt": ["best", None],
        "max_demos": ["3", 0, 1.5, None, True],
        "max_rescue_share": ["x", -0.1, 1.1, None],
        "sample_passing": ["x"],
        "max_traces_per_example": ["2", 0, 1.5],
        "balance": ["x"],
        "label_field": [5, ["a"]],
        "multitask": [None, "x"],
        "start_from": ["end"],
        "frozen": ["p", 5, [1]],
        "validation_share": ["x", 1, -0.1],
        "folder": [5],
    },
    BootstrapFewShotRS: {
        **WRONG_OF_BOTH,
        "num_candidates": ["x", -1, None],
        "max_bootstrapped_demos": [-1, 1.5],
        "max_labeled_demos": ["3"],
        "train_size": [0, "x"],
        "val_size": [0, 1.5],
        "restart": ["x"],
        "race": [5],
    },
}
CASES = [
    pytest.param(kind, name, value, id=f"{kind.__name__} {name}={value!r}")
    for kind, wrong in WRONG.items()
    for name, values in wrong.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_wrong_argument_of_an_optimizer_is_an_error_at_once_that_names_it(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*give"):
        kind(parity_match, **{name: value})


@pytest.mark.parametrize("kind", [LoRAFinetune, BootstrapFewShotRS])
def test_a_metric_that_cannot_be_called_is_an_error_at_once(kind: Any) -> None:
    with pytest.raises(ConfigError, match="metric=5 is not allowed: give a function"):
        kind(5)


def test_a_prompt_step_needs_a_metric_and_a_weight_step_does_without() -> None:
    with pytest.raises(ConfigError, match="metric=None is not allowed: give a function"):
        BootstrapFewShotRS(None)  # type: ignore[arg-type]
    assert LoRAFinetune(None).metric is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"metric": "exact"}, "metric='exact' is not allowed: give a function"),
        ({"num_threads": "x"}, "num_threads='x'"),
        ({"max_errors": -1}, "max_errors=-1"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_a_wrong_argument_of_evaluate_is_an_error_before_any_call(options: Any, text: str) -> None:
    engine = parity_engine(lambda *_: True)
    with pytest.raises(ConfigError, match=text):
        evaluate(parity_program(engine), numbers(2), **{"metric": parity_match, **options})
    assert engine.requests == []


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    require_whole("n", numpy.int64(3), 1)
    assert Sampling(numpy.int64(2), numpy.float64(0.5)).temperature_of(1) == 0.5


def test_what_is_right_stays_as_it_was() -> None:
    assert Sampling(temperature=[0.5, 1]).temperatures == (0.5, 1)
    assert RowOptions(max_rescue_share=1).max_rescue_share == 1
    assert ExamplePass(None, threshold=0.5).threshold == 0.5
    assert RunSettings(num_threads=3, max_errors=0).num_threads == 3


def test_no_threads_are_too_few() -> None:
    with pytest.raises(ConfigError, match="num_threads=0 is not allowed: give a whole number, 1 or more"):
        thread_count(parity_program(parity_engine(lambda *_: True)), 0)


def test_a_folder_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LoRAFinetune(folder="~/adapters").folder == tmp_path / "adapters"


def test_a_label_field_that_no_example_has_is_an_error_that_names_those_there_are() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    with pytest.raises(ConfigError, match=r"label_field='answer' is no field .* \['number', 'parity'\]"):
        LoRAFinetune(parity_match, label_field="answer").collect(program, trainset=numbers(2))
