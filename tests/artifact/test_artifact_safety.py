"""What a file that others wrote can't do, and what of the user's must not get into a file."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import TwoSteps, learner, parity_engine, parity_program, plain_lm
from saved import edit_manifest, fresh_engine, manifest_of, tuned_program

from bettertogether.artifact import folder as artifact_files
from bettertogether.artifact import load, save, saved_lm
from bettertogether.errors import ArtifactError

ENDPOINT = "http://127.0.0.1:9/v1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    program = dspy.Predict("a -> b", temperature=0.5, max_tokens=9)
    program.lm = dspy.LM("openai/gpt-4o-mini", top_p=0.9)
    return save(program, tmp_path / "a")


UNSAFE = [
    {"api_base": ENDPOINT},
    {"base_url": ENDPOINT},
    {"api_key": "k"},
    {"extra_headers": {"Authorization": "k"}},
    {"headers": {}},
    {"model": "openai/other"},
    {"model_list": []},
    {"fallbacks": [{"model": "openai/x", "api_base": ENDPOINT}]},
    {"custom_llm_provider": "openai"},
    {"extra_body": {"tools": [{"server_url": ENDPOINT}]}},
    {"extra_query": {"x": "1"}},
    {"tools": []},
    {"temperature": {"api_base": ENDPOINT}},
    {"stop": [{"api_base": ENDPOINT}]},
    {"thinking": [{"api_base": ENDPOINT}]},
    {"top_p": float("nan")},
]


@pytest.mark.parametrize("config", UNSAFE)
def test_a_predictors_option_that_could_lead_elsewhere_is_refused_whoever_gives_the_lm(
    folder: Path, config: dict[str, Any]
) -> None:
    edit_manifest(folder, lambda manifest: manifest["predictors"]["self"].update(config=config))
    for lms in (None, {"self": dspy.LM("openai/mine")}):
        with pytest.raises(ArtifactError, match=rf"'self' was saved with {next(iter(config))}.*allow_unsafe_lm_state"):
            load(folder, lms=lms)
    assert load(folder, allow_unsafe_lm_state=True).config.keys() == config.keys()


@pytest.mark.parametrize("state", [*UNSAFE[:-4], {"engine": {"class": "a:B"}}, {"launch_kwargs": {"x": 1}}])
def test_an_lms_option_that_could_lead_elsewhere_is_refused(folder: Path, state: dict[str, Any]) -> None:
    if "model" in state:
        state = {"model": f"huggingface/{ENDPOINT}"}
    edit_manifest(folder, lambda manifest: manifest["lms"]["lm0"]["state"].update(state))
    with pytest.raises(ArtifactError, match=rf"gpt-4o-mini' was saved with {next(iter(state))}|{ENDPOINT}"):
        load(folder)
    mine = dspy.LM("openai/mine")
    assert load(folder, lms={"self": mine}).lm is mine


def test_options_of_sampling_are_taken(tmp_path: Path) -> None:
    config = {"temperature": 1.0, "stop": ["x"], "seed": 3, "extra_body": {"min_p": 0.1}, "logit_bias": {"5": 1}}
    save(dspy.Predict("a -> b", **config), tmp_path / "a")
    assert load(tmp_path / "a").config == config


@pytest.mark.parametrize(
    "options",
    [
        {"adapters": ["/elsewhere"]},
        {"cache_folder": "/elsewhere"},
        {"device": "cpu"},
        {"dtype": "int8"},
        {"dtype": ["float32"]},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": [1]},
        {"chat_template_kwargs": {"x": {"y": 1}}},
    ],
)
def test_an_artifact_sets_no_engine_option_but_dtype_and_template_variables(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    save(parity_program(parity_engine(learner)), tmp_path / "a")
    edit_manifest(tmp_path / "a", lambda manifest: manifest["lms"]["lm0"].update(engine_options=options))
    with pytest.raises(ArtifactError, match="engine_options"):
        load(tmp_path / "a", base_model=fresh_engine())


def test_loading_imports_no_module_that_a_file_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deploys_something.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    edit_manifest(folder, lambda manifest: manifest.update(program="deploys_something:Anything"))
    with pytest.raises(ArtifactError, match=r"'deploys_something' is not imported.*into=program"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def set_program(path: str, manifest: dict[str, Any]) -> None:
    manifest["program"] = path


def test_loading_computes_no_attribute_that_a_file_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = type(sys)("lazy_module")
    lazy.__dict__["__getattr__"] = lambda name: pytest.fail(f"computed {name}")
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    for path in ("lazy_module:Program", "lazy_module:__doc__.upper", "lazy_module", ":", "fakes:dspy.LM"):
        edit_manifest(folder, partial(set_program, path))
        with pytest.raises(ArtifactError, match="into=program"):
            load(folder)


def test_a_saved_program_of_an_imported_class_needs_no_into(tmp_path: Path) -> None:
    save(TwoSteps(), tmp_path / "a")
    assert type(load(tmp_path / "a")) is TwoSteps


def test_a_state_sets_no_attribute_that_its_class_does_not_save(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["predictors"]["self"]["state"].update(forward="x"))
    with pytest.raises(ArtifactError, match="forward"):
        load(folder)


SECRET = "sk-SECRET"


@pytest.mark.parametrize(
    ("lm_options", "config"),
    [
        ({}, {"api_key": SECRET}),
        ({}, {"extra_headers": {"Authorization": SECRET}}),
        ({"fallbacks": [{"model": "openai/x", "api_key": SECRET}]}, {}),
        ({"extra_body": {"tools": [{"headers": {"Authorization": SECRET}}]}}, {}),
        ({"extra_query": {"api-key": SECRET}}, {}),
        ({"extra_body": {"apiKey": SECRET}}, {}),
        ({"apikey": SECRET}, {}),
        ({"api_base": f"http://u:{SECRET}@127.0.0.1"}, {}),
        ({"api_base": f"http://127.0.0.1/v1?key={SECRET}"}, {}),
        ({"auth": SECRET}, {}),
        ({"cookies": {"s": SECRET}}, {}),
    ],
)
def test_no_secret_of_an_lm_or_a_predictor_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lm_options: dict[str, Any], config: dict[str, Any]
) -> None:
    program = dspy.Predict("a -> b", **config)
    program.lm = dspy.LM("openai/gpt-4o-mini", **lm_options)
    save(program, tmp_path / "a")
    assert SECRET not in (tmp_path / "a" / "artifact.json").read_text()
    assert "is saved without" in caplog.text


def killed_while_saving(target: Path, how: str) -> None:
    """Save over an artifact in a process of its own, which ends at the first rename to its name."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    replace = os.replace

    def end(source: Any, to: Any) -> None:
        if Path(to) == target and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if Path(to) == target:
            raise KeyboardInterrupt
        replace(source, to)

    os.replace = end  # type: ignore[assignment]
    try:
        save(dspy.Predict("a -> c"), target)
    finally:
        os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_saving_over_an_artifact_is_one_step(folder: Path, how: str) -> None:
    killed_while_saving(folder, how)
    assert list(load(folder).signature.output_fields) == ["c"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_where_folders_cant_be_exchanged_ctrl_c_leaves_the_earlier_artifact(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_files, "exchange", lambda one, other: False)
    killed_while_saving(folder, "Ctrl-C")
    assert folder.exists()
    assert list(load(folder).signature.output_fields) == ["b"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    save(dspy.Predict("a -> c"), folder)
    assert list(load(folder).signature.output_fields) == ["c"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_where_folders_cant_be_exchanged_a_load_after_a_kill_brings_the_artifact_before_it_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(artifact_files, "exchange", lambda one, other: False)
    older = save(dspy.Predict("a -> older"), folder.with_name(".a.old.0.tmp"))
    os.utime(older / "artifact.json", (0, 0))
    killed_while_saving(folder, "kill")
    assert not folder.exists()
    assert list(load(folder).signature.output_fields) == ["b"]
    assert "is brought back" in caplog.text


def test_an_artifact_is_saved_over_on_windows_which_exchanges_no_folders_and_renames_onto_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def windows_replace(source: Any, to: Any) -> None:
        if Path(to).is_dir():
            raise PermissionError(13, "Access is denied")
        replace(source, to)

    def windows_library(name: object, use_errno: bool) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", windows_library)
    monkeypatch.setattr(os, "replace", windows_replace)
    save(dspy.Predict("a -> c"), folder)
    assert list(load(folder).signature.output_fields) == ["c"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_each_file_is_compared_with_what_was_saved(tmp_path: Path) -> None:
    saved = save(tuned_program(parity_engine(learner)), tmp_path / "a")
    (name,) = manifest_of(saved)["files"]
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content + b" ")
    with pytest.raises(ArtifactError, match=rf"{name} is not the file that was saved"):
        load(saved, base_model=fresh_engine())
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} was saved with the program and is not there"):
        load(saved, base_model=fresh_engine())


def test_an_artifact_without_hashes_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(tuned_program(parity_engine(learner)), tmp_path / "a")
    edit_manifest(saved, lambda manifest: manifest.pop("files"))
    assert load(saved, base_model=fresh_engine()).lm.model == manifest_of(saved)["lms"]["lm0"]["model"]
    assert "without hashes" in caplog.text


def test_a_lost_adapter_entry_is_no_base_model(tmp_path: Path) -> None:
    saved = save(tuned_program(parity_engine(learner)), tmp_path / "a")
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda manifest: manifest["lms"]["lm0"].pop("adapter"),
        lambda manifest: manifest["lms"]["lm0"].update(adapter=None),
    ]
    for edit in edits:
        edit_manifest(saved, edit)
        with pytest.raises(ArtifactError, match="adapter"):
            load(saved, base_model=fresh_engine())


@pytest.mark.parametrize("value", [5, None, "", b"", "a\0b", ["a"], dspy.Predict])
def test_what_is_no_folder_is_refused_at_once(value: Any) -> None:
    for call in (load, lambda folder: save(dspy.Predict("a -> b"), folder)):
        with pytest.raises(ArtifactError, match="folder="):
            call(value)


@pytest.mark.parametrize(
    "options",
    [{"into": dspy.Predict}, {"into": "x"}, {"base_model": 5}, {"lms": 5}, {"lms": {"self": "m"}}, {"lms": {5: 5}}],
)
def test_arguments_of_the_wrong_type_are_refused_at_once(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(options))):
        load(folder, **options)


@pytest.mark.parametrize("program", [5, None, dspy.Predict, dspy.LM("openai/x")])
def test_what_is_no_program_is_not_saved(tmp_path: Path, program: Any) -> None:
    with pytest.raises(ArtifactError, match=r"program must be a program \(a dspy.Module\)"):
        save(program, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save(dspy.Predict("a -> b"), "~/a") == tmp_path / "a"
    assert load("~/a").signature.instructions
    with pytest.raises(ArtifactError, match="no-such-user"):
        save(dspy.Predict("a -> b"), "~no-such-user/a")


def test_a_place_below_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file/a", "n" * 300, "/proc/none/a"):
        with pytest.raises(ArtifactError):
            save(dspy.Predict("a -> b"), tmp_path / name)
        with pytest.raises(ArtifactError):
            load(tmp_path / name)


def test_the_manifest_names_every_other_file_but_the_card(tmp_path: Path) -> None:
    saved = save(tuned_program(parity_engine(learner)), tmp_path / "a")
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert manifest_of(saved)["files"].keys() == found - {"artifact.json", "README.md"}
    assert json.loads((saved / "artifact.json").read_text())["schema"] == 1


@pytest.mark.parametrize("chosen", [False, True])
def test_an_adapter_is_not_loaded_on_a_base_whose_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: bool
) -> None:
    engine, changed = parity_engine(learner), fresh_engine()
    engine.base_hash, changed.base_hash = "a" * 64, "b" * 64
    saved = save(tuned_program(engine), tmp_path / "a")
    if chosen:
        assert load(saved, base_model=changed).lm.engine is changed
        assert "is loaded with" in caplog.text
        return
    monkeypatch.setattr(saved_lm, "local_lm", lambda *_, **__: plain_lm(changed))
    with pytest.raises(ArtifactError, match=r"files have changed since.*base_model="):
        load(saved)


def test_a_program_without_adapter_is_loaded_on_a_changed_base_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, changed = parity_engine(learner), fresh_engine()
    engine.base_hash, changed.base_hash = "a" * 64, "b" * 64
    saved = save(parity_program(engine), tmp_path / "a")
    monkeypatch.setattr(saved_lm, "local_lm", lambda *_, **__: plain_lm(changed))
    assert load(saved).lm.engine is changed
    assert "is loaded with" in caplog.text
