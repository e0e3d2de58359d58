"""The prompt step tries its best prompts with the adapters at other strengths, and takes one that scores better."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import (
    api_lm,
    numbers,
    parity_engine,
    parity_match,
    parity_program,
    plain_lm,
    prompt_details,
    reply,
    two_step_program,
)

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune
from bettertogether.artifact import load, save
from bettertogether.engines.protocol import TrainingRow
from bettertogether.errors import ConfigError
from bettertogether.steps.step import StepContext, StepResult
from bettertogether.steps.strengths import TriedAdapters, scaled_program
from bettertogether.testing import FakeEngine, FakeRequest


def knows_half(request: FakeRequest, number: int) -> bool:
    """An adapter at half its strength knows all, as it is a half, else a third."""
    return request.strength == 0.5 or number % (2 if request.trained_on else 3) == 0


def tuned(engine: FakeEngine, text: str = "x") -> str:
    row = TrainingRow(({"role": "user", "content": text},), "y")
    return engine.finetune([row]).model


def run(program: dspy.Module, folder: Path | None = None, **options: Any) -> StepResult:
    options = {"num_samples": 0, "rescue": False, "num_candidates": 1, "train_size": 10, **options}
    return BootstrapFewShotRS(parity_match, **options).run(program, StepContext(numbers(50), folder=folder))


def tried(result: StepResult) -> list[tuple[str, float | None]]:
    return [(c.name, c.score) for c in prompt_details(result).candidates if "strength" in c.name]


def test_the_best_prompts_with_a_better_strength_are_taken(tmp_path: Path) -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)
    result = run(parity_program(engine, model=model), tmp_path, race=False)
    half = result.program.lm.model
    assert engine.adapter_folder(half) == tmp_path / half.removeprefix("local/")
    assert engine.scaled(model, 0.5) == half
    assert tried(result) == [("current, strength 0.5", 1.0), ("current, strength 0.75", 0.5)]
    assert prompt_details(result).chosen == "current, strength 0.5"
    assert result.step_gain == 0.5
    assert result.program.candidate_programs[0]["program"].lm.model == half


def test_scores_of_the_adapter_as_it_is_are_used_again_and_the_calls_are_counted() -> None:
    engine = parity_engine(knows_half)
    result = run(parity_program(engine, model=tuned(engine)), race=False)
    made = len(prompt_details(result).candidates)
    assert len(engine.requests) == 10 + 40 * made
    assert (prompt_details(result).race.calls_made, prompt_details(result).race.calls_saved) == (40 * made, 0)
    assert result.ledger.metric_calls == len(engine.requests)


def test_a_strength_that_can_not_win_leaves_the_race() -> None:
    engine = parity_engine(lambda request, number: number % 7 == 0 or (request.strength == 1 and number % 9 != 0))
    result = run(parity_program(engine, model=tuned(engine)))
    stopped = {c.name: (c.scored_on, c.stopped) for c in prompt_details(result).candidates}
    assert stopped["current, strength 0.5"] == stopped["current, strength 0.75"] == (8, True)
    assert stopped["current"] == (40, False)
    assert prompt_details(result).chosen == "current"


def test_no_strength_is_tried_of_what_solves_all() -> None:
    engine = parity_engine(lambda request, number: True)
    assert tried(run(parity_program(engine, model=tuned(engine)))) == []


def served(engine: FakeEngine) -> list[Path]:
    return [Path(folder) for folder in engine.dump_state()["adapters"]]


def test_only_the_strength_that_is_taken_stays_and_is_among_the_candidates(tmp_path: Path) -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)
    result = run(parity_program(engine, model=model), tmp_path)
    half = tmp_path / result.program.lm.model.removeprefix("local/")
    assert list(tmp_path.iterdir()) == [half]
    assert served(engine) == [engine.adapter_folder(model), half]
    assert {each["program"].lm.model for each in result.program.candidate_programs} == {model, result.program.lm.model}
    assert not any(each["name"].endswith("0.75") for each in result.program.candidate_programs)


def test_no_strength_stays_where_none_is_taken(tmp_path: Path) -> None:
    engine = parity_engine(lambda request, number: request.strength == 1)
    model = tuned(engine)
    run(parity_program(engine, model=model), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert served(engine) == [engine.adapter_folder(model)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_no_strength_stays_where_the_race_raises(tmp_path: Path, error: type[BaseException]) -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
        if engine.requests[-1].strength == 1:
            return 0.5
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return -1.0

    step = BootstrapFewShotRS(metric, num_samples=0, num_candidates=1, strengths=[0.5], num_threads=1)
    with pytest.raises(error):
        step.run(parity_program(engine, model=model), StepContext(numbers(50), folder=tmp_path))
    assert {request.strength for request in engine.requests} == {0.5, 1}
    assert list(tmp_path.iterdir()) == []
    assert served(engine) == [engine.adapter_folder(model)]


def test_a_strength_that_was_served_before_stays(tmp_path: Path) -> None:
    engine = parity_engine(lambda request, number: request.strength == 1)
    model = tuned(engine)
    half = engine.scaled(model, 0.5)
    run(parity_program(engine, model=model), tmp_path)
    folder = engine.adapter_folder(half)
    assert served(engine) == [engine.adapter_folder(model), folder]
    assert folder is not None
    assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_another_race_tries_stays_until_that_one_ends(tmp_path: Path) -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)
    first, second = TriedAdapters(tmp_path / "first"), TriedAdapters(tmp_path / "second")
    with second:
        with first:
            half = first.scaled(plain_lm(engine, model), 0.5)
            assert second.scaled(plain_lm(engine, model), 0.5) == half
        folder = engine.adapter_folder(half)
        assert folder is not None
        assert folder.is_dir()
    assert served(engine) == [engine.adapter_folder(model)]
    assert [*(tmp_path / "first").iterdir(), *(tmp_path / "second").iterdir()] == []


@pytest.mark.parametrize("ends_last", [False, True])
def test_an_adapter_that_another_race_keeps_stays_where_that_one_has_it(tmp_path: Path, ends_last: bool) -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)
    loser, winner = TriedAdapters(tmp_path / "loser"), TriedAdapters(tmp_path / "winner")
    with loser if ends_last else winner, winner if ends_last else loser:
        half = loser.scaled(plain_lm(engine, model), 0.5)
        assert winner.scaled(plain_lm(engine, model), 0.5) == half
        winner.keep(parity_program(engine, model=half))
    folder = tmp_path / "winner" / half.removeprefix("local/")
    assert served(engine) == [engine.adapter_folder(model), folder]
    assert [*(tmp_path / "loser").iterdir(), *(tmp_path / "winner").iterdir()] == [folder]


def test_an_equal_strength_changes_nothing() -> None:
    engine = parity_engine(lambda request, number: number % 2 == 0)
    program = parity_program(engine, model=tuned(engine))
    result = run(program)
    assert prompt_details(result).chosen == "current"
    assert result.program.lm.model == program.lm.model


def test_the_chosen_prompts_are_those_that_are_scaled() -> None:
    engine = parity_engine(lambda request, number: request.demos > 0 and (request.strength < 1 or number % 2 == 0))
    result = run(parity_program(engine, model=tuned(engine)), strengths=[0.25, 1])
    (name, score), *others = tried(result)
    assert (name.removesuffix(", strength 0.25"), score, others) == (prompt_details(result).candidates[1].name, 1.0, [])
    assert prompt_details(result).chosen == name
    assert len(result.program.demos) > 0


@pytest.mark.parametrize("strengths", [(), (1,)])
def test_without_other_strengths_none_are_tried(strengths: tuple[float, ...]) -> None:
    engine = parity_engine(knows_half)
    assert tried(run(parity_program(engine, model=tuned(engine)), strengths=strengths)) == []


def test_a_base_model_and_a_model_elsewhere_have_no_strength() -> None:
    assert tried(run(parity_program(parity_engine(knows_half)))) == []
    program = parity_program(parity_engine(knows_half))
    program.set_lm(api_lm(lambda request: reply(request, parity="odd")))
    assert tried(run(program)) == []


def test_an_adapter_that_answers_while_its_folder_is_gone_has_no_other_strength_and_that_is_told() -> None:
    engine = parity_engine(knows_half)
    model = tuned(engine)
    folder = engine.adapter_folder(model)
    assert folder is not None
    shutil.rmtree(folder)
    result = run(parity_program(engine, model=model))
    assert tried(result) == []
    assert result.program.lm.model == model
    told = f"No other strengths are tried: the folder of {model} ({folder}) is gone."
    assert [warning for warning in result.warnings if warning.startswith(told)] != []
    assert not any("strengths" in warning for warning in run(result.program, strengths=(1,)).warnings)


def test_all_adapters_of_a_program_are_scaled_alike_and_other_models_stay(tmp_path: Path) -> None:
    engine = parity_engine(knows_half)
    one, two = tuned(engine, "one"), tuned(engine, "two")
    program = two_step_program(engine)
    program.remark.lm, program.decide.lm = plain_lm(engine, one), plain_lm(engine, two, max_tokens=7)
    with TriedAdapters(tmp_path) as tried:
        scaled = scaled_program(program, 0.5, tried)
        names = [predictor.lm.model for predictor in scaled.predictors()]
        assert names == [engine.scaled(one, 0.5), engine.scaled(two, 0.5)]
        assert scaled.decide.lm.kwargs["max_tokens"] == 7
        assert program.remark.lm.model == one
        program.decide.lm = plain_lm(engine)
        assert scaled_program(program, 0.5, tried).decide.lm is program.decide.lm


def test_predictors_that_share_an_lm_share_the_scaled_one(tmp_path: Path) -> None:
    engine = parity_engine(knows_half)
    with TriedAdapters(tmp_path) as tried:
        scaled = scaled_program(two_step_program(engine, model=tuned(engine)), 0.5, tried)
    assert scaled.remark.lm is scaled.decide.lm


@pytest.mark.parametrize("strengths", [(0,), (0.5, 3), ("0.5",), [True], [float("nan")], 0.5, "0.5", None])
def test_strengths_are_checked(strengths: Any) -> None:
    with pytest.raises(ConfigError, match=r"strengths=.* is not allowed: give "):
        BootstrapFewShotRS(parity_match, strengths=strengths)


def test_the_paper_leaves_adapters_as_they_are() -> None:
    assert BootstrapFewShotRS.paper(parity_match).strengths == ()


def compiled(engine: FakeEngine, run_dir: Path) -> dspy.Module:
    steps = {
        "p": BootstrapFewShotRS(parity_match, num_candidates=2, num_samples=0, rescue=False),
        "w": LoRAFinetune(parity_match, num_samples=0, rescue=False),
    }
    return BetterTogether(parity_match, **steps).compile(
        parity_program(engine),
        trainset=numbers(60, start=40),
        valset=numbers(20),
        strategy="p -> w -> p",
        run_dir=run_dir,
        two_by_two=True,
        progress=False,
    )


def knows_with_demos(request: FakeRequest, number: int) -> bool:
    return request.strength == 0.5 or number % 2 == 0 or (request.demos > 0 and number % 3 == 0)


def test_a_strength_is_part_of_a_run_and_no_tuning_of_its_own(tmp_path: Path) -> None:
    report = compiled(parity_engine(knows_with_demos), tmp_path / "run").report
    _, p, w, last = report.rounds
    assert last.details.chosen.endswith(", strength 0.5")
    assert last.score == 1.0
    assert w.models != last.models
    assert (p.two_by_two, last.two_by_two) == (None, None)
    assert w.two_by_two is not None
    ((model, folder),) = last.adapter_folders.items()
    assert Path(folder) == tmp_path / "run" / "adapters" / model.removeprefix("local/")


def test_after_a_run_the_adapters_are_those_that_its_rounds_name(tmp_path: Path) -> None:
    engine = parity_engine(knows_with_demos)
    report = compiled(engine, tmp_path / "run").report
    named = {folder for record in report.rounds for folder in record.adapter_folders.values()}
    assert len(named) == 2
    assert {str(each) for each in served(engine)} == named
    assert {str(each) for each in (tmp_path / "run" / "adapters").iterdir() if each.is_dir()} == named


def test_a_run_with_a_strength_goes_on_elsewhere_and_its_program_is_saved(tmp_path: Path) -> None:
    first = compiled(parity_engine(knows_with_demos), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    engine = parity_engine(knows_with_demos)
    second = compiled(engine, tmp_path / "moved")
    assert engine.requests == []
    assert second.lm.model == first.lm.model == next(iter(first.report.rounds[3].adapter_folders))
    save(second, tmp_path / "saved")
    other = parity_engine(knows_with_demos)
    loaded = load(tmp_path / "saved", base_model=other)
    assert loaded(number=3).parity == "odd"
    assert (other.requests[-1].model, other.requests[-1].strength) == (first.lm.model, 0.5)
