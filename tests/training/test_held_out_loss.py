"""The loss is measured and trained on where the model has a choice, under the prompts that it will meet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from unittest import mock

import pytest
import torch
from reference import relative_error
from safetensors.torch import load_file
from tiny import GEMMA2, random_rows, tiny_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from bettertogether.errors import DataError
from bettertogether.training import LoRAConfig, TrainingConfig, held_out
from bettertogether.training.adapter import training_adapter
from bettertogether.training.arrow_rows import write_arrow
from bettertogether.training.held_out import HeldOutLosses, held_out_losses
from bettertogether.training.loss import RowLoss
from bettertogether.training.packing import TokenizedRow
from bettertogether.training.stepper import Stepper, ready_to_step
from bettertogether.training.trainer import TrainingResult, train_adapter
from bettertogether.training.weighting import TokenWeights

FAST = TrainingConfig(learning_rate=1e-2, epochs=2, dtype="float32", batch_size=4)


def marked(rows: list[TokenizedRow], forms: int = 0, seed: int = 0) -> list[TokenizedRow]:
    """Rows with forced tokens, two fields and forms, drawn at random; the first token is free and of field a."""
    random_ = random.Random(seed)
    made = []
    for row in rows:
        number = len(row.completion_ids)
        forced = [False, *(random_.random() < 0.5 for _ in range(number - 1))]
        fields = ["a", *(random_.choice(["", "a", "b"]) for _ in range(number - 1))]
        prompts = [[*range(3 + form, 19 + form), *row.prompt_ids] for form in range(forms)]
        made.append(replace(row, forced=forced, fields=fields, forms=prompts))
    return made


ROWS = marked(random_rows(10, shared=20), forms=2)
HELD_OUT = marked(random_rows(3, shared=20, seed=1), forms=2)


def token_losses(model: PreTrainedModel, prompt_ids: list[int], row: TokenizedRow) -> Tensor:
    """Cross-entropy of each completion token of one row, run alone."""
    logits = model(torch.tensor([prompt_ids + row.completion_ids]), use_cache=False).logits[0].float()
    labels = torch.tensor(row.completion_ids)
    return torch.nn.functional.cross_entropy(logits[len(prompt_ids) - 1 : -1], labels, reduction="none")


@contextmanager
def stepping(model: PreTrainedModel, longest: int) -> Iterator[Stepper]:
    """A new adapter, which changes nothing yet."""
    with ready_to_step(model, LoRAConfig(rank=2), FAST, None, longest) as stepper:
        stepper.adapter.base.eval()
        yield stepper


def measured(model: PreTrainedModel, rows: list[TokenizedRow], by_field: bool = False) -> HeldOutLosses:
    with stepping(model, max(row.longest for row in rows)) as stepper:
        return held_out_losses(stepper, rows, by_field)


def expected_mean(
    model: PreTrainedModel, rows: list[TokenizedRow], field: str | None, everything: bool, error: bool = False
) -> float:
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            kept = [everything or not each for each in row.forced or [False] * len(row.completion_ids)]
            kept = [each and field in (None, name) for each, name in zip(kept, row.fields or kept, strict=True)]
            for prompt_ids in [row.prompt_ids, *row.forms[:1]]:
                weight = 0.5 if row.forms else 1.0
                losses_N = token_losses(model, prompt_ids, row)[torch.tensor(kept)]
                total += weight * float((1 - (-losses_N).exp() if error else losses_N).sum())
                count += weight * sum(kept)
    return total / count


@pytest.mark.parametrize("config", [None, GEMMA2], ids=["packed", "padded"])
def test_held_out_losses_are_means_over_free_tokens_all_tokens_and_fields_under_both_prompts(
    config: PretrainedConfig | None,
) -> None:
    model, rows = tiny_model(config), [*HELD_OUT, *marked(random_rows(2, shared=3, seed=2))]
    found = measured(model, rows)
    assert found.free == pytest.approx(expected_mean(model, rows, None, everything=False), rel=1e-5)
    assert found.all_tokens == pytest.approx(expected_mean(model, rows, None, everything=True), rel=1e-5)
    assert found.measure == pytest.approx(expected_mean(model, rows, None, everything=False, error=True), rel=1e-5)
    assert found.fields == {
        name: pytest.approx(expected_mean(model, rows, name, everything=False), rel=1e-5) for name in ("a", "b")
    }


def test_one_row_that_is_wrong_with_confidence_does_not_hide_that_the_others_are_right() -> None:
    """Of 16 labels, 15 likelier than before and one even less likely."""
    told = []
    for losses in ([math.log(2)] * 16, [*[0.1] * 15, 12.0]):
        error = fmean(1 - math.exp(-loss) for loss in losses)
        told.append(HeldOutLosses(fmean(losses), fmean(losses), error=error))
    before, after = told
    assert before.free < after.free
    assert after.measure < before.measure


def test_a_field_without_a_free_token_has_no_loss_and_where_all_is_forced_all_counts() -> None:
    row = TokenizedRow([5, 6, 7], [8, 9, 2], forced=[True] * 3, fields=["a", "", ""])
    found = measured(tiny_model(), [row])
    assert found.free == found.all_tokens == found.measure > 0
    assert found.fields == {}


def test_rows_of_a_file_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), marked(random_rows(4, shared=20, seed=1), forms=1)
    expected = measured(model, rows, by_field=True)
    monkeypatch.setattr(held_out, "ROWS_AT_ONCE", 3)
    with stepping(model, 100) as stepper:
        plan = mock.Mock(side_effect=stepper.loss.plan)
        monkeypatch.setattr(RowLoss, "plan", plan)
        found = held_out_losses(stepper, write_arrow(rows, tmp_path / "rows"), True)
    parts = [len(call.args[0]) for call in plan.call_args_list]
    assert parts == [3, 3, 2]
    assert (found.free, found.all_tokens) == pytest.approx((expected.free, expected.all_tokens), rel=1e-5)


def train(folder: Path, training: TrainingConfig = FAST, rows: list[TokenizedRow] = ROWS) -> TrainingResult:
    return train_adapter(tiny_model(), rows, validation_rows=HELD_OUT, training=training, folder=folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_held_out_loss_of_balanced_fields_is_the_mean_over_the_fields_of_the_rows() -> None:
    model = tiny_model()
    rows = [replace(row, forms=[]) for row in HELD_OUT]
    with torch.no_grad():
        means = [
            losses_T[[free and name == field for free, name in zip(row.free, row.fields, strict=True)]].mean()
            for row in rows
            for losses_T in [token_losses(model, row.prompt_ids, row)]
            for field in sorted({name for free, name in zip(row.free, row.fields, strict=True) if free})
        ]
    assert len(means) > len(rows)
    assert measured(model, rows, by_field=True).free == pytest.approx(float(sum(means) / len(means)), rel=1e-5)


def test_a_label_of_one_token_counts_as_much_as_a_long_text_and_forced_tokens_a_share_of_the_usual_one() -> None:
    text = TokenizedRow([1], [2, 3, 4, 5, 6], forced=[True, False, False, False, False], fields=["", *["text"] * 4])
    label = TokenizedRow([1], [2, 3, 4], forced=[True, False, True], fields=["", "label", "label"])
    both = TokenizedRow([1], [2, 3, 4], forced=[True, False, False], fields=["", "text", "label"])
    frame = TokenizedRow([1], [2, 3], forced=[True, True], fields=["", "label"])
    weights = TokenWeights.of([text, label, both, frame], 0.1, by_field=True)
    weights_N, free_F = weights.of_tokens([text, label, both, frame])
    expected = [0.025, 0.25, 0.25, 0.25, 0.25, 0.1, 1.0, 0.1, 0.1, 1.0, 1.0, 0.05, 0.05]
    assert weights_N.tolist() == pytest.approx(expected)
    assert weights.total == pytest.approx(sum(expected))
    assert weights.free == 4.0
    assert free_F.tolist() == [place for place, weight in enumerate(expected) if weight >= 0.25]
    plain, _ = TokenWeights.of([text, label], 0.1, by_field=False).of_tokens([text, label])
    assert plain.tolist() == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0, 0.1, 1.0, 0.1])


def test_rows_that_do_not_know_their_fields_count_by_token() -> None:
    rows = [TokenizedRow([1], [2, 3], fields=["a", "a"]), TokenizedRow([1], [2, 3, 4])]
    assert TokenWeights.of(rows, 0.1, by_field=True) == TokenWeights.of(rows, 0.1, by_field=False)


def test_a_step_follows_the_gradient_of_the_weighted_mean(tmp_path: Path) -> None:
    rows = marked(random_rows(4, shared=20))
    training = TrainingConfig(
        learning_rate=1e-2, epochs=1, batch_size=4, scheduler="constant", warmup_ratio=0.0, dtype="float32",
        skeleton_weight=0.3, balance_fields=False, max_grad_norm=0, max_tokens_per_batch=60,
    )  # fmt: skip
    model = tiny_model()
    with training_adapter(model, LoRAConfig(), training.seed) as adapter:
        losses_N = torch.cat([token_losses(model, row.prompt_ids, row) for row in rows])
        forced_N = torch.tensor([each for row in rows for each in row.forced])
        weights_N = torch.ones(len(losses_N)).masked_fill(forced_N, 0.3)
        parameters = adapter.parameters
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        ((losses_N * weights_N).sum() / weights_N.sum()).backward()
        optimizer.step()
        expected = adapter.state()
    result = train_adapter(tiny_model(), rows, training=training, folder=tmp_path)
    found = weights(tmp_path)
    assert relative_error([found[key] for key in expected], list(expected.values())) < 1e-3
    assert [line.loss for line in result.history] == [pytest.approx(losses_N[~forced_N].mean().item(), rel=1e-5)]


def test_the_skeleton_weight_decides_the_result_only_where_tokens_are_forced(tmp_path: Path) -> None:
    plain = [replace(row, forced=[]) for row in ROWS]
    for name, rows, weight in (("a", ROWS, 0.1), ("b", ROWS, 1.0), ("c", plain, 0.1), ("d", plain, 1.0)):
        train(tmp_path / name, replace(FAST, skeleton_weight=weight, balance_fields=False), rows)
    first, *others = (weights(tmp_path / name) for name in "abcd")
    assert any(not torch.equal(first[key], others[0][key]) for key in first)
    for other in others[1:]:
        assert relative_error([other[key] for key in first], [others[0][key] for key in first]) < 1e-3


def test_rows_whose_tokens_are_all_forced_are_trained_on_alike(tmp_path: Path) -> None:
    rows = random_rows(4, shared=20)
    train(tmp_path / "forced", rows=[replace(row, forced=[True] * len(row.completion_ids)) for row in rows])
    train(tmp_path / "free", rows=rows)
    forced, free = weights(tmp_path / "forced"), weights(tmp_path / "free")
    assert all(torch.equal(forced[key], free[key]) for key in free)


class Killed(BaseException):
    pass


def test_a_killed_run_over_rows_with_forms_goes_on_and_gives_the_same_result(tmp_path: Path) -> None:
    def kill(line: object) -> None:
        if getattr(line, "step", 0) == 4:
            raise Killed

    expected = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train_adapter(
            tiny_model(), ROWS, validation_rows=HELD_OUT, training=FAST, folder=tmp_path / "killed", on_progress=kill
        )
    result = train(tmp_path / "killed")
    assert (result.history, result.base, result.best) == (expected.history, expected.base, expected.best)
    found, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["forms", "forced", "fields"])
def test_a_checkpoint_of_rows_with_other_marks_is_not_continued(tmp_path: Path, name: str) -> None:
    def kill(line: object) -> None:
        if getattr(line, "step", 0) == 4:
            raise Killed

    with pytest.raises(Killed):
        train_adapter(tiny_model(), ROWS, training=FAST, folder=tmp_path, on_progress=kill)
    steps: list[int] = []
    other = [replace(row, **{name: []}) for row in ROWS]
    train_adapter(tiny_model(), other, training=FAST, folder=tmp_path, on_progress=lambda line: steps.append(line.step))
    assert steps[0] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TokenizedRow([1], [2, 3], forced=[True]), r"rows\[0\] has 2 completion tokens and 1 forced"),
        (TokenizedRow([1], [2, 3], fields=["a"] * 3), r"rows\[0\] has 2 completion tokens and 3 fields"),
        (TokenizedRow([1], [2, 3], forms=[[]]), r"rows\[0\] has 0 prompt and 2 completion tokens"),
    ],
)
def test_a_row_whose_marks_do_not_fit_is_named(tmp_path: Path, row: TokenizedRow, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(tmp_path, rows=[row])
