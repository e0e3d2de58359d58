"""Train an adapter on the model that an engine holds, and name its folder by its content."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NoTrainingDataError
from ..printable import get_logger
from ..training.adapter_folder import WEIGHTS_FILE, content_hash, holds_content, write_round
from ..training.adapter_settings import CONFIG_FILE
from ..training.arrow_rows import kept
from ..training.config import ALL_LINEAR, LoRAConfig, TrainingConfig
from ..training.packing import TokenizedRow
from ..training.precision import require_four_bit
from ..training.progress import ProgressFunction
from ..training.targets import check_targets
from ..working_folders import working_folder
from .loading import ModelCard, meta_model
from .protocol import FinetuneResult, TrainingRow, adapter_model_name

if TYPE_CHECKING:
    from .base_engine import BaseEngine

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that a training needs but the model."""

    rows: Sequence[TokenizedRow]
    validation_rows: Sequence[TokenizedRow]
    lora: LoRAConfig
    training: TrainingConfig
    start_from: Path | None
    round_number: int
    parent: Path
    """Where the adapter's folder goes."""
    skipped_rows: tuple[tuple[int, str], ...]


def check_training(card: ModelCard, device: torch.device, lora: LoRAConfig | None, training: TrainingConfig) -> None:
    """Refuse what a model's config and the device show to be no training; see `CheckingEngine.check_training`."""
    if lora is not None and lora.target_modules != ALL_LINEAR:
        check_targets(meta_model(card.config), lora.target_modules)
    if training.quantize_base is not None and not training.launched:
        require_four_bit(device)


def tokens_of(
    engine: BaseEngine, rows: Sequence[TrainingRow], skipped: list[tuple[int, str]]
) -> Iterator[TokenizedRow]:
    """Rows as tokens, one by one; those that are too long for the model are added to `skipped` as (index, reason). Of
    the others' forms those are left out that are too long."""
    long_forms = 0
    for index, row in enumerate(rows):
        prompt_ids, completion_ids = engine.prompt_tokens(row.messages), engine.completion_tokens(row.completion)
        rejected_ids = [] if row.rejected is None else engine.completion_tokens(row.rejected)
        length = len(prompt_ids) + max(len(completion_ids), len(rejected_ids))
        if length > engine.max_length:
            skipped.append((index, f"prompt+completion {length} tokens > max_length {engine.max_length}"))
            continue
        forms = [engine.prompt_tokens(form) for form in row.forms]
        fitting = [form for form in forms if len(form) + len(completion_ids) <= engine.max_length]
        long_forms += len(forms) - len(fitting)
        forced = engine.forced_tokens(row.completion, row.response_format)
        yield TokenizedRow(
            prompt_ids,
            completion_ids,
            forms=fitting,
            forced=forced,
            fields=_fields(engine, row),
            rejected_ids=rejected_ids,
            rejected_forced=[] if row.rejected is None else engine.forced_tokens(row.rejected, row.response_format),
        )
    if long_forms:
        logger.warning(
            "Left out of the training: %d of %d prompts with demos, too long for %s (%d tokens).",
            long_forms,
            sum(len(row.forms) for row in rows),
            engine.base_name,
            engine.max_length,
        )


def _fields(engine: BaseEngine, row: TrainingRow) -> list[str]:
    """The output field that each completion token has a character of, or ""."""
    if not row.fields:
        return []
    return [
        next((field.name for field in row.fields if start < field.end and field.start < end), "")
        for start, end in engine.completion_places(row.completion)
    ]


def prepare(
    engine: BaseEngine,
    rows: Sequence[TrainingRow],
    validation_rows: Sequence[TrainingRow],
    lora: LoRAConfig,
    training: TrainingConfig,
    start_from: tuple[int, Path | None],
    parent: Path,
    tokens: Path,
) -> TrainingJob:
    """Tokenize the rows. Raises NoTrainingDataError where none is left.

    `start_from` is the model to continue from: its round, and its folder where it is an adapter. `tokens` is a folder
    for the tokens of many rows, which has to stay until the job is done.
    """
    skipped: list[tuple[int, str]] = []
    some = kept(tokens_of(engine, rows, skipped), len(rows), tokens / "rows.arrow")
    if not some:
        raise NoTrainingDataError(
            f"There is nothing to train on: {len(rows)} rows came, {len(skipped)} of them too long for "
            f"{engine.base_name} ({engine.max_length} tokens). Give more rows, or shorter ones (fewer demos)."
        )
    validation = kept(tokens_of(engine, validation_rows, []), len(validation_rows), tokens / "validation_rows.arrow")
    round_number, folder = start_from
    return TrainingJob(
        rows=some,
        validation_rows=validation,
        lora=lora,
        training=training,
        start_from=folder,
        round_number=round_number + 1,
        parent=parent,
        skipped_rows=tuple(skipped),
    )


def train(
    engine: BaseEngine, job: TrainingJob, model: Any, source: str, on_progress: ProgressFunction | None
) -> FinetuneResult:
    """Run a training. `model` is trained in this process; None trains `source` in processes of their own."""
    with working_folder(job.parent, f"training-{_digest(job, engine.base_name)}") as work:
        trained = _run(job, model, source, work, on_progress)
        # The checkpoint stays behind, for the same call after a kill.
        finished = work / "finished"
        finished.mkdir(exist_ok=True)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(trained.folder / file, finished / file)
        name, target = named_by_content(finished, engine.base_name, job.round_number, job.parent)
    return FinetuneResult(
        model=name,
        folder=target,
        history=tuple(trained.history),
        best_epoch=trained.best_epoch,
        tokens=trained.tokens,
        seconds=trained.seconds,
        base_validation_loss=trained.base_validation_loss,
        validation_loss=trained.validation_loss,
        skipped_rows=job.skipped_rows,
        out_of_time=trained.out_of_time,
        **_other_losses(trained.base, trained.best),
    )


def _other_losses(base: Any, best: Any) -> dict[str, Any]:
    """What else of a result the held-out losses give."""
    if base is None:
        return {}
    fields = {name: (before, best.fields[name]) for name, before in base.fields.items()}
    return {
        "all_tokens_loss": (base.all_tokens, best.all_tokens),
        "validation_error": (base.error, best.error),
        "field_losses": fields,
    }


def _run(job: TrainingJob, model: Any, source: str, folder: Path, on_progress: ProgressFunction | None) -> Any:
    options: dict[str, Any] = {
        "validation_rows": job.validation_rows,
        "lora": job.lora,
        "training": job.training,
        "folder": folder,
        "start_from": job.start_from,
        "on_progress": on_progress,
    }
    if model is None:
        from ..training.launcher import launch

        return launch(source, job.rows, **options)
    from ..training.trainer import train_adapter

    return train_adapter(model, job.rows, **options)


def _digest(job: TrainingJob, base_name: str) -> str:
    """A short name for what a training job asks."""
    start_from = None if job.start_from is None else content_hash(job.start_from)
    asked = [base_name, start_from, len(job.rows), job.lora.to_dict(), job.training.recipe().to_dict()]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for row in itertools.chain(job.rows, job.validation_rows):
        digest.update(json.dumps(vars(row)).encode())
    return digest.hexdigest()[:12]


def named_by_content(folder: Path, base_name: str, round_number: int, parent: Path) -> tuple[str, Path]:
    """Put a finished adapter into a folder under `parent` that is named by its content; its model name, and where it
    is."""
    write_round(folder, round_number, base_name)
    content = content_hash(folder)
    name = adapter_model_name(base_name, round_number, content)
    return name, move_by_content(folder, parent / name.partition("/")[2], content)


def move_by_content(source: Path, target: Path, content: str) -> Path:
    """Rename a finished folder to its content's name. The same content that is there already stays; what is damaged
    there makes room."""
    if target.exists():
        if holds_content(target, content):
            shutil.rmtree(source)
            return target
        logger.warning("%s was damaged; the adapter that was trained again takes its place.", target)
        shutil.rmtree(target)
    try:
        os.replace(source, target)
    except OSError:
        # Another process was quicker.
        if not holds_content(target, content):
            raise
        shutil.rmtree(source)
    return target
