"""A saved program's README.md says what it is, how good, from what, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import Parity, learner, numbers, parity_engine, parity_match, parity_program
from saved import fresh_engine, tuned_program
from small_models import save_adapter, save_model

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, load, local_lm, save
from bettertogether.artifact.card import model_card
from bettertogether.records import CELLS, DataCard, HeldOutLoss, StepRecord, TrainedAdapter, WeightDetails
from bettertogether.report import CompileReport
from bettertogether.testing import FakeRequest

Knows = Callable[[FakeRequest, int], bool]
W = LoRAFinetune(parity_match)
MANIFEST = {
    "program": "m:P",
    "adapter": "ChatAdapter",
    "predictors": {},
    "lms": {},
    "created": "now",
    "versions": {},
}


def card_of(program: dspy.Module, folder: Path) -> str:
    return (save(program, folder) / "README.md").read_text()


def compiled(strategy: str = "p -> w", knows: Knows = learner, w: LoRAFinetune = W, **options: Any) -> dspy.Module:
    """A program whose prompt and weights were tuned, and which says so in a report."""
    better = BetterTogether(parity_match, p=BootstrapFewShotRS(parity_match, num_candidates=2), w=w)
    arguments = {"trainset": numbers(12), "valset": numbers(12, start=12), "strategy": strategy, **options}
    return better.compile(parity_program(parity_engine(knows)), progress=False, **arguments)


def test_the_card_shows_each_predictors_fields_instructions_and_demos(tmp_path: Path) -> None:
    text = card_of(tuned_program(fresh_engine()), tmp_path / "a")
    assert (
        "`number: int` -> `parity: Literal['even', 'odd']`\n\n```text\nEven or odd? Think of the last digit.\n```"
        in text
    )
    assert 'Demos (3):\n\n```json\n{\n  "number": 0,\n  "parity": "even"' in text


def test_the_card_says_how_the_adapter_is_loaded_in_dspy_peft_and_vllm(tmp_path: Path) -> None:
    program = tuned_program(fresh_engine())
    text = card_of(program, tmp_path / "a")
    folder = f"adapters/{program.lm.model.partition('@')[2]}"
    assert "dspy.configure(adapter=dspy.ChatAdapter())\nprogram = load(" in text
    assert "vLLM's OpenAI server, where BASE is the folder of `fake`:" in text
    assert f'from_pretrained("BASE"), "FOLDER/{folder}")' in text
    assert f"vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules tuned=FOLDER/{folder}" in text
    assert text.startswith("---\nlibrary_name: peft\ntags:\n- dspy\n- bettertogether\n- lora\n---\n")


def test_a_prompt_adapter_of_the_users_own_is_no_name_of_dspy(tmp_path: Path) -> None:
    class Mine(dspy.ChatAdapter): ...

    with dspy.context(adapter=Mine()):
        assert "\ndspy.configure(adapter=Mine())\nprogram = load(" in card_of(dspy.Predict(Parity), tmp_path / "a")


def test_the_card_of_a_compiled_program_has_its_rounds_and_its_training_data(tmp_path: Path) -> None:
    program = compiled()
    text = card_of(program, tmp_path / "a")
    for line in program.report.rounds:
        assert f"| `{line.name}` | {line.score:.3f} | " in text
    assert text.count("| returned |") == 1
    data = program.report.rounds[2].details.data_card
    assert f"`p -> w`: {sum(data.kept_by_predictor.values())} rows from runs on 12 examples, " in text
    assert "with tuned prompts and LoRA weights, on `fake`, made by the strategy `p -> w`. Score: " in text
    assert text.count("These examples chose the round") == 1


def test_where_nothing_was_scored_the_card_says_so(tmp_path: Path) -> None:
    text = card_of(compiled("w", valset=None, valset_ratio=0.0), tmp_path / "a")
    assert "with LoRA weights, on `fake`, made by the strategy `w`. It was not scored.\n" in text
    assert "## Scores" not in text
    assert "chose the round" not in text


def test_the_untouched_student_is_said_to_be_as_it_was(tmp_path: Path) -> None:
    program = compiled("w", lambda request, number: not request.trained_on)
    assert program.report.selected == 0
    text = card_of(program, tmp_path / "a")
    assert "1 predictor, on `fake`, left as it was by the strategy `w`. Score: 1.000 on 12 valid" in text
    assert "## Training data" not in text


def test_runs_of_a_teacher_are_not_called_the_programs_own(tmp_path: Path) -> None:
    teacher = parity_program(parity_engine(lambda request, number: True))
    program = compiled("w", lambda request, number: request.trained_on > 0, teacher=teacher)
    data = program.report.rounds[1].details.data_card
    assert set(data.kept_by_source) == {"teacher"}
    text = card_of(program, tmp_path / "a")
    assert "`w`: 12 rows from runs on 12 examples, 12 of which gave any; by source: 12 `teacher`; by label: " in text


@pytest.mark.parametrize(("start_from", "told"), [("base", ["w -> w"]), ("current", ["w", "w -> w"])])
def test_training_data_is_that_of_the_weights_the_program_has(start_from: Any, told: list[str], tmp_path: Path) -> None:
    program = compiled("w -> w", w=LoRAFinetune(parity_match, start_from=start_from), valset=None, valset_ratio=0.0)
    data = card_of(program, tmp_path / "a").partition("## Training data")[2].partition("## Prompts")[0]
    assert re.findall(r"`(.*?)`: \d+ rows", data) == told


def test_a_label_is_no_markdown() -> None:
    labels = {"<unk>": 3, "_x_\n# Title": 2, "a`|b": 1}
    card = DataCard({"self": 6}, labels, {"given": 6}, {}, {}, 0, 6, {}, {}, ())
    adapter = TrainedAdapter("local/fake", "", "", 1, HeldOutLoss(None, None), ())
    details = WeightDetails(card, {"local/fake@a": adapter}, ())
    student = StepRecord(0, "", "", "complete", models={"self": "local/fake"})
    w = StepRecord(1, "w", "w", "complete", models={"self": "local/fake@a"}, details=details)
    assert (
        "`w`: 6 rows; by source: 6 `given`; by label: 3 `<unk>`, 2 `_x_\\n# Title`, 1 ``a`|b``. 0 tokens trained on."
    ) in model_card(MANIFEST, CompileReport((student, w), 1, 0, "w"))


@pytest.mark.parametrize(("rank", "most"), [(8, 64), (65, 128)])
def test_vllm_is_told_a_rank_that_holds_the_adapter(rank: int, most: int, tmp_path: Path) -> None:
    program = dspy.Predict(Parity)
    adapter = save_adapter(tmp_path / "adapter", seed=0, r=rank)
    program.set_lm(local_lm(save_model(tmp_path / "tiny"), adapter=adapter))
    assert f"--enable-lora --max-lora-rank {most} --lora-modules" in card_of(program, tmp_path / "a")


@pytest.mark.parametrize(("selected", "said"), [(1, 0), (2, 1)])
def test_a_2x2_of_another_round_than_the_one_returned_says_whose_it_is(selected: int, said: int) -> None:
    cells = {cell: (0.0, 1.0) for cell in CELLS}
    scored = StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0))
    w = replace(scored, index=1, step="w", strategy="w", two_by_two=cells)
    report = CompileReport((scored, w, replace(scored, index=2, step="p", strategy="p")), selected, 2, "w, p")
    text = "Of `w`, which is not the round returned:\n\n|  | prompts before | prompts after |"
    assert model_card(MANIFEST, report).count(text) == said


def test_a_program_that_was_not_tuned_has_a_card_without_scores(tmp_path: Path) -> None:
    text = card_of(dspy.Predict(Parity), tmp_path / "a")
    assert text.startswith("---\nlibrary_name: dspy\ntags:\n- dspy\n- bettertogether\n---\n\n# Predict\n")
    assert "\n\nA DSPy program of 1 predictor.\n" in text
    assert "## Scores" not in text
    assert "PeftModel" not in text


def test_a_card_may_be_edited_or_left_out(tmp_path: Path) -> None:
    folder = save(tuned_program(fresh_engine()), tmp_path / "a")
    (folder / "README.md").write_text("My own words.")
    assert len(load(folder, base_model=fresh_engine()).demos) == 3
    (folder / "README.md").unlink()
    assert len(load(folder, base_model=fresh_engine()).demos) == 3


def test_nothing_in_a_prompt_ends_its_block(tmp_path: Path) -> None:
    program = tuned_program(fresh_engine())
    program.demos = [dspy.Example(number=1, parity="odd", note="```\n# not a heading")]
    text = card_of(program, tmp_path / "a")
    assert '````json\n{\n  "number": 1,' in text


def test_a_tag_in_instructions_is_shown(tmp_path: Path) -> None:
    text = card_of(dspy.Predict(Parity.with_instructions("Answer in a\\<b>, `<i>`.")), tmp_path / "a")
    assert "\n```text\nAnswer in a\\<b>, `<i>`.\n```\n" in text


def test_a_base_is_named_by_its_hub_id_and_never_by_a_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(base: str) -> str:
        lm = {"kind": "local", "base": base, "base_name": "name-0f067d49", "adapter": "adapters/a"}
        return model_card({**MANIFEST, "lms": {"lm0": lm}}, None)

    named = card("owner/name")
    assert "base_model:\n- owner/name\n" in named.split("---")[1]
    assert 'AutoModelForCausalLM.from_pretrained("owner/name")' in named
    assert "vllm serve owner/name --enable-lora" in named
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for base in ("mine", "models/mine", str(tmp_path / "models" / "mine")):
        text = card(base)
        assert "base_model" not in text
        assert "mine" not in text
        assert "vllm serve BASE --enable-lora" in text


def test_the_card_of_a_real_engine_names_its_base_as_it_was_asked_for(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny")
    adapter = save_adapter(tmp_path / "adapter", seed=0)
    program = dspy.Predict(Parity)
    program.set_lm(local_lm(model, adapter=adapter))
    text = card_of(program, tmp_path / "a")
    assert "where BASE is the folder of `tiny-" in text
    assert str(tmp_path) not in text
