"""A compile run as real trackers keep it, offline: MLflow, Weights & Biases, and accelerate's TensorBoard and trackio.

A test is skipped where its tracker is not installed.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker, TrackioTracker
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, LoRAFinetune
from bettertogether.callbacks import Callback, MLflowCallback, TrackerCallback, WandbCallback
from bettertogether.errors import ConfigError, MissingExtraError

TRAINED = "step_1/adapter_1/1"
"""How the one training of `compiled` is called: what trains, of how many."""


def compiled(folder: Path, callback: Callback) -> Any:
    """The report of a run in which a weight step makes a program right."""
    return (
        BetterTogether(parity_match, w=LoRAFinetune(parity_match))
        .compile(
            parity_program(parity_engine(learner)),
            trainset=numbers(12, 40),
            valset=numbers(4),
            strategy="w",
            run_dir=folder / "run",
            callbacks=[callback],
            progress=False,
        )
        .report
    )


def records(path: Path) -> Iterator[bytes]:
    """The events of a TensorBoard file: each its length, a checksum, itself, another checksum."""
    data = path.read_bytes()
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield data[start + 12 : start + 12 + length]
        start += length + 16


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run of W&B's: a header, then pieces that never cross a block of 32 KiB."""
    data, start, record = path.read_bytes(), 7, b""
    while start + 7 <= len(data):
        if (left := -start % 2**15) and left < 7:
            start += left
        _, length, kind = struct.unpack_from("<IHB", data, start)
        start += 7 + length
        record += data[start - length : start]
        if kind in (1, 4):
            yield record
            record = b""


def test_tensorboard_has_scores_by_round_and_losses_by_training_step(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    compiled(tmp_path, TrackerCallback(TensorBoardTracker("mine", logging_dir=str(tmp_path))))
    (file,) = (tmp_path / "mine").glob("events.*")
    values: dict[str, list[Any]] = {}
    for record in records(file):
        event = event_pb2.Event.FromString(record)
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert values["score"] == [(0, 0.5), (1, 1.0)]
    assert values[f"{TRAINED}/loss"] == [(1, 1.0)]
    assert values["selected"] == [(1, 1.0)]
    assert {"warning_1/text_summary", "step_1/text_summary"} <= values.keys()


def test_trackio_has_scores_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio").SQLiteStorage
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    compiled(tmp_path, TrackerCallback(TrackioTracker("mine", name="first")))
    lines = storage.get_logs("mine", "first")
    assert [(line["step"], line["score"]) for line in lines if "score" in line] == [(0, 0.5), (1, 1.0)]


def test_wandb_has_scores_config_summary_and_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "DATA_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    compiled(tmp_path, WandbCallback())
    assert wandb.run is None
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = list(map(wandb_internal_pb2.Record.FromString, wandb_records(file)))

    def values(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    history = [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    assert [(line["round"], line["score"]) for line in history if "score" in line] == [(0, 0.5), (1, 1)]
    assert [line[f"{TRAINED}/step"] for line in history if f"{TRAINED}/loss" in line] == [1]
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in found:
        config |= values(record.config.update)
        summary |= values(record.summary.update)
    assert (config["strategy"], config["seed"], summary["selected"]) == ("w", 0, 1)
    kept = {
        record.artifact.type: sorted(entry.path for entry in record.artifact.manifest.contents)
        for record in found
        if record.WhichOneof("record_type") == "artifact"
    }
    assert kept["report"] == ["report.html", "report.json", "report.txt"]
    assert [path.rpartition("/")[2] for path in kept["model"]] == ["fake_adapter.json", "data_card.json"]
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def test_mlflow_has_scores_and_as_artifacts_adapters_data_card_and_report(mlflow: Any, tmp_path: Path) -> None:
    report = compiled(tmp_path, MLflowCallback())
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert (run.info.status, run.data.params["strategy"]) == ("FINISHED", "w")
    scores = client.get_metric_history(run.info.run_id, "score")
    assert [(score.step, score.value) for score in scores] == [(0, 0.5), (1, 1.0)]
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    (adapter,) = folder.glob("step_1/adapters/*/fake_adapter.json")
    (own,) = (tmp_path / "run" / "adapters").glob("*/fake_adapter.json")
    assert adapter.read_text() == own.read_text()
    card = json.loads((folder / "step_1" / "data_card.json").read_text())
    assert card["examples"] == report.rounds[1].details.data_card.examples == 12
    assert (folder / "report" / "report.html").read_text() == (tmp_path / "run" / "report.html").read_text()


AUTOLOG = """
import sys
import dspy, mlflow
from fakes import learner, numbers, parity_engine, parity_match, parity_program
from bettertogether import BetterTogether, BootstrapFewShotRS, evaluate

mlflow.set_tracking_uri(sys.argv[1])
mlflow.dspy.autolog(log_compiles=True, log_evals=True)
program = parity_program(parity_engine(learner))
optimizer = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=0))
report = optimizer.compile(program, trainset=numbers(12, 40), valset=numbers(4), strategy="p", progress=False).report
evaluation = evaluate(program, numbers(3), parity_match)
parent, alone = mlflow.search_runs(
    filter_string="tags.`mlflow.parentRunId` IS NULL", order_by=["start_time"], output_format="list"
)
client = mlflow.MlflowClient()
scores = [each.value for each in client.get_metric_history(parent.info.run_id, "eval_full")]
assert scores == [100 * record.score for record in report.rounds], scores
assert client.get_metric_history(parent.info.run_id, "eval_minibatch")
assert alone.data.metrics["eval"] == round(100 * evaluation.mean, 2), alone.data
mlflow.flush_trace_async_logging()
traces = mlflow.search_traces(return_type="list")
assert len(traces) == 3, len(traces)
assert [span.name for span in traces[0].data.spans][:3] == [
    "Predict.forward", "ChatAdapter.format", "LocalLM.__call__"
], traces[0].data.spans
"""


def test_mlflows_autolog_sees_a_compile_with_its_evaluations_and_the_traces_of_one_alone(
    mlflow: Any, tmp_path: Path
) -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{AUTOLOG}", mlflow.get_tracking_uri()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="tracker='tensorboard' is not allowed: give a tracker of accelerate's"):
        TrackerCallback("tensorboard")
    with pytest.raises(ConfigError, match="TensorBoardTracker'> is not allowed"):
        TrackerCallback(TensorBoardTracker)


def test_without_the_trackers_package_the_run_ends_before_any_call(tmp_path: Path) -> None:
    class Missing(TrackioTracker):
        def start(self) -> None:
            raise ModuleNotFoundError("No module named 'trackio'")

    with pytest.raises(MissingExtraError, match="'trackio' needs a package: pip install trackio"):
        compiled(tmp_path, TrackerCallback(Missing("mine")))
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_without_wandb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bettertogether\[wandb\]'"):
        WandbCallback()
