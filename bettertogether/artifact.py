"""A compiled program as one folder: prompts, demos, adapters, scores. JSON and safetensors, nothing that runs.

artifact.json            program class, prompts and demos, LMs, DSPy adapter, versions
adapters/NAME/           plain PEFT folders
report.json              the CompileReport, where the program has one
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import dspy

from .errors import ArtifactError, RunDirectoryError
from .files import atomic_write, now
from .printable import get_logger
from .report import CompileReport
from .saved_lm import BaseModel, dump_lm, load_lm
from .saved_program import class_path, dump_parameter, load_prompts, parameters_of, rebuild

logger = get_logger(__name__)

SCHEMA = 1
"""Version of artifact.json; a newer one is refused."""

MANIFEST = "artifact.json"
_ADAPTER_FILES = (".json", ".safetensors", ".md", ".txt")
_PACKAGES = ("bettertogether", "dspy", "torch", "transformers", "peft")


def save(program: dspy.Module, folder: str | os.PathLike[str]) -> Path:
    """Save a program; returns the folder.

    An artifact that is already there is replaced as a whole; any other folder that is not empty is refused. Base
    weights are not copied, the adapters are. Secrets (API keys, headers) are left out. Raises ArtifactError.
    """
    target = Path(folder).expanduser().absolute()
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        _write(program, work)
        _swap(work, target)
    except (OSError, RunDirectoryError) as error:
        raise ArtifactError(f"{target} can't be written: {error}. What was there before is unchanged.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
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
        into: A program of the saved structure; a copy of it gets the prompts. None makes the program from the saved
            class, which must be importable and take no arguments (or be a plain dspy.Predict or ChainOfThought).
        base_model: Folder, hub id or engine to use in place of the saved base model, as on another machine.
        lms: Predictor name to the LM to use in place of the saved one.
        allow_unsafe_lm_state: As in DSPy: accept saved endpoints and custom LM classes. For files you trust.

    Raises ArtifactError when the folder is damaged or reaches outside itself, when `into` has another structure, or
    when an LM can't be made here. Adapters are served from `folder`, so leave it in place.
    """
    root = Path(folder).expanduser().absolute()
    manifest = _read_manifest(root)
    saved = manifest["predictors"]
    program = load_prompts(rebuild(manifest["program"], saved) if into is None else into, saved)
    given = dict(lms or {})
    if unknown := sorted(given.keys() - saved.keys()):
        raise ArtifactError(f"lms= names {unknown}, the saved predictors are {sorted(saved)}.")

    @functools.cache
    def saved_lm(key: str) -> dspy.LM:
        record = manifest["lms"][key]
        adapter = _inside(root, record["adapter"]) if record.get("adapter") else None
        return load_lm(record, adapter, base_model=base_model, allow_unsafe_lm_state=allow_unsafe_lm_state)

    for name, parameter in parameters_of(program).items():
        key = saved[name].get("lm")
        if isinstance(parameter, dspy.Predict) and (key is not None or name in given):
            parameter.lm = given[name] if name in given else saved_lm(key)
    report = load_report(root)
    if report is not None:
        program.report = report
    _compare_adapter(root, manifest["adapter"])
    return program


def load_report(folder: str | os.PathLike[str]) -> CompileReport | None:
    """The CompileReport that was saved with a program, or None."""
    path = _inside(Path(folder).expanduser().absolute(), "report.json")
    if not path.exists():
        return None
    return _parsed(path, lambda data: CompileReport.from_dict(data))


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    predictor: str | None = None,
    base_model: str | Path | None = None,
) -> Path:
    """Write the tuned model of a saved program as a plain Hugging Face model, the adapter merged into the weights.

    `predictor` picks one where the program has several adapters. `out` must be new or empty. Raises ArtifactError.
    """
    root, target = Path(folder).expanduser().absolute(), Path(out).expanduser().absolute()
    manifest = _read_manifest(root)
    record = manifest["lms"][_adapter_to_merge(manifest, predictor)]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} is not empty: give an `out` folder that is new or empty.")
    from .engines.merging import merge_adapter

    merge_adapter(base_model or record["base"], _inside(root, record["adapter"]), target)
    return target


def _adapter_to_merge(manifest: Mapping[str, Any], predictor: str | None) -> str:
    saved = manifest["predictors"]
    if predictor is not None and predictor not in saved:
        raise ArtifactError(f"predictor={predictor!r} was not saved; there are {sorted(saved)}.")
    names = list(saved) if predictor is None else [predictor]
    keys = {saved[name].get("lm") for name in names} - {None}
    tuned = sorted(key for key in keys if manifest["lms"][key].get("adapter"))
    if len(tuned) == 1:
        return tuned[0]
    owners = {name: manifest["lms"][saved[name]["lm"]]["model"] for name in names if saved[name].get("lm") in tuned}
    raise ArtifactError(
        f"Exactly one adapter can be merged, this program has {len(tuned)}: {owners}. "
        + ("Give predictor=... to pick one." if tuned else "Only a program that a weight step tuned has one.")
    )


def _write(program: dspy.Module, work: Path) -> None:
    lms: dict[str, dict[str, Any]] = {}
    keys: dict[int, str] = {}
    predictors = {name: dump_parameter(name, parameter) for name, parameter in parameters_of(program).items()}
    for name, parameter in parameters_of(program).items():
        lm = parameter.lm if isinstance(parameter, dspy.Predict) else None
        if lm is None:
            continue
        if id(lm) not in keys:
            keys[id(lm)] = f"lm{len(keys)}"
            saved = dump_lm(lm)
            adapter = None if saved.adapter is None else _copy_adapter(saved.adapter, lm.model, work)
            lms[keys[id(lm)]] = {**saved.record, "adapter": adapter}
        predictors[name]["lm"] = keys[id(lm)]
    report = getattr(program, "report", None)
    if isinstance(report, CompileReport):
        atomic_write(work / "report.json", json.dumps(report.to_dict(), ensure_ascii=False))
    manifest = {
        "schema": SCHEMA,
        "created": now(),
        "program": class_path(program),
        "adapter": _adapter_name(),
        "predictors": predictors,
        "lms": lms,
        "versions": _versions(),
    }
    atomic_write(work / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")


def _copy_adapter(source: Path, model: str, work: Path) -> str:
    """Copy an adapter's own files (no checkpoints); returns its path inside the artifact, which is named by the
    adapter's content: two adapters may lie in folders of the same name."""
    relative = PurePosixPath("adapters", model.rpartition("@")[2].replace("/", "-"))
    folder = work / relative
    if folder.exists():
        return str(relative)
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _ADAPTER_FILES:
            atomic_write(folder / file.name, file.read_bytes())
    return str(relative)


def _adapter_name() -> str:
    adapter = dspy.settings.adapter
    return type(adapter).__name__ if adapter is not None else "ChatAdapter"


def _compare_adapter(root: Path, saved: str) -> None:
    if saved != _adapter_name():
        logger.warning(
            "%s was saved under %s and is loaded under %s: to get the prompts it was tuned with, use "
            "dspy.configure(adapter=dspy.%s()).",
            root,
            saved,
            _adapter_name(),
            saved,
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _refuse_foreign(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise ArtifactError(f"{target} is not a folder: give a folder that is new, empty, or an earlier artifact.")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} is not empty and holds no {MANIFEST}: it is left alone. Give a folder that is new, empty, or "
            "an earlier artifact."
        )


def _swap(work: Path, target: Path) -> None:
    """Put the new folder in the place of the old one, which comes back if that fails."""
    work.chmod(0o755)
    if not target.exists():
        os.replace(work, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", suffix=".tmp", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(work, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _inside(root: Path, name: str) -> Path:
    """A path of the artifact, from a name in its files. Raises ArtifactError for one that leaves it."""
    parts = PurePosixPath(name).parts
    path = root.joinpath(*parts)
    outside = PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name or not parts
    linked = any(part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(root) and part != root)
    inner_links = [inner.name for inner in path.rglob("*") if inner.is_symlink()] if path.is_dir() else []
    if outside or linked or inner_links or not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(
            f"{root}: {name!r} reaches outside the folder (absolute, '..' or a link). Nothing was read from there; "
            "load only artifacts whose files are their own."
        )
    return path


def _read_manifest(root: Path) -> dict[str, Any]:
    path = _inside(root, MANIFEST)
    if not path.is_file():
        raise ArtifactError(f"{root} holds no {MANIFEST}: give a folder that bettertogether saved.")
    return _parsed(path, _checked_manifest)


def _checked_manifest(data: Any) -> dict[str, Any]:
    schema = data["schema"]
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtifactError(
            f"The artifact has schema {schema!r}, this version reads up to {SCHEMA}: pip install -U bettertogether."
        )
    manifest = {key: data[key] for key in ("program", "adapter", "predictors", "lms", "versions")}
    for name, predictor in manifest["predictors"].items():
        if "state" not in predictor:
            raise KeyError(f"state of {name}")
        if predictor.get("lm") is not None and predictor["lm"] not in manifest["lms"]:
            raise KeyError(f"LM {predictor['lm']} of {name}")
    return manifest


def _parsed(path: Path, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged ({error!r}): save the program again.") from error
