"""The whole on the real engine, trainer and files, with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
import torch
from peft import PeftModel
from small_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bettertogether
from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    PreferenceFinetune,
    TrainingConfig,
    local_lm,
)
from bettertogether.records import WeightDetails
from bettertogether.steps.prompt_capture import render_prompt


class Colour(dspy.Signature):
    """Name the colour."""

    thing: str = dspy.InputField()
    colour: Literal["red", "blue"] = dspy.OutputField()


def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.colour == prediction.colour)


def things(number: int) -> list[dspy.Example]:
    pairs = [(f"{'blood' if i % 2 else 'sky'} {i}", "red" if i % 2 else "blue") for i in range(number)]
    return [dspy.Example(thing=thing, colour=colour).with_inputs("thing") for thing, colour in pairs]


def answers(program: dspy.Module, examples: Sequence[dspy.Example]) -> list[dspy.Prediction]:
    """To all examples at once."""
    pairs = [(program, example) for example in examples]
    return list(dspy.Parallel(num_threads=len(pairs), disable_progress_bar=True)(pairs))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def compiled(model_folder: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    student = dspy.Predict(Colour)
    student.set_lm(local_lm(model_folder, max_tokens=64, engine_options={"device": device, "dtype": "float32"}))
    run_dir = tmp_path_factory.mktemp("run") / "first"
    steps = {
        "p": BootstrapFewShotRS(metric, num_candidates=1, num_samples=1),
        "w": LoRAFinetune(metric, num_samples=1, training=TrainingConfig(learning_rate=5e-3, epochs=4)),
    }
    with dspy.context(adapter=dspy.JSONAdapter()):
        program = BetterTogether(metric, **steps).compile(
            student, trainset=things(20), valset=things(30)[20:], strategy="w -> p", run_dir=run_dir, progress=False
        )
        yield {"student": student, "program": program, "run_dir": run_dir, "model": model_folder}


@pytest.fixture(autouse=True)
def _json_answers() -> Iterator[None]:
    with dspy.context(adapter=dspy.JSONAdapter()):
        yield


def tuned_round(compiled: dict[str, Any]) -> Any:
    return next(c["program"] for c in compiled["program"].candidate_programs if c["strategy"] == "w")


def test_every_answer_parses_and_every_round_is_complete_and_scored(compiled: dict[str, Any]) -> None:
    rounds = compiled["program"].report.rounds
    assert [(r.strategy, r.status) for r in rounds] == [("", "complete"), ("w", "complete"), ("w -> p", "complete")]
    assert all(len(r.scores or ()) == 10 for r in rounds)
    assert "parse failure" not in json.dumps([r.to_dict()["details"] for r in rounds])


def test_training_lowers_the_loss_and_the_tuned_model_has_a_name_of_its_own(compiled: dict[str, Any]) -> None:
    losses = [h.loss for h in compiled["program"].report.rounds[1].details.history if h.loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    base = compiled["student"].lm.model
    assert base == f"local/{compiled['student'].lm.engine.base_name}"
    assert tuned_round(compiled).lm.model.startswith(f"{base}@r1-")


@pytest.mark.parametrize("start_from", ["base", "current"])
def test_a_second_weight_step_trains_on_and_every_rounds_model_stays_callable(
    model_folder: Path, start_from: Literal["base", "current"], tmp_path: Path
) -> None:
    student = dspy.Predict(Colour)
    student.set_lm(local_lm(model_folder, max_tokens=64))
    training = TrainingConfig(learning_rate=5e-3, epochs=1)
    w = LoRAFinetune(metric, num_samples=1, training=training, start_from=start_from)
    trainset, valset = things(8), things(12)[8:]
    program = BetterTogether(metric, w=w).compile(
        student, trainset=trainset, valset=valset, strategy="w -> w", run_dir=tmp_path / "run", progress=False
    )
    rounds = program.report.rounds
    assert [record.status for record in rounds] == ["complete"] * 3
    names = [record.models["self"] for record in rounds]
    assert len(set(names)) == 3
    assert [("@r1-" in name, "@r2-" in name) for name in names[1:]] == [
        (True, False),
        (start_from == "base", start_from == "current"),
    ]
    found = {
        candidate["strategy"]: list(map(metric, valset, answers(candidate["program"], valset)))
        for candidate in program.candidate_programs
    }
    assert found == {record.strategy: list(record.scores or ()) for record in rounds}


def test_base_and_tuned_models_answer_side_by_side_after_compile(compiled: dict[str, Any]) -> None:
    answers = {program(thing="sky 3").colour for program in (compiled["student"], tuned_round(compiled))}
    assert answers <= {"red", "blue"}
    assert compiled["student"].lm.engine is tuned_round(compiled).lm.engine


def test_the_adapter_is_plain_peft_and_gives_the_engine_s_next_token(compiled: dict[str, Any]) -> None:
    lm = tuned_round(compiled).lm
    engine = lm.engine
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(compiled["model"]), engine.adapter_folder(lm.model)
    ).eval()
    answer = lm("Say something.", max_tokens=8)[0]
    prompt_ids = engine.prompt_tokens([{"role": "user", "content": "Say something."}])
    ids_1_T = torch.tensor([prompt_ids])
    with torch.no_grad():
        out = plain.generate(input_ids=ids_1_T, attention_mask=torch.ones_like(ids_1_T), max_new_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(compiled["model"])
    assert answer == tokenizer.decode(out[0, len(prompt_ids) :], skip_special_tokens=True)


def test_a_row_s_prompt_has_the_token_ids_that_the_tuned_program_sends(compiled: dict[str, Any]) -> None:
    program = tuned_round(compiled)
    engine = program.lm.engine
    sample = compiled["program"].report.rounds[1].details.data_card.samples[0]
    sent = [engine.prompt_tokens(render_prompt(program, engine, t.inputs(), program.demos)) for t in things(20)]
    assert program.demos == []
    assert sent.count(engine.prompt_tokens(sample["prompt"])) == 1


def test_the_same_call_on_a_finished_run_directory_gives_the_same_report_without_work(compiled: dict[str, Any]) -> None:
    engine = compiled["student"].lm.engine
    before = engine.counters()["requests"]
    steps = {
        "p": BootstrapFewShotRS(metric, num_candidates=1, num_samples=1),
        "w": LoRAFinetune(metric, num_samples=1, training=TrainingConfig(learning_rate=5e-3, epochs=4)),
    }
    again = BetterTogether(metric, **steps).compile(
        compiled["student"],
        trainset=things(20),
        valset=things(30)[20:],
        strategy="w -> p",
        run_dir=compiled["run_dir"],
        progress=False,
    )
    assert engine.counters()["requests"] == before
    assert [r.to_dict() for r in again.report.rounds] == [r.to_dict() for r in compiled["program"].report.rounds]


def test_a_saved_program_answers_the_same_after_loading(compiled: dict[str, Any], tmp_path: Path) -> None:
    program = tuned_round(compiled)
    bettertogether.save(program, tmp_path / "saved")
    loaded = bettertogether.load(tmp_path / "saved", into=dspy.Predict(Colour))
    assert loaded.lm.model == program.lm.model
    first, second = ([each.colour for each in answers(one, things(6))] for one in (loaded, program))
    assert first == second


@pytest.mark.parametrize(("weight", "epochs", "right"), [(0.1, 25, 20), (1e-6, 5, 0)])
def test_a_small_weight_on_what_the_grammar_forces_makes_answers_right_where_no_grammar_is_in_force(
    model_folder: Path, weight: float, epochs: int, right: int
) -> None:
    student = dspy.Predict(Colour)
    student.set_lm(local_lm(model_folder, max_tokens=64))
    training = TrainingConfig(learning_rate=1e-2, epochs=epochs, skeleton_weight=weight)
    step = LoRAFinetune(metric, num_samples=1, train_prompt="vanilla", training=training)
    tuned = step.compile(student, trainset=things(20))
    engine = tuned.lm.engine
    prompts = [list(render_prompt(tuned, engine, e.inputs(), [])) for e in things(20)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        said = list(pool.map(lambda prompt: tuned.lm(messages=prompt)[0], prompts))
    texts = [each["text"] if isinstance(each, dict) else each for each in said]
    assert sum(t == json.dumps({"colour": e.colour}, indent=2) for t, e in zip(texts, things(20), strict=True)) == right


class Paint(dspy.Signature):
    """Name a paint for the thing, and how to put it on."""

    thing: str = dspy.InputField()
    colour: str = dspy.InputField()
    tool: Literal["brush", "roller"] = dspy.OutputField()


class Painter(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour = dspy.Predict(Colour)
        self.tool = dspy.Predict(Paint)

    def forward(self, thing: str) -> dspy.Prediction:
        colour = self.colour(thing=thing).colour
        return dspy.Prediction(colour=colour, tool=self.tool(thing=thing, colour=colour).tool)


def test_of_two_modules_the_one_at_fault_is_blamed_and_learns_what_the_metric_prefers(
    model_folder: Path, tmp_path: Path
) -> None:
    student = Painter()
    student.set_lm(local_lm(model_folder, max_tokens=64))
    usual = student(thing="sky 0").colour
    other = {"red": "blue", "blue": "red"}[usual]
    step = PreferenceFinetune(
        lambda example, prediction, trace=None: prediction.colour == other,
        temperature=1.5,
        max_pairs_per_example=1,
        validation_share=0.0,
        multitask=False,
        training=TrainingConfig(learning_rate=3e-3, epochs=6, batch_size=4, dtype="float32"),
        folder=tmp_path,
    )
    tuned = step.compile(student, trainset=things(8))
    assert step.last is not None
    assert isinstance(step.last.details, WeightDetails)
    blame = step.last.details.blame
    assert blame["colour"].repaired > blame["tool"].repaired == 0
    assert step.last.details.data_card.kept_by_predictor.keys() == {"colour"}
    assert [each.colour for each in answers(tuned, things(12))] == [other] * 12
    painted = [dspy.Example(thing=each.thing, colour=other).with_inputs("thing", "colour") for each in things(12)]
    tools = [[each.tool for each in answers(program.tool, painted)] for program in (student, tuned)]
    assert tools[0] == tools[1]
