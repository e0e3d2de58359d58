"""An LM as JSON and back: a local model as base and adapter, any other by DSPy's own state, without its secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.base_lm import BaseLM

from ..engines.answer_format import plain_format
from ..engines.protocol import LocalEngine
from ..errors import ArtifactError, ConfigError, ModelError, UnknownAdapterError
from ..lm import engine_lm, local_engine, local_lm
from ..printable import get_logger
from ..redaction import split_secrets
from ..training.adapter_settings import CONFIG_FILE
from .saved_options import check_engine_options, check_lm_state

logger = get_logger(__name__)

BaseModel = str | Path | LocalEngine
"""What may stand in for a saved base model: a folder, a hub id, or an engine that holds it."""

_NOT_OPTIONS = frozenset({
    "class", "_dspy_lm_class", "model", "engine", "async_engine", "finetuning_model", "launch_kwargs", "train_kwargs",
    "prompt_cache", "tools",
})  # fmt: skip
"""Of a local LM's state; the last two change no answer of an engine, which takes no tools but none."""


def dump_lm(lm: Any) -> tuple[dict[str, Any], Path | None]:
    """The record of an LM, as JSON, and the folder of its adapter where it has one. Raises ArtifactError for one that
    can't be saved."""
    engine = local_engine(lm)
    if engine is None:
        return {"kind": "dspy", "state": _without_secrets(lm)}, None
    try:
        adapter = engine.adapter_folder(lm.model)
    except UnknownAdapterError as error:
        raise ArtifactError(f"{lm.model} can't be saved, its engine no longer holds the adapter: {error}") from error
    state = engine.dump_state()
    record = {
        "kind": "local",
        "base_name": engine.base_name,
        "base_hash": engine.base_hash,
        "base": state.get("model", engine.base_name),
        "model": lm.model,
        "options": {key: value for key, value in _without_secrets(lm).items() if key not in _NOT_OPTIONS},
        "engine_options": _engine_options(state),
    }
    return record, adapter


def _engine_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide an engine's answers. The precision goes along only where it was chosen: another machine
    has its own default (`engines.loading.pick_dtype`, whose torch is not needed here)."""
    usual = "float32" if str(state.get("device", "cpu")).startswith("cpu") else "bfloat16"
    chosen = {"chat_template_kwargs": state.get("chat_template_kwargs"), "dtype": state.get("dtype", usual)}
    return {name: value for name, value in chosen.items() if value not in (None, usual)}


def _without_secrets(lm: Any) -> dict[str, Any]:
    try:
        state: dict[str, Any] = lm.dump_state()
        if "response_format" in state:
            state["response_format"] = plain_format(state["response_format"])
        kept, secret = split_secrets(state)
        json.dumps(kept, allow_nan=False)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"The LM {getattr(lm, 'model', lm)!r} can't be saved: {error}") from error
    if secret:
        logger.warning("%s is saved without %s: give them again when it is loaded.", lm.model, sorted(secret))
    return dict(kept)


def load_lm(
    record: Mapping[str, Any], adapter: Path | None, *, base_model: BaseModel | None, allow_unsafe_lm_state: bool
) -> dspy.LM:
    """The LM of a record. Raises ArtifactError with what to give instead when it can't be made here."""
    if record["kind"] == "local":
        return _load_local(record, adapter, base_model, allow_unsafe_lm_state)
    state = dict(record["state"])
    owner = f"The LM {state.get('model')!r}"
    check_lm_state(state, owner, allow=allow_unsafe_lm_state)
    try:
        return BaseLM.load_state(state, allow_custom_lm_class=allow_unsafe_lm_state)
    except Exception as error:
        raise ArtifactError(
            f"{owner} can't be made here: {type(error).__name__}: {error}. Give it yourself: lms={{predictor: lm}}."
        ) from error


def _load_local(
    record: Mapping[str, Any], adapter: Path | None, base_model: BaseModel | None, allow_unsafe_lm_state: bool
) -> dspy.LM:
    options, owner = dict(record["options"]), f"The LM {record['model']!r}"
    check_lm_state(options, owner, allow=allow_unsafe_lm_state)
    engine = _engine(record["base"] if base_model is None else base_model, record["engine_options"])
    compare_base(record, engine, chosen=base_model is not None)
    try:
        lm: dspy.LM = engine_lm(engine, _adapter_model(engine, record, adapter), **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{owner} can't be made with the options {options!r:.300}: {error}") from error
    return lm


def _engine(base: BaseModel, options: Mapping[str, Any]) -> LocalEngine:
    checked = check_engine_options(options)
    if isinstance(base, LocalEngine):
        return base
    try:
        engine: LocalEngine = local_lm(base, engine_options=checked).engine
    except ModelError as error:
        raise ArtifactError(
            f"The base model {str(base)!r} is not here ({error}). Give its folder or hub id: "
            "load(folder, base_model=...)."
        ) from error
    except ConfigError as error:
        raise ArtifactError(
            f"The base model {str(base)!r} can't be had with the options that the program was saved with, "
            f"{checked or 'the defaults'} ({error}). Where it is loaded with others, close that engine first, "
            "lm.engine.close(), or use it as it is, load(folder, base_model=lm.engine)."
        ) from error
    return engine


def _adapter_model(engine: LocalEngine, record: Mapping[str, Any], adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    require_content(adapter, record["model"])
    try:
        return engine.add_adapter(adapter)
    except (ModelError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"The adapter in {adapter} can't be served: {error}") from error


def compare_base(record: Mapping[str, Any], found: Any, *, chosen: bool) -> None:
    """Warn where `found` (an engine, or anything with a `base_hash` and `base_name`) is another base than the one
    recorded. Raises ArtifactError for an adapter whose base was changed in its place: its answers would be wrong."""
    if _same_base(found, record):
        return
    if record["adapter"] is not None and not chosen and record["base_hash"] is not None:
        raise ArtifactError(
            f"The base model {record['base']!r} is not the one that the adapter {record['model']} was trained on: its "
            "files have changed since. Bring them back, or name the base to use: base_model=..."
        )
    logger.warning(
        "The program was saved with base model %s and is loaded with %s: an adapter gives wrong answers on a base "
        "that it was not trained on.",
        record["base_name"],
        found.base_name,
    )


def _same_base(engine: Any, record: Mapping[str, Any]) -> bool:
    """Whether an engine holds the base that a record names; records of older versions know only its folder's name."""
    if record.get("base_hash") is not None:
        return bool(engine.base_hash == record["base_hash"])
    return record["base_name"] in (engine.base_name, engine.short_name)


def require_content(adapter: Path, model: str) -> None:
    """Raise ArtifactError unless an adapter folder holds what the model's name, which ends in a hash, stands for."""
    if not (adapter / CONFIG_FILE).exists():
        return
    from ..training.adapter_folder import content_hash

    try:
        found = content_hash(adapter)
    except (ModelError, OSError) as error:
        raise ArtifactError(f"The adapter in {adapter} can't be read: {error}") from error
    recorded = model.rpartition("-")[2]
    if not found.startswith(recorded):
        raise ArtifactError(
            f"{adapter} does not hold the adapter {model}: its content has the hash {found[: len(recorded)]}. It was "
            "damaged or changed; use another copy of it."
        )
