"""What an artifact can't hold, or doesn't find when loaded, is an error or a warning that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import TwoSteps, learner, numbers, parity_engine, parity_match, parity_program, plain_lm, two_step_program
from saved import edit_manifest, fresh_engine, manifest_of, tuned, tuned_program
from small_models import save_adapter, save_model

from bettertogether import BetterTogether, local_lm
from bettertogether.artifact import load, merge, save
from bettertogether.engines.adapters import adapter_name
from bettertogether.errors import ArtifactError
from bettertogether.records import StepRecord
from bettertogether.report import CompileReport


def test_a_saved_class_that_is_no_program_is_refused(tmp_path: Path) -> None:
    save(TwoSteps(), tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda manifest: manifest.update(program="subprocess:Popen"))
    with pytest.raises(ArtifactError, match=r"not a dspy\.Module"):
        load(tmp_path / "a")


def test_secrets_of_an_api_lm_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = dspy.Predict("a -> b")
    program.lm = dspy.LM(
        "openai/gpt-4o-mini",
        api_key="sk-1",
        extra_headers={"Authorization": "sk-2"},
        azure_ad_token="sk-3",
        extra_body={"client_secret": "sk-4", "seed": 1},
        top_p=0.9,
    )
    save(program, tmp_path / "a")
    assert "sk-" not in (tmp_path / "a" / "artifact.json").read_text()
    assert "azure_ad_token" in caplog.text
    loaded = load(tmp_path / "a")
    assert loaded.lm.model == "openai/gpt-4o-mini"
    assert loaded.lm.kwargs["top_p"] == 0.9
    assert loaded.lm.kwargs["extra_body"] == {"seed": 1}


def test_a_saved_endpoint_is_used_only_when_trusted(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    program.lm = dspy.LM("openai/local", api_base="http://127.0.0.1:8000/v1")
    save(program, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"127\.0\.0\.1.*allow_unsafe_lm_state=True"):
        load(tmp_path / "a")
    assert load(tmp_path / "a", allow_unsafe_lm_state=True).lm.kwargs["api_base"] == "http://127.0.0.1:8000/v1"


def test_an_lm_that_cant_be_saved_is_an_error_that_says_why(tmp_path: Path) -> None:
    class Unsaveable:
        def complete(self, request: Any) -> Any:
            raise NotImplementedError

    program = dspy.Predict("a -> b")
    program.lm = dspy.LM("local/api", engine=Unsaveable())
    with pytest.raises(ArtifactError, match="Unsaveable"):
        save(program, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_demos_that_are_no_json_are_an_error_that_names_the_predictor(tmp_path: Path) -> None:
    program = TwoSteps()
    program.decide.demos = [dspy.Example(number=object(), remark="x", parity="odd")]
    with pytest.raises(ArtifactError, match="demos of 'decide'"):
        save(program, tmp_path / "a")


def test_a_base_model_that_is_not_here_says_to_give_one(tmp_path: Path) -> None:
    pytest.importorskip("bettertogether.engines.local.transformers_engine")
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda manifest: manifest["lms"]["lm0"].update(base="/nowhere/model"))
    with pytest.raises(ArtifactError, match=r"'/nowhere/model' is not here.*base_model="):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("saved", "held", "said"),
    [({"enable_thinking": True}, None, r"{'chat_template_kwargs': .*}"), (None, {"x": 1}, "the defaults")],
)
def test_a_base_model_that_is_loaded_with_other_template_options_says_to_close_or_to_give_it(
    tmp_path: Path, saved: dict[str, Any] | None, held: dict[str, Any] | None, said: str
) -> None:
    model = save_model(tmp_path / "model")
    program = dspy.Predict("a -> b")
    program.set_lm(local_lm(model, engine_options={"chat_template_kwargs": saved}))
    save(program, tmp_path / "a")
    program.lm.engine.close()
    other = local_lm(model, engine_options={"chat_template_kwargs": held}).engine
    with pytest.raises(ArtifactError, match=rf"saved with, {said} \(.*close that engine .*base_model=lm\.engine"):
        load(tmp_path / "a")
    assert load(tmp_path / "a", base_model=other).lm.engine is other
    other.close()
    loaded = load(tmp_path / "a").lm.engine
    assert loaded.options.chat_template_kwargs == saved
    loaded.close()


def test_another_base_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(parity_program(parity_engine(learner)), tmp_path / "a")
    load(tmp_path / "a", base_model=parity_engine(learner, base_name="other"))
    assert "saved with base model fake and is loaded with other" in caplog.text


def test_another_dspy_adapter_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with dspy.context(adapter=dspy.JSONAdapter()):
        save(dspy.Predict("a -> b"), tmp_path / "a")
        load(tmp_path / "a")
        assert caplog.text == ""
    load(tmp_path / "a")
    assert "dspy.configure(adapter=dspy.JSONAdapter())" in caplog.text


def test_a_compiled_program_is_saved_with_the_prompt_adapter_it_was_compiled_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = parity_program(parity_engine(learner))
    with dspy.context(adapter=dspy.JSONAdapter()):
        compiled = BetterTogether(parity_match).compile(
            program, trainset=numbers(6), valset=numbers(6), strategy="p", progress=False
        )
    save(compiled, tmp_path / "a")
    assert manifest_of(tmp_path / "a")["adapter"] == "JSONAdapter"
    caplog.clear()
    load(tmp_path / "a", base_model=fresh_engine())
    assert "was made under JSONAdapter and is loaded under ChatAdapter" in caplog.text


def test_a_compiled_program_whose_report_names_no_prompt_adapter_is_saved_with_the_one_in_force(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    program.report = CompileReport((StepRecord(0, "", "", "complete"),), 0, 0, "p")
    with dspy.context(adapter=dspy.JSONAdapter()):
        save(program, tmp_path / "a")
    assert manifest_of(tmp_path / "a")["adapter"] == "JSONAdapter"


def test_saving_again_replaces_the_whole_artifact(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    save(parity_program(parity_engine(learner)), tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["README.md", "artifact.json"]


def test_a_program_can_be_saved_over_the_artifact_that_serves_its_adapter(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    loaded = load(tmp_path / "a", base_model=fresh_engine())
    save(loaded, tmp_path / "a")
    assert load(tmp_path / "a", base_model=fresh_engine()).lm.model == loaded.lm.model


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="left alone"):
        save(dspy.Predict("a -> b"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_and_a_new_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/new"):
        assert save(dspy.Predict("a -> b"), tmp_path / name) == tmp_path / name
        assert load(tmp_path / name).signature.instructions


def test_an_adapter_that_was_changed_since_it_was_served_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = fresh_engine(), save_adapter(tmp_path / "adapter", 0)
    program = parity_program(engine)
    monkeypatch.setattr(engine, "adapter_folder", lambda model: adapter)
    program.lm = plain_lm(engine, adapter_name(engine.base_name, adapter))
    save(program, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    with pytest.raises(ArtifactError, match=rf"{adapter} does not hold the adapter {program.lm.model}"):
        save(program, tmp_path / "b")


def test_a_failed_save_leaves_the_earlier_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    before = (tmp_path / "a" / "artifact.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save(dspy.Predict("a -> b"), tmp_path / "a")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "artifact.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../secret", "/etc", "adapters/../../secret", "a\\b", "C:/x", ""])
def test_an_adapter_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").mkdir()
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda manifest: manifest["lms"]["lm0"].update(adapter=name or "."))
    with pytest.raises(ArtifactError, match="reaches outside"):
        load(tmp_path / "a", base_model=fresh_engine())


@pytest.mark.parametrize("what", ["adapter", "file", "manifest", "report"])
def test_a_link_in_the_folder_is_refused(tmp_path: Path, what: str) -> None:
    folder = save(tuned_program(parity_engine(learner)), tmp_path / "a")
    adapter = next((folder / "adapters").iterdir())
    linked = {
        "adapter": adapter,
        "file": adapter / "fake_adapter.json",
        "manifest": folder / "artifact.json",
        "report": folder / "report.json",
    }[what]
    if linked.exists():
        shutil.move(linked, tmp_path / "moved")
    linked.symlink_to(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="reaches outside"):
        load(folder, base_model=fresh_engine())


def test_a_folder_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert load(tmp_path / "link", base_model=fresh_engine()).demos


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no artifact\.json"):
        load(tmp_path)


def test_a_newer_artifact_is_refused(tmp_path: Path) -> None:
    save(dspy.Predict("a -> b"), tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda manifest: manifest.update(schema=2))
    with pytest.raises(ArtifactError, match="schema 2, this version reads up to 1"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.pop("predictors"),
        lambda manifest: manifest.update(predictors=[1]),
        lambda manifest: manifest["predictors"]["self"].pop("state"),
        lambda manifest: manifest["predictors"]["self"].update(lm="lm7"),
        lambda manifest: manifest.pop("schema"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    save(dspy.Predict("a -> b"), tmp_path / "a")
    edit_manifest(tmp_path / "a", edit)
    with pytest.raises(ArtifactError, match="is damaged"):
        load(tmp_path / "a")


def test_merging_needs_exactly_one_adapter_or_a_predictor_to_pick(tmp_path: Path) -> None:
    engine = fresh_engine()
    program = two_step_program(engine)
    save(program, tmp_path / "none")
    with pytest.raises(ArtifactError, match="this program has 0"):
        merge(tmp_path / "none", tmp_path / "out")
    program.remark.lm = plain_lm(engine, tuned(engine, "a").model)
    program.decide.lm = plain_lm(engine, tuned(engine, "b").model)
    save(program, tmp_path / "two")
    with pytest.raises(ArtifactError, match=r"this program has 2.*predictor=\.\.\."):
        merge(tmp_path / "two", tmp_path / "out")
    with pytest.raises(ArtifactError, match="'remrak' was not saved"):
        merge(tmp_path / "two", tmp_path / "out", predictor="remrak")


def test_merging_does_not_write_into_a_folder_with_something_in_it(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        merge(tmp_path / "a", tmp_path / "out")
