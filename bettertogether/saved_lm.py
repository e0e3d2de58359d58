"""An LM as JSON and back: a local model as base and adapter, any other by DSPy's own state, without its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.base_lm import BaseLM

from .engines.base import LocalEngine
from .errors import ArtifactError, ModelError, UnknownAdapterError
from .lm import engine_lm, local_engine, local_lm
from .printable import get_logger

logger = get_logger(__name__)

BaseModel = str | Path | LocalEngine
"""What may stand in for a saved base model: a folder, a hub id, or an engine that holds it."""

_SECRET = re.compile(r"(^|_)(key|secret|password|token|credentials?|headers|authorization)($|_)")
_ENDPOINT = ("api_base", "base_url", "model_list")
_NOT_OPTIONS = frozenset(
    {"class", "_dspy_lm_class", "model", "engine", "async_engine", "finetuning_model", "launch_kwargs", "train_kwargs"}
)


@dataclass(frozen=True)
class SavedLM:
    """JSON record of an LM, and the folder of its adapter where it has one."""

    record: dict[str, Any]
    adapter: Path | None = None


def dump_lm(lm: Any) -> SavedLM:
    """The record of an LM. Raises ArtifactError for one that can't be saved."""
    engine = local_engine(lm)
    if engine is None:
        return SavedLM({"kind": "dspy", "state": _without_secrets(lm)})
    try:
        adapter = engine.adapter_folder(lm.model)
    except UnknownAdapterError as error:
        raise ArtifactError(f"{lm.model} can't be saved, its engine no longer holds the adapter: {error}") from error
    state = engine.dump_state()
    record = {
        "kind": "local",
        "base_name": engine.base_name,
        "base": state.get("model", engine.base_name),
        "model": lm.model,
        "options": {key: value for key, value in _without_secrets(lm).items() if key not in _NOT_OPTIONS},
        "engine_options": _engine_options(state),
    }
    return SavedLM(record, adapter)


def _engine_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide an engine's answers. The precision goes along only where it was chosen: another machine
    has its own default."""
    usual = "bfloat16" if str(state.get("device", "")).startswith("cuda") else "float32"
    chosen = {"chat_template_kwargs": state.get("chat_template_kwargs"), "dtype": state.get("dtype", usual)}
    return {name: value for name, value in chosen.items() if value not in (None, usual)}


def _without_secrets(lm: Any) -> dict[str, Any]:
    try:
        state: dict[str, Any] = lm.dump_state()
    except (TypeError, AttributeError) as error:
        raise ArtifactError(f"The LM {getattr(lm, 'model', lm)!r} can't be saved: {error}") from error
    kept, secret = _split(state)
    if secret:
        logger.warning("%s is saved without %s: give them again when it is loaded.", lm.model, sorted(secret))
    return kept


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The options without those that look like secrets, at any depth, and the names of those left out."""
    kept: dict[str, Any] = {}
    secret = set()
    for name, value in options.items():
        if _SECRET.search(str(name).lower()):
            secret.add(str(name))
        elif isinstance(value, Mapping):
            kept[name], inner = _split(value)
            secret |= inner
        else:
            kept[name] = value
    return kept, secret


def load_lm(
    record: Mapping[str, Any], adapter: Path | None, *, base_model: BaseModel | None, allow_unsafe_lm_state: bool
) -> dspy.LM:
    """The LM of a record. Raises ArtifactError with what to give instead when it can't be made here."""
    if record["kind"] == "local":
        return _load_local(record, adapter, base_model)
    state = dict(record["state"])
    endpoints = [key for key in _ENDPOINT if key in state]
    if endpoints and not allow_unsafe_lm_state:
        # Dropping the endpoint, as DSPy does, would send the user's data to the provider's public service instead.
        raise ArtifactError(
            f"The saved LM {state.get('model')!r} talks to the endpoint {[state[key] for key in endpoints]}. If you "
            "trust this file, give allow_unsafe_lm_state=True; otherwise give the LM: lms={predictor: lm}."
        )
    try:
        return BaseLM.load_state(state, allow_custom_lm_class=allow_unsafe_lm_state)
    except (ValueError, TypeError, ImportError) as error:
        raise ArtifactError(
            f"The saved LM {state.get('model')!r} can't be made here: {error}. Give it yourself: lms={{predictor: lm}}."
        ) from error


def _load_local(record: Mapping[str, Any], adapter: Path | None, base_model: BaseModel | None) -> dspy.LM:
    options = dict(record["options"])
    base = record["base"] if base_model is None else base_model
    if isinstance(base, LocalEngine):
        lm: dspy.LM = engine_lm(base, base.add_adapter(adapter) if adapter else None, **options)
    else:
        try:
            lm = local_lm(base, adapter=adapter, engine_options=record["engine_options"], **options)
        except ModelError as error:
            raise ArtifactError(
                f"The base model {str(base)!r} is not here ({error}). Give its folder or hub id: "
                "load(folder, base_model=...)."
            ) from error
    engine = local_engine(lm)
    if engine is not None and engine.base_name != record["base_name"]:
        logger.warning(
            "The program was saved with base model %s and is loaded with %s: an adapter gives wrong answers on a base "
            "that it was not trained on.",
            record["base_name"],
            engine.base_name,
        )
    return lm
