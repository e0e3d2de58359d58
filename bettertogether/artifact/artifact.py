"""A compiled program as one folder: prompts, demos, adapters, scores. JSON and safetensors, nothing that runs.

artifact.json            program class, prompts and demos, LMs, DSPy adapter, versions
adapters/NAME/           plain PEFT folders
report.json              the CompileReport, where the program has one
README.md                the model card
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import dspy

from ..engines.protocol import LocalEngine
from ..errors import ArtifactError, ModelError, RunDirectoryError
from ..files import atomic_folder, atomic_write, now
from ..printable import get_logger
from ..programs.copies import hang
from ..programs.program import parameters_of, prompt_adapter_name
from ..programs.signature_types import full_name
from ..report.report import CompileReport
from ..versions import versions
from .card import configure_call, model_card
from .folder import (
    CARD,
    MANIFEST,
    check_files,
    file_hashes,
    folder_argument,
    inside,
    put_in_place,
    read_json,
    recover,
    refuse_foreign,
)
from .manifest import SCHEMA, checked_manifest
from .saved_lm import BaseModel, compare_base, dump_lm, load_lm, require_content
from .saved_options import check_options
from .saved_program import dump_parameter, load_parameters, rebuild

logger = get_logger(__name__)

REPORT = "report.json"
_ADAPTER_FILES = (".json", ".safetensors", ".md", ".txt")


def save(program: dspy.Module, folder: str | os.PathLike[str]) -> Path:
    """Save a program; returns the folder.

    An artifact that is already there is replaced as a whole; any other folder that is not empty is refused. Base
    weights are not copied, the adapters are. Secrets (API keys, headers) are left out. Raises ArtifactError.
    """
    target = folder_argument(folder, "folder")
    require_module(program, "program")
    try:
        refuse_foreign(target)
        with atomic_folder(target, put_in_place) as work:
            write(program, work)
    except (OSError, RunDirectoryError) as error:
        raise ArtifactError(f"{target} can't be written: {error}. What was there before is unchanged.") from error
    return target


def load(
    folder: str | os.PathLike[str],
    into: dspy.Module | None = None,
    *,
    base_model: BaseModel | None = None,
    lms: Mapping[str, dspy.LM] | None = None,
    allow_unsafe_lm_state: bool = False,
) -> dspy.Module:
    """The program of a saved folder, with its LMs.

    Args:
        folder: What `save` wrote.
        into: A program of the saved structure; a copy of it gets the prompts. None makes a plain dspy.Predict or
            ChainOfThought anew, and any other program by its class, which must be imported already (nothing is
            imported that you did not import) and take no arguments.
        base_model: Folder, hub id or engine to use in place of the saved base model, as on another machine.
        lms: Predictor name to the LM to use in place of the saved one.
        allow_unsafe_lm_state: Also take options that may send prompts and keys elsewhere (endpoints, headers, ...)
            and custom LM classes from the file. Without it, only options of sampling are taken
            (`bettertogether.artifact.saved_options.SAMPLING`), others are an error. For files you trust.

    Raises ArtifactError when a file is damaged, is not the one that was saved, or reaches outside the folder, when
    `into` has another structure, or when an LM can't be made here. Adapters are served from `folder`, so leave it in
    place.
    """
    root = folder_argument(folder, "folder")
    manifest = _read_manifest(root)
    saved = manifest["predictors"]
    given = _given_lms(lms, saved)
    if into is not None:
        require_module(into, "into")
    if base_model is not None and not isinstance(base_model, str | Path | LocalEngine):
        raise ArtifactError(f"base_model={base_model!r:.100}: give a folder, a hub id or an engine.")
    for name, entry in saved.items():
        check_options(entry["config"] or {}, f"{root / MANIFEST}: the predictor {name!r}", allow=allow_unsafe_lm_state)
    program = load_parameters(rebuild(manifest["program"], saved) if into is None else into, saved)

    @functools.cache
    def saved_lm(key: str) -> dspy.LM:
        record = manifest["lms"][key]
        adapter = inside(root, record["adapter"]) if record["adapter"] else None
        return load_lm(record, adapter, base_model=base_model, allow_unsafe_lm_state=allow_unsafe_lm_state)

    for name, parameter in parameters_of(program).items():
        key = saved[name]["lm"]
        if isinstance(parameter, dspy.Predict) and (key is not None or name in given):
            parameter.lm = given[name] if name in given else saved_lm(key)
    report = _load_report(root, manifest["files"])
    if report is not None:
        hang(program, report=report)
    _compare_prompt_adapter(root, manifest["adapter"])
    return program


def require_module(value: object, name: str) -> None:
    """Raise ArtifactError for anything that is no module of DSPy's."""
    if not isinstance(value, dspy.Module):
        made = f"; make one: {value.__name__}()" if isinstance(value, type) else ""
        raise ArtifactError(f"{name} must be a program (a dspy.Module), got {value!r:.100}{made}.")


def _given_lms(lms: Mapping[str, dspy.LM] | None, saved: Mapping[str, Any]) -> dict[str, dspy.LM]:
    if not isinstance(lms, Mapping | None):
        raise ArtifactError(f"lms={lms!r:.100}: give a mapping of predictor name to dspy.LM.")
    given = dict(lms or {})
    if unknown := sorted(map(str, given.keys() - saved.keys())):
        raise ArtifactError(f"lms= names {unknown}, the saved predictors are {sorted(saved)}.")
    if wrong := {name: lm for name, lm in given.items() if not callable(lm)}:
        raise ArtifactError(f"lms= holds {wrong!r:.200}: give a dspy.LM for each predictor.")
    return given


def load_report(folder: str | os.PathLike[str]) -> CompileReport | None:
    """The CompileReport that was saved with a program, or None."""
    root = folder_argument(folder, "folder")
    manifest = inside(root, MANIFEST)
    return _load_report(root, read_json(manifest, checked_manifest)["files"] if manifest.exists() else None)


def _load_report(root: Path, files: Mapping[str, str] | None) -> CompileReport | None:
    """The report, unless it is not among the files that were saved: then it is another program's."""
    path = inside(root, REPORT)
    saved = path.exists() and (files is None or REPORT in files)
    return read_json(path, CompileReport.from_dict) if saved else None


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    predictor: str | None = None,
    base_model: str | Path | None = None,
) -> Path:
    """Write the tuned model of a saved program as a plain Hugging Face model, the adapter merged into the weights.

    `predictor` picks one where the program has several adapters; `base_model` is the folder or hub id to merge into, in
    place of the base that was saved. `out` must be new or empty. Raises ArtifactError.
    """
    return _merge(folder, out, predictor, base_model, gguf=False)


def save_gguf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    predictor: str | None = None,
    base_model: str | Path | None = None,
) -> Path:
    """Write the tuned model of a saved program for llama.cpp and Ollama: `out` gets model.gguf and a Modelfile.

    The weights are merged as in `merge` and keep the base's precision; tokenizer, chat template and special tokens are
    in the file. `ollama create NAME -f out/Modelfile` takes both; the Modelfile has the LM's temperature, top_p and
    top_k, and a context of 8,192 tokens at most: for longer prompts raise its num_ctx. Llama (with SmolLM2 and
    Mistral), SmolLM3, Qwen2, Qwen3, Gemma, Gemma 2 and Gemma 3 can be written.

    `predictor` picks one where the program has several adapters; `base_model` is the folder or hub id to merge into, in
    place of the base that was saved. `out` must be new or empty. Raises ArtifactError.
    """
    return _merge(folder, out, predictor, base_model, gguf=True)


def _merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    predictor: str | None,
    base_model: str | Path | None,
    *,
    gguf: bool,
) -> Path:
    root, target = folder_argument(folder, "folder"), folder_argument(out, "out")
    if not isinstance(base_model, str | Path | None):
        raise ArtifactError(f"base_model={base_model!r:.100}: give the base model's folder or hub id.")
    manifest = _read_manifest(root)
    record = manifest["lms"][_adapter_to_merge(manifest, predictor)]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} is not empty: give an `out` folder that is new or empty.")
    from ..engines.merging import Base, merge_adapter, merge_to_gguf

    adapter = inside(root, record["adapter"])
    require_content(adapter, record["model"])
    try:
        base = Base.at(base_model or record["base"])
        compare_base(record, base, chosen=base_model is not None)
        if gguf:
            template_kwargs = record["engine_options"].get("chat_template_kwargs")
            merge_to_gguf(base.base_name, adapter, target, template_kwargs, record["options"])
        else:
            merge_adapter(base.base_name, adapter, target)
    except (ModelError, RunDirectoryError) as error:
        raise ArtifactError(f"{root} can't be merged: {error}") from error
    return target


def _adapter_to_merge(manifest: Mapping[str, Any], predictor: str | None) -> str:
    saved = manifest["predictors"]
    if predictor is not None and (not isinstance(predictor, str) or predictor not in saved):
        raise ArtifactError(f"predictor={predictor!r} was not saved; there are {sorted(saved)}.")
    names = list(saved) if predictor is None else [predictor]
    keys = {saved[name]["lm"] for name in names} - {None}
    tuned = sorted(key for key in keys if manifest["lms"][key]["adapter"])
    if len(tuned) == 1:
        return tuned[0]
    owners = {name: manifest["lms"][saved[name]["lm"]]["model"] for name in names if saved[name]["lm"] in tuned}
    raise ArtifactError(
        f"Exactly one adapter can be merged, this program has {len(tuned)}: {owners}. "
        + ("Give predictor=... to pick one." if tuned else "Only a program that a weight step tuned has one.")
    )


def write(program: dspy.Module, work: Path, *, repo: str | None = None) -> None:
    """Write all files of an artifact into an empty folder; `repo` is the hub repository that they are for."""
    lms: dict[str, dict[str, Any]] = {}
    keys: dict[int, str] = {}
    predictors = {name: dump_parameter(name, parameter) for name, parameter in parameters_of(program).items()}
    for name, parameter in parameters_of(program).items():
        lm = parameter.lm if isinstance(parameter, dspy.Predict) else None
        if lm is None:
            continue
        if id(lm) not in keys:
            keys[id(lm)] = f"lm{len(keys)}"
            record, source = dump_lm(lm)
            adapter = None if source is None else _copy_adapter(source, lm.model, work)
            lms[keys[id(lm)]] = {**record, "adapter": adapter}
        predictors[name]["lm"] = keys[id(lm)]
    report = getattr(program, "report", None)
    if not isinstance(report, CompileReport):
        report = None
    if report is not None:
        atomic_write(work / REPORT, json.dumps(report.to_dict(), ensure_ascii=False))
    manifest = {
        "schema": SCHEMA,
        "created": now(),
        "program": full_name(type(program)),
        "adapter": (report and report.prompt_adapter) or prompt_adapter_name(),
        "predictors": predictors,
        "lms": lms,
        "versions": {"python": platform.python_version(), **versions()},
        "files": file_hashes(work),
    }
    atomic_write(work / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")
    # What is saved can be read: whatever is too odd for the reader is found here.
    atomic_write(work / CARD, model_card(read_json(work / MANIFEST, checked_manifest), report, repo, work))


def _copy_adapter(source: Path, model: str, work: Path) -> str:
    """Copy an adapter's own files (no checkpoints); returns its path inside the artifact, which is named by the
    adapter's content: two adapters may lie in folders of the same name."""
    relative = PurePosixPath("adapters", model.rpartition("@")[2].replace("/", "-"))
    folder = work / relative
    if folder.exists():
        return str(relative)
    folder.mkdir(parents=True)
    require_content(source, model)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _ADAPTER_FILES:
            atomic_write(folder / file.name, file.read_bytes())
    return str(relative)


def _compare_prompt_adapter(root: Path, saved: str) -> None:
    if saved != prompt_adapter_name():
        logger.warning(
            "%s was made under %s and is loaded under %s: to get the prompts it was tuned with, use %s.",
            root,
            saved,
            prompt_adapter_name(),
            configure_call(saved),
        )


def _read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of an artifact whose files are those that were saved. Raises ArtifactError."""
    recover(root)
    path = inside(root, MANIFEST)
    if not path.exists():
        raise ArtifactError(f"{root} holds no {MANIFEST}: give a folder that bettertogether saved.")
    manifest = read_json(path, checked_manifest)
    if manifest["files"] is None:
        logger.warning(
            "%s was saved by an earlier version, without hashes of its files: damage may go unseen. Save again.",
            root,
        )
    for record in manifest["lms"].values():
        if record["adapter"] is not None and not inside(root, record["adapter"]).is_dir():
            raise ArtifactError(f"{root / record['adapter']} is not there: copy the whole folder again.")
    check_files(root, manifest["files"] or {})
    return manifest
