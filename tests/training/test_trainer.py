"""Training equals a plain loop over padded batches, whatever its batches, and goes on after a kill."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import padded_loss_sum, relative_error
from safetensors.torch import load_file
from tiny import GEMMA2, fingerprint, random_rows, tiny_model

from bettertogether.errors import ConfigError, DataError, NoTrainingDataError, TrainingError
from bettertogether.training import LoRAConfig, TrainingConfig
from bettertogether.training.adapter import training_adapter
from bettertogether.training.packing import TokenizedRow, epoch_batches
from bettertogether.training.progress import TrainingProgress
from bettertogether.training.trainer import TrainingResult, learning_rate, train_adapter

ROWS = random_rows(20, shared=20)
HELD_OUT = random_rows(6, shared=20)
FAST = TrainingConfig(learning_rate=1e-2, epochs=3, dtype="float32", batch_size=8)


def train(folder: Path, training: TrainingConfig = FAST, rows: Any = ROWS, **options: Any) -> TrainingResult:
    model = options.pop("model", None) or tiny_model()
    return train_adapter(model, rows, folder=folder, training=training, **options)


def held_out_losses(result: TrainingResult) -> tuple[float, float]:
    """Before training, and of the weights kept."""
    assert result.base_validation_loss is not None
    assert result.validation_loss is not None
    return result.base_validation_loss, result.validation_loss


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def difference(first: Path, second: Path) -> float:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def reference_training(lora: LoRAConfig, training: TrainingConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training written plainly: padded batches, peft's own layers, torch's AdamW."""
    model, rate, epochs = tiny_model(), training.learning_rate, training.epochs
    assert isinstance(rate, float)
    assert isinstance(epochs, int)
    with training_adapter(model, lora, training.seed) as adapter:
        parameters = list(adapter.parameters.values())
        betas, decay = (0.9, training.adam_beta2), training.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay)
        losses, step = [], 0
        steps = epochs * math.ceil(len(ROWS) / training.batch_size)
        for epoch in range(1, epochs + 1):
            for indices in epoch_batches(len(ROWS), training.batch_size, training.seed, epoch):
                step += 1
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, training)
                rows = [ROWS[index] for index in indices]
                loss = padded_loss_sum(model, rows) / sum(len(row.completion_ids) for row in rows)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                losses.append(loss.item())
        return losses, adapter.state()


def test_training_equals_a_plain_loop_over_padded_batches(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8)
    training = TrainingConfig(
        learning_rate=1e-2, epochs=3, dtype="float32", weight_decay=0.1, adam_beta2=0.9, scheduler="cosine"
    )
    losses, state = reference_training(lora, training)
    result = train(tmp_path, training, lora=lora)
    assert [line.loss for line in result.history] == pytest.approx(losses, rel=1e-4)
    found = weights(tmp_path)
    assert relative_error([found[key] for key in sorted(found)], [state[key] for key in sorted(state)]) < 1e-3


def test_splitting_a_batch_changes_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    split = train(tmp_path / "split", replace(FAST, max_tokens_per_batch=60))
    assert split.tokens > whole.tokens
    assert [line.loss for line in split.history] == pytest.approx([line.loss for line in whole.history], rel=1e-4)
    assert difference(tmp_path / "whole", tmp_path / "split") < 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random.seed(name)
        torch.manual_seed(len(name))
        train(tmp_path / name, replace(FAST, seed=seed))
    assert difference(tmp_path / "a", tmp_path / "b") == 0
    assert difference(tmp_path / "a", tmp_path / "c") > 1e-3


def test_the_adapter_that_is_written_has_the_held_out_loss_that_is_reported(tmp_path: Path) -> None:
    base, found = held_out_losses(train(tmp_path, validation_rows=HELD_OUT))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    tokens = sum(len(row.completion_ids) for row in HELD_OUT)
    with torch.no_grad():
        assert float(padded_loss_sum(loaded, HELD_OUT)) / tokens == pytest.approx(found, rel=1e-5)
        base_loss = float(padded_loss_sum(tiny_model(), HELD_OUT)) / tokens
    assert base == pytest.approx(base_loss, rel=1e-5)
    assert found < base_loss


def test_history_has_a_line_per_step_and_one_per_held_out_loss(tmp_path: Path) -> None:
    lines: list[TrainingProgress] = []
    result = train(tmp_path, validation_rows=HELD_OUT, on_progress=lines.append)
    assert tuple(lines) == result.history
    assert [(line.step, line.loss is None) for line in lines] == [
        (0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True),
        (7, False), (8, False), (9, False), (9, True),
    ]  # fmt: skip
    assert {line.total_steps for line in lines} == {9}
    assert lines[-1].epoch == 3.0
    assert lines[-1].tokens == result.tokens
    tokens = [line.tokens for line in lines if line.loss is not None]
    assert tokens == sorted(set(tokens))


def test_dropout_is_in_force_in_steps_and_not_where_losses_are_measured(tmp_path: Path) -> None:
    training = replace(FAST, epochs=2, scheduler="constant", keep_best=False)
    result = train(tmp_path, training, ROWS[:8], validation_rows=ROWS[:8], lora=LoRAConfig(dropout=0.5))
    first, second = (line.loss for line in result.history if line.loss is not None)
    before, between, after = (line.validation_loss for line in result.history if line.loss is None)
    assert first == pytest.approx(before, rel=1e-5)  # The adapter changes nothing yet.
    assert second != pytest.approx(between, rel=1e-2)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    with torch.no_grad():
        mean = float(padded_loss_sum(loaded, ROWS[:8])) / sum(len(row.completion_ids) for row in ROWS[:8])
    assert after == pytest.approx(mean, rel=1e-5)


def overfitting(keep_best: bool) -> TrainingConfig:
    return TrainingConfig(learning_rate=0.03, epochs=4, dtype="float32", keep_best=keep_best, scheduler="constant")


def test_keep_best_keeps_the_epoch_with_the_lowest_held_out_error(tmp_path: Path) -> None:
    held_out = random_rows(6, shared=20, seed=9)
    result = train(tmp_path, overfitting(keep_best=True), validation_rows=held_out)
    lines = [line for line in result.history if line.validation_error is not None][1:]
    best = min(lines, key=lambda line: line.validation_error or 1.0)
    assert best.epoch == result.best_epoch < 4
    assert result.validation_loss == best.validation_loss
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    with torch.no_grad():
        mean = float(padded_loss_sum(loaded, held_out)) / sum(len(row.completion_ids) for row in held_out)
    assert mean == pytest.approx(best.validation_loss, rel=1e-4)


def test_without_keep_best_the_last_epoch_is_kept(tmp_path: Path) -> None:
    result = train(tmp_path, overfitting(keep_best=False), validation_rows=random_rows(6, shared=20, seed=9))
    assert result.best_epoch == 4
    assert result.validation_loss == result.history[-1].validation_loss


class Killed(BaseException):
    pass


def kill_at(step: int) -> Any:
    def on_progress(line: TrainingProgress) -> None:
        if line.step == step:
            raise Killed

    return on_progress


INTERRUPTED: dict[str, Any] = {
    "training": replace(FAST, batch_size=5), "lora": LoRAConfig(dropout=0.2), "validation_rows": HELD_OUT,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A run that nobody kills."""
    return train(tmp_path_factory.mktemp("whole"), **INTERRUPTED)


@pytest.mark.parametrize(("step", "first_step"), [(1, 0), (5, 5), (7, 5), (9, 9)])
def test_a_killed_run_goes_on_and_gives_the_same_result(
    whole: TrainingResult, tmp_path: Path, step: int, first_step: int
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, on_progress=kill_at(step), **INTERRUPTED)
    lines: list[TrainingProgress] = []
    result = train(tmp_path, on_progress=lines.append, **INTERRUPTED)
    assert result.history == whole.history
    assert lines[0].step == first_step
    assert difference(whole.folder, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint",
    ]


def test_a_run_that_is_done_is_not_trained_again(whole: TrainingResult, tmp_path: Path) -> None:
    train(tmp_path, **INTERRUPTED)
    lines: list[TrainingProgress] = []
    result = train(tmp_path, on_progress=lines.append, **INTERRUPTED)
    assert lines == []
    assert replace(result, folder=whole.folder, seconds=whole.seconds) == whole
    assert difference(whole.folder, tmp_path) == 0


def test_a_killed_run_that_goes_on_tells_of_the_tokens_that_it_trains_itself(
    whole: TrainingResult, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, on_progress=kill_at(7), **INTERRUPTED)
    lines: list[TrainingProgress] = []
    train(tmp_path, on_progress=lines.append, **INTERRUPTED)
    before = max(line.tokens for line in whole.history if line.step == 4)
    assert sum(line.new_tokens for line in lines) == whole.tokens - before
    assert sum(line.new_tokens for line in whole.history) == whole.tokens > before > 0


def test_weights_that_no_gradient_reaches_have_zero_moments_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    def cut() -> Any:
        model = tiny_model()
        model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: output.detach())
        return model

    options: dict[str, Any] = {"training": replace(FAST, epochs=2), "rows": ROWS[:8]}
    train(tmp_path / "whole", model=cut(), **options)
    with pytest.raises(Killed):
        train(tmp_path / "killed", model=cut(), on_progress=kill_at(2), **options)
    moments = load_file(tmp_path / "killed" / "checkpoint" / "epoch-1" / "tensors.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    assert not moments[f"first_moments/{key}"].any()
    train(tmp_path / "killed", model=cut(), **options)
    assert not weights(tmp_path / "killed")[key].any()
    assert difference(tmp_path / "whole", tmp_path / "killed") == 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed in its second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(folder, validation_rows=HELD_OUT, on_progress=kill_at(5))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ROWS[:-1]},
        {"validation_rows": HELD_OUT[:-1]},
        {"training": replace(FAST, learning_rate=2e-2)},
        {"lora": LoRAConfig(alpha=8)},
    ],
    ids=["rows", "validation rows", "learning rate", "alpha"],
)
def test_a_checkpoint_of_another_run_is_not_continued(killed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(Killed):
        train(tmp_path, on_progress=kill_at(0), **{"validation_rows": HELD_OUT, **change})


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_delete(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, on_progress=kill_at(5))
    (tmp_path / "checkpoint" / "epoch-1" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"damaged.*delete .*checkpoint"):
        train(tmp_path)


def test_a_checkpoint_that_was_deleted_in_part_is_none(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint" / "epoch-1" / "state.json").unlink()
    lines: list[TrainingProgress] = []
    train(tmp_path, on_progress=lines.append, **INTERRUPTED)
    assert lines[0].step == 0


def test_start_from_continues_an_adapter(tmp_path: Path) -> None:
    first = train(tmp_path / "first", validation_rows=HELD_OUT)
    second = train(tmp_path / "second", validation_rows=HELD_OUT, start_from=tmp_path / "first")
    assert second.base_validation_loss == pytest.approx(first.validation_loss, rel=1e-5)


def test_the_model_is_as_before_and_base_and_other_adapters_are_untouched(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]), "other")
    before = fingerprint(model)
    train(tmp_path, model=model, validation_rows=HELD_OUT)
    assert fingerprint(model) == before


def test_the_model_is_as_before_when_the_callback_raises(tmp_path: Path) -> None:
    model = tiny_model()
    before, attention = fingerprint(model), model.config._attn_implementation
    training = replace(FAST, gradient_checkpointing=True)
    with pytest.raises(Killed):
        train(tmp_path, training, model=model, on_progress=kill_at(1))
    assert fingerprint(model) == before
    assert model.config._attn_implementation == attention


def test_gradient_checkpointing_changes_nothing_in_the_result(tmp_path: Path) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "checkpointed", replace(FAST, gradient_checkpointing=True))
    assert difference(tmp_path / "plain", tmp_path / "checkpointed") < 1e-5


def test_a_model_that_can_not_be_packed_trains_too(tmp_path: Path) -> None:
    result = train(tmp_path, model=tiny_model(GEMMA2), validation_rows=HELD_OUT)
    before, after = held_out_losses(result)
    assert after < before


def test_bfloat16_training_is_near_float32_training(tmp_path: Path) -> None:
    exact = train(tmp_path / "float32", validation_rows=HELD_OUT)
    training = replace(FAST, dtype="bfloat16")
    result = train(tmp_path / "bfloat16", training, validation_rows=HELD_OUT)
    assert {tensor.dtype for tensor in weights(tmp_path / "bfloat16").values()} == {torch.float32}
    assert result.validation_loss != exact.validation_loss
    assert result.validation_loss == pytest.approx(exact.validation_loss, rel=0.05)


def test_the_paper_configuration_trains_query_and_key_projections(tmp_path: Path) -> None:
    train(tmp_path, TrainingConfig.paper(), lora=LoRAConfig.paper())
    assert {key.split(".")[-3] for key in weights(tmp_path)} == {"q_proj", "k_proj"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 32


def test_no_rows_is_an_error_that_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(NoTrainingDataError, match="0 training rows"):
        train(tmp_path, rows=[])


def test_a_row_without_a_completion_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\[1\] has 2 prompt and 0 completion tokens"):
        train(tmp_path, rows=[ROWS[0], TokenizedRow([1, 2], [])])


def test_a_loss_or_gradient_that_is_not_a_number_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    model = tiny_model()
    # Of a square root at 0: 0 times infinity.
    model.model.norm.register_forward_hook(lambda _, inputs, output: output + (0 * output).sqrt())
    with pytest.raises(TrainingError, match=r"Step 1 of 9: the loss is \d.* and the gradient's norm nan"):
        train(tmp_path, model=model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="Step 1 of 9: the loss is nan"):
        train(tmp_path, model=model)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)")]
)
@pytest.mark.parametrize("held_out", [[], HELD_OUT], ids=["in a step", "in measuring"])
def test_running_out_of_memory_halves_the_passes_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, held_out: list[TokenizedRow]
) -> None:
    from bettertogether.training.loss import RowLoss

    expected = train(tmp_path / "whole", validation_rows=held_out)
    original, passes = RowLoss.token_losses, []

    def token_losses(self: RowLoss, batch: Any) -> torch.Tensor:
        passes.append(batch.tokens)
        if len(passes) == 2:
            raise error
        return original(self, batch)

    monkeypatch.setattr(RowLoss, "token_losses", token_losses)
    result = train(tmp_path / "split", replace(FAST, max_tokens_per_batch=90), validation_rows=held_out)
    assert max(passes[2:]) < 60 < passes[0]
    for found, whole in zip(result.history, expected.history, strict=True):
        assert (found.loss or found.validation_loss) == pytest.approx(whole.loss or whole.validation_loss, rel=1e-4)


@pytest.mark.parametrize(("held_out", "where"), [([], "Step 1 of 9"), (HELD_OUT, "The rows held out")])
def test_memory_too_small_for_one_row_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: list[TokenizedRow], where: str
) -> None:
    from bettertogether.training.loss import RowLoss

    def token_losses(self: RowLoss, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RowLoss, "token_losses", token_losses)
    with pytest.raises(TrainingError, match=f"{where}: memory doesn't suffice for a single row"):
        train(tmp_path, validation_rows=held_out)


def test_float32_over_a_bfloat16_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load it in float32"):
        train(tmp_path, model=tiny_model().bfloat16())


def test_a_base_that_is_not_in_4_bits_is_refused_where_it_is_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a model in 4 bits"):
        train(tmp_path, TrainingConfig(quantize_base="4bit"))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1, 1, 0.75, 0.25]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_the_schedule(scheduler: Any, expected: list[float]) -> None:
    training = TrainingConfig(learning_rate=1.0, scheduler=scheduler, warmup_ratio=0.3)
    assert [learning_rate(step, 5, training) for step in range(1, 6)] == pytest.approx(expected)
