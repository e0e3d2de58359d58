"""`engine.finetune` writes a plain PEFT adapter named by its content, and leaves the model as it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dspy.lm15 import Config, Message, Request
from peft import PeftModel
from small_models import CHATML, byte_tokenizer, generated, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from bettertogether.engines import FieldSpan, FinetuneResult, TrainingProgress, TrainingRow, TransformersEngine
from bettertogether.engines.finetuning import prepare, tokens_of, train
from bettertogether.engines.protocol import ChatMessage
from bettertogether.engines.thinking import with_thoughts
from bettertogether.errors import NoTrainingDataError, UnknownAdapterError
from bettertogether.training import fused
from bettertogether.training.adapter_folder import content_hash
from bettertogether.training.config import LoRAConfig, TrainingConfig
from bettertogether.training.packing import TokenizedRow

TRAINING = TrainingConfig(epochs=12, batch_size=4, learning_rate=2e-2, dtype="float32")
LORA = LoRAConfig(rank=4)
ROWS = [TrainingRow(({"role": "user", "content": f"Say {word}."},), word) for word in ("yes", "no", "maybe", "never")]


@pytest.fixture(scope="module")
def trained(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TransformersEngine, FinetuneResult]]:
    engine = TransformersEngine(folder)
    where = tmp_path_factory.mktemp("adapters")
    yield engine, engine.finetune(ROWS, validation_rows=ROWS[:2], lora=LORA, training=TRAINING, folder=where)
    engine.close()


def answer(engine: TransformersEngine, row: TrainingRow, model: str) -> str | None:
    message = Message.user(row.messages[0]["content"])
    return engine.complete(Request(model, (message,), config=Config(max_tokens=12))).text


def test_the_adapter_says_what_it_was_taught_and_the_base_does_not(trained: Any) -> None:
    engine, result = trained
    assert [answer(engine, row, result.model) for row in ROWS] == [row.completion for row in ROWS]
    assert [answer(engine, row, "local/tiny") for row in ROWS] != [row.completion for row in ROWS]


def test_the_folder_is_named_by_its_content_and_holds_a_plain_peft_adapter(trained: Any, folder: Path) -> None:
    engine, result = trained
    name = f"{engine.base_name}@r1-{content_hash(result.folder)[:8]}"
    assert (result.model, result.folder.name) == (f"local/{name}", name)
    assert {path.name for path in result.folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in result.folder.parent.iterdir()] == [result.folder.name]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), result.folder)
    prompt_ids = engine.prompt_tokens(ROWS[0].messages)
    assert generated(tuned, prompt_ids, 4) == engine.completion_tokens("yes")


def measured(result: FinetuneResult) -> list[float]:
    return [line.validation_error for line in result.history if line.validation_error is not None]


def test_the_losses_before_and_after_are_reported(trained: Any) -> None:
    _, result = trained
    assert result.validation_loss < 0.2 < result.base_validation_loss
    before, after = result.validation_error
    assert (before, after) == (result.history[0].validation_error, min(measured(result)))
    assert after < 0.2 < before
    assert result.history[-1].total_steps == 12
    assert 1 <= result.best_epoch <= 12
    assert result.tokens > 0


def test_the_next_round_goes_on_from_the_last(trained: Any, tmp_path: Path) -> None:
    engine, first = trained
    lines: list[TrainingProgress] = []
    second = engine.finetune(
        ROWS,
        validation_rows=ROWS,
        lora=LORA,
        training=TrainingConfig(epochs=1, dtype="float32"),
        start_from=first.model,
        folder=tmp_path,
        on_progress=lines.append,
    )
    assert second.model.startswith(f"local/{engine.base_name}@r2-")
    assert json.loads((second.folder / "bettertogether.json").read_text()) == {"round": 2, "base": engine.base_name}
    assert second.base_validation_loss < 0.2
    assert tuple(lines) == second.history


def test_the_model_is_as_before(engine: TransformersEngine, tmp_path: Path) -> None:
    before = answer(engine, ROWS[0], "local/tiny")
    weights = {name: tensor.clone() for name, tensor in engine._model.state_dict().items()}
    engine.finetune(ROWS, lora=LORA, training=TrainingConfig(epochs=1, dtype="float32"), folder=tmp_path)
    after = engine._model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert weights.keys() == after.keys()
    assert not any(parameter.requires_grad for parameter in engine._model.parameters())
    assert answer(engine, ROWS[0], "local/tiny") == before


def test_the_same_training_gives_the_same_adapter(engine: TransformersEngine, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": LORA, "training": TrainingConfig(epochs=1, dtype="float32")}
    one = engine.finetune(ROWS, folder=tmp_path / "one", **options)
    two = engine.finetune(ROWS, folder=tmp_path / "two", **options)
    again = engine.finetune(ROWS, folder=tmp_path / "one", **options)
    assert one.model == two.model == again.model
    assert again.folder == one.folder


def test_rows_that_are_too_long_are_left_out_with_the_reason(engine: TransformersEngine, tmp_path: Path) -> None:
    long = TrainingRow(({"role": "user", "content": "x" * 5000},), "yes")
    training = TrainingConfig(epochs=1, dtype="float32")
    result = engine.finetune([ROWS[0], long], lora=LORA, training=training, folder=tmp_path)
    ((index, reason),) = result.skipped_rows
    assert index == 1
    assert reason.startswith("prompt+completion 50")
    assert reason.endswith("tokens > max_length 4096")


@pytest.mark.parametrize("rows", [[], [TrainingRow(({"role": "user", "content": "x" * 5000},), "yes")]])
def test_nothing_to_train_on_is_an_error(engine: TransformersEngine, rows: list[TrainingRow]) -> None:
    with pytest.raises(NoTrainingDataError, match=f"{len(rows)} rows came, {len(rows)} of them too long"):
        engine.finetune(rows)


def test_a_start_that_is_not_held_is_an_error(engine: TransformersEngine) -> None:
    with pytest.raises(UnknownAdapterError, match="r7-0"):
        engine.finetune(ROWS, start_from="local/tiny@r7-0")


def test_requests_wait_while_it_trains_and_are_answered_after(engine: TransformersEngine, tmp_path: Path) -> None:
    expected = answer(engine, ROWS[0], "local/tiny")
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(answer(engine, ROWS[0], "local/tiny")))

    def start(line: TrainingProgress) -> None:
        if not thread.ident:
            thread.start()
        assert not answers

    training = TrainingConfig(epochs=3, dtype="float32")
    engine.finetune(ROWS, lora=LORA, training=training, folder=tmp_path, on_progress=start)
    thread.join(timeout=10)
    assert answers == [expected]


def test_a_training_that_fails_leaves_the_engine_as_it_was(engine: TransformersEngine, tmp_path: Path) -> None:
    before = answer(engine, ROWS[0], "local/tiny")

    def fail(line: TrainingProgress) -> None:
        raise ZeroDivisionError("from the callback")

    with pytest.raises(ZeroDivisionError, match="from the callback"):
        engine.finetune(ROWS, lora=LORA, training=TRAINING, folder=tmp_path, on_progress=fail)
    assert answer(engine, ROWS[0], "local/tiny") == before


def test_without_a_folder_adapters_go_to_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingConfig(epochs=1, dtype="float32")
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))
    for options, parent in (
        ({}, tmp_path / "cache" / "adapters"),
        ({"cache_folder": tmp_path / "own"}, tmp_path / "own"),
    ):
        engine = TransformersEngine(folder, **options)  # type: ignore[arg-type]
        assert engine.finetune(ROWS, lora=LORA, training=training).folder.parent == parent
        engine.close()


def test_a_training_in_the_engine_uses_the_fused_layers(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    forward = fused.fused_forward

    def counted(*args: Any, **options: Any) -> Tensor:
        used.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(fused, "fused_forward", counted)
    engine.finetune(ROWS[:1], lora=LORA, training=TrainingConfig(epochs=1, dtype="float32"), folder=tmp_path)
    # One pass over the 7 linear layers of 2 blocks.
    assert len(used) == 14


SHORT = TrainingConfig(epochs=1, dtype="float32")


def test_the_same_training_while_it_goes_on_elsewhere_ends_in_the_same_adapter(trained: Any, tmp_path: Path) -> None:
    engine, _ = trained
    inner: list[FinetuneResult] = []

    def once_more(line: TrainingProgress) -> None:
        if not inner:
            inner.append(finetuned(lambda line: None))

    def finetuned(on_progress: Any) -> FinetuneResult:
        job = prepare(engine, ROWS, (), LORA, SHORT, (0, None), tmp_path, tmp_path / "tokens")
        model = AutoModelForCausalLM.from_pretrained(engine.dump_state()["model"])
        return train(engine, job, model, engine.dump_state()["model"], on_progress)

    outer = finetuned(once_more)
    assert (inner[0].model, inner[0].folder) == (outer.model, outer.folder)
    assert content_hash(outer.folder)[:8] == outer.model.rpartition("-")[2]
    assert list(tmp_path.iterdir()) == [outer.folder]


def test_what_a_kill_left_of_a_file_is_no_part_of_the_adapter(trained: Any, tmp_path: Path) -> None:
    engine, _ = trained

    def cut_off(_: TrainingProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.finetune(ROWS, lora=LORA, training=SHORT, folder=tmp_path, on_progress=cut_off)
    (work,) = tmp_path.glob("training-*")
    (work / ".adapter_model.safetensors.1f.tmp").touch()
    result = engine.finetune(ROWS, lora=LORA, training=SHORT, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [result.folder]
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "bettertogether.json",
    ]


def test_many_rows_go_through_a_file_and_give_the_same_adapter(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = trained
    few = engine.finetune(ROWS, validation_rows=ROWS[:2], lora=LORA, training=SHORT, folder=tmp_path / "few")
    monkeypatch.setattr("bettertogether.training.arrow_rows.MANY_ROWS", 1)
    many = engine.finetune(ROWS, validation_rows=ROWS[:2], lora=LORA, training=SHORT, folder=tmp_path / "many")
    assert (many.model, many.validation_loss) == (few.model, few.validation_loss)
    assert list((tmp_path / "many").iterdir()) == [many.folder]


def test_a_damaged_adapter_makes_room_for_the_one_that_is_trained_again(trained: Any, tmp_path: Path) -> None:
    engine, _ = trained
    first = engine.finetune(ROWS, lora=LORA, training=SHORT, folder=tmp_path)
    weights = first.folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:-1000] + bytes([whole[-1000] ^ 64]) + whole[-999:]):
        weights.write_bytes(damaged)
        again = engine.finetune(ROWS, lora=LORA, training=SHORT, folder=tmp_path)
        assert (again.model, again.folder) == (first.model, first.folder)
        assert weights.read_bytes() == whole


SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["positive", "negative"]}, "reason": {"type": "string"}},
    "required": ["label", "reason"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
COMPLETION = json.dumps({"label": "negative", "reason": "é no"}, indent=2, ensure_ascii=False)
SPANS = tuple(
    FieldSpan(name, COMPLETION.index(value), COMPLETION.index(value) + len(value))
    for name, value in (("label", "negative"), ("reason", "é no"))
)


def asked(forms: tuple[str, ...] = (), completion: str = COMPLETION, **options: Any) -> TrainingRow:
    prompts: list[tuple[ChatMessage]] = [({"role": "user", "content": text},) for text in ("What?", *forms)]
    return TrainingRow(prompts[0], completion, tuple(prompts[1:]), **options)


def tokenized(engine: TransformersEngine, rows: Sequence[TrainingRow]) -> tuple[list[TokenizedRow], list[Any]]:
    """The rows, and those that are too long."""
    skipped: list[tuple[int, str]] = []
    return list(tokens_of(engine, rows, skipped)), skipped


def texts(engine: TransformersEngine, row: TokenizedRow, kept: list[bool]) -> str:
    ids = [token_id for token_id, keep in zip(row.completion_ids, kept, strict=True) if keep]
    return str(byte_tokenizer().decode(ids))


def test_the_tokens_that_a_rows_grammar_leaves_free_and_those_of_its_fields_are_marked(
    engine: TransformersEngine,
) -> None:
    pytest.importorskip("llguidance")
    (row,), _ = tokenized(engine, [asked(response_format=FORMAT, fields=SPANS)])
    assert texts(engine, row, row.free) == 'né no"'
    assert texts(engine, row, [name == "label" for name in row.fields]) == "negative"
    assert texts(engine, row, [name == "reason" for name in row.fields]) == "é no"
    assert (row.forced[-1], row.fields[-1]) == (True, "")


def test_of_a_pair_the_other_answer_is_marked_by_the_same_grammar(engine: TransformersEngine) -> None:
    pytest.importorskip("llguidance")
    rejected = COMPLETION.replace("é no", "oui")
    (pair,), _ = tokenized(engine, [asked(response_format=FORMAT, rejected=rejected)])
    (row,), _ = tokenized(engine, [asked(response_format=FORMAT, completion=rejected)])
    assert (pair.rejected_ids, pair.rejected_forced) == (row.completion_ids, row.forced)
    assert True in row.forced


def test_without_a_schema_or_with_an_answer_that_breaks_it_no_token_is_forced(engine: TransformersEngine) -> None:
    rows, _ = tokenized(engine, [asked(), asked(completion="negative", response_format=FORMAT)])
    assert [(row.forced, row.fields) for row in rows] == [([], []), ([], [])]


def test_without_llguidance_no_token_is_forced(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bettertogether.engines.base_engine.structured_output_available", lambda: False)
    (row,), _ = tokenized(engine, [asked(response_format=FORMAT, fields=SPANS)])
    assert row.forced == []
    assert set(row.fields) == {"", "label", "reason"}


def test_prompts_with_demos_that_are_too_long_are_left_out_and_counted(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    (row,), skipped = tokenized(engine, [asked(forms=("short", "x" * 5000, "brief"))])
    expected = [engine.prompt_tokens([{"role": "user", "content": text}]) for text in ("short", "brief")]
    assert (row.forms, skipped) == (expected, [])
    assert "1 of 3 prompts with demos, too long" in caplog.text


def test_a_result_has_the_losses_of_free_tokens_all_tokens_and_fields(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    rows = [asked(forms=("Which?",), response_format=FORMAT, fields=SPANS)]
    result = engine.finetune(rows, validation_rows=rows, lora=LORA, training=TRAINING, folder=tmp_path)
    losses = [
        (result.base_validation_loss, result.validation_loss),
        result.all_tokens_loss,
        *result.field_losses.values(),
    ]
    assert list(result.field_losses) == ["label", "reason"]
    assert len(set(losses)) == 4
    for before, after in losses:
        assert before is not None
        assert after is not None
        assert before > after > 0


def test_the_answer_after_thoughts_is_what_the_grammar_forces(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    engine = TransformersEngine(save_model(tmp_path / "thinks", template=template))
    for thoughts in ("", "hm"):
        completion = with_thoughts(thoughts, COMPLETION) if thoughts else COMPLETION
        (row,), _ = tokenized(engine, [asked(completion=completion, response_format=FORMAT)])
        assert texts(engine, row, row.free) == f'{thoughts}\n</think>\n\nné no"'
    engine.close()
