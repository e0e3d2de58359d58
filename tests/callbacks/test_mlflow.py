"""MLflow's run holds what was asked, scores, losses and warnings, and ends as the compile run did."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from typing import Any

import pytest
from fakes import FakeMLflow

from bettertogether.callbacks import MLflowCallback, emit, listening, warn
from bettertogether.errors import ConfigError, MissingExtraError
from bettertogether.records import Ledger, RewardLine, StepRecord
from bettertogether.report import CompileReport
from bettertogether.training.progress import TrainingProgress


def test_mlflow_gets_params_scores_losses_and_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    record = StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0), ledger=Ledger(lm_calls=4, metric_calls=2))
    with listening([MLflowCallback(run_name="try")]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"], "params": {"seed": 1, "student": {"hops[0]": "QA"}}})
        emit("step_start", {"index": 1, "step": "w", "strategy": "w"})
        line = TrainingProgress(
            step=5, total_steps=9, epoch=1.0, loss=0.25, validation_loss=None, tokens=10, learning_rate=1e-4
        )
        emit("training", {"progress": line, "adapter": "a@1"})
        emit("training", {"progress": line, "rewards": RewardLine(5, 0.5, 0.25, 8, 3, 4, tokens_per_s=90.0)})
        emit("step_end", {"record": record})
        emit("run_end", {"report": CompileReport((record,), 0, 2, "w")})
    calls = [call for call in mlflow.calls if call[0] != "log_text"]
    metrics = {"score": 0.5, "seconds": 0.0, "lm_calls": 4.0, "metric_calls": 2.0, "tokens": 0.0}
    rewards = {"loss": 0.25, "learning_rate": 1e-4, "reward": 0.5, "spread": 0.25, "examples": 8, "kept_groups": 3}
    rewards |= {"groups": 4, "tokens_per_s": 90.0}
    assert calls == [
        ("active_run",),
        ("start_run", "try"),
        ("log_params", {"strategy": "w", "seed": "1", "student.hops_0_": "QA"}),
        ("log_metrics", {"step_1/a_1/loss": 0.25, "step_1/a_1/learning_rate": 1e-4}, 5),
        ("log_metrics", {f"step_1/adapter/{name}": value for name, value in rewards.items()}, 5),
        ("log_metrics", metrics, 0),
        ("set_tag", "step_0", "student: complete"),
        ("log_metric", "selected", 0),
        ("log_metric", "selected_score", 0.5),
        ("end_run", "FINISHED"),
    ]


def test_params_that_the_active_run_has_with_another_value_become_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    class Active(FakeMLflow):
        """With MLflow's rule that a param keeps its value."""

        data = types.SimpleNamespace(params={"seed": "7"}, tags={})

        def active_run(self) -> Any:
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def get_run(self, run_id: str) -> Any:
            assert run_id == "r"
            return types.SimpleNamespace(data=copy.deepcopy(self.data))

        def log_params(self, params: dict[str, str]) -> None:
            assert all(self.data.params.setdefault(key, value) == value for key, value in params.items())

        def set_tag(self, key: str, value: str) -> None:
            self.data.tags[key] = value

    mlflow = Active()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for strategy, told in (
        ("w", {}),
        ("w -> p", {"last_compile.strategy": "w -> p"}),
        ("w", {"last_compile.strategy": "w"}),
    ):
        with listening([MLflowCallback()]):
            emit("run_start", {"strategy": strategy, "rounds": [""], "params": {"seed": 1, "shuffle": True}})
            emit("run_end", {"report": None})
        assert mlflow.data.params == {"seed": "7", "strategy": "w", "shuffle": "True"}
        assert mlflow.data.tags == {"last_compile.seed": "1", **told}


def test_an_interrupted_run_is_killed_in_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with contextlib.suppress(KeyboardInterrupt), listening([MLflowCallback()]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        raise KeyboardInterrupt
    assert mlflow.calls[-1] == ("end_run", "KILLED")


def test_warnings_become_tags_of_the_mlflow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with listening([MLflowCallback()]):
        warn("all 8 examples failed")
        warn("x" * 6000)
    tags = [call[1:] for call in mlflow.calls if call[0] == "set_tag"]
    assert tags == [("warning_1", "all 8 examples failed"), ("warning_2", "x" * 5000)]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), ("ValueError('x')", "FAILED"), ("KeyboardInterrupt()", "KILLED")],
)
def test_the_mlflow_run_ends_as_the_run_did(error: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with listening([MLflowCallback()]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
        emit("run_end", {"report": None, "error": error})
    assert [call for call in mlflow.calls if call[0] == "end_run"] == [("end_run", status)]


def test_a_run_name_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", FakeMLflow())
    with pytest.raises(ConfigError, match="run_name=5 is not allowed: give a text"):
        MLflowCallback(5)  # type: ignore[arg-type]


def test_without_mlflow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bettertogether\[mlflow\]'"):
        MLflowCallback()


def test_a_run_whose_params_mlflow_refuses_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(FakeMLflow):
        def log_params(self, params: object) -> None:
            raise ValueError("no params")

    mlflow = Refusing()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with pytest.raises(ValueError, match="no params"), listening([MLflowCallback()]):
        emit("run_start", {"strategy": "w", "rounds": ["", "w"]})
    assert [call[0] for call in mlflow.calls] == ["active_run", "start_run", "end_run"]
    assert mlflow.calls[-1] == ("end_run", "FAILED")
    assert len([call for call in mlflow.calls if call[0] == "end_run"]) == 1
