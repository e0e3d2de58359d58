"""A saved program comes back with its prompts, demos, adapters, LM options and report, and its folder holds no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, Optional

import dspy
import pydantic
import pytest
from dspy.lm15 import CacheConfig
from fakes import Parity, TwoSteps, learner, parity_engine, parity_program, plain_lm, two_step_program
from saved import edit_manifest, fresh_engine, manifest_of, tuned, tuned_program

from bettertogether.artifact import artifact, load, load_report, save
from bettertogether.artifact.saved_program import annotation_text
from bettertogether.engines.lm_options import check_lm_options
from bettertogether.errors import ArtifactError
from bettertogether.programs.program import parameters_of
from bettertogether.records import StepRecord
from bettertogether.report import CompileReport


def prompts(program: dspy.Module, **inputs: Any) -> list[Any]:
    """What each predictor would send, in the Chat and the JSON adapter."""
    return [
        adapter.format(predictor.signature, predictor.demos, inputs)
        for predictor in program.predictors()
        for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter())
    ]


def test_a_program_comes_back_with_its_prompts_demos_adapter_and_lm_options(tmp_path: Path) -> None:
    program = tuned_program(parity_engine(learner))
    save(program, tmp_path / "a")
    other = fresh_engine()
    loaded = load(tmp_path / "a", into=dspy.Predict(Parity), base_model=other)
    assert prompts(loaded, number=5) == prompts(program, number=5)
    assert loaded.lm.model == program.lm.model
    assert loaded.lm.kwargs == program.lm.kwargs
    assert loaded.lm.engine is other
    assert other.adapter_folder(loaded.lm.model) == tmp_path / "a" / "adapters" / loaded.lm.model.partition("@")[2]


def test_a_loaded_program_answers_with_the_saved_adapter(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    other = fresh_engine()
    loaded = load(tmp_path / "a", base_model=other)
    assert loaded(number=29).parity == "odd"
    assert other.requests[-1].model == loaded.lm.model
    assert other.requests[-1].demos == 3


class Grade(pydantic.BaseModel):
    parity: Literal["even", "odd"]
    note: str | None = None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"user": "me", "logprobs": True, "top_logprobs": 2}, {"user": "me", "logprobs": True, "top_logprobs": 2}),
        ({"tools": [], "user": None}, {"user": None}),
        ({"prompt_cache": CacheConfig(mode="off"), "max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ],
)
def test_what_is_taken_for_a_local_lm_is_saved_and_loaded(
    tmp_path: Path, options: dict[str, Any], kept: dict[str, Any]
) -> None:
    check_lm_options(options, ())
    save(parity_program(fresh_engine(), **options), tmp_path / "a")
    assert load(tmp_path / "a", base_model=fresh_engine()).lm.kwargs == {"temperature": 0.0, "max_tokens": None, **kept}


def test_a_model_as_response_format_is_saved_as_the_schema_that_it_stands_for(tmp_path: Path) -> None:
    engine, other = fresh_engine(), fresh_engine()
    program = parity_program(engine, response_format=Grade)
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a", base_model=other)
    program(number=4)
    loaded(number=4)
    assert other.requests[0].schema == engine.requests[0].schema
    assert (engine.requests[0].schema or {})["required"] == ["parity", "note"]


def test_a_saved_folder_holds_json_and_adapter_files_only(tmp_path: Path) -> None:
    program = tuned_program(parity_engine(learner))
    program.report = CompileReport((StepRecord(0, "", "", "complete"),), 0, 0, "p")
    adapter = program.lm.engine.adapter_folder(program.lm.model)
    (adapter / "optimizer.pt").write_bytes(b"\x80")
    (adapter / "checkpoint").mkdir()
    (adapter / "checkpoint" / "state.json").write_text("{}")
    save(program, tmp_path / "a")
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    name = adapter.name.partition("@")[2]
    assert found == ["a/README.md", f"a/adapters/{name}/fake_adapter.json", "a/artifact.json", "a/report.json"]


def test_the_report_of_a_compiled_program_comes_back(tmp_path: Path) -> None:
    program = parity_program(parity_engine(learner))
    rounds = (StepRecord(0, "", "", "complete", 0.5, (0.0, 1.0)), StepRecord(1, "p", "p", "complete", 1.0, (1.0, 1.0)))
    program.report = CompileReport(rounds, 1, 2, "p", warnings=("few",))
    save(program, tmp_path / "a")
    assert load(tmp_path / "a", base_model=fresh_engine()).report == program.report
    assert load_report(tmp_path / "a") == program.report


def test_a_report_that_was_not_saved_with_the_program_is_not_its_report(tmp_path: Path) -> None:
    save(parity_program(fresh_engine()), tmp_path / "a")
    report = CompileReport((StepRecord(0, "", "", "complete"),), 0, 0, "p")
    (tmp_path / "a" / "report.json").write_text(json.dumps(report.to_dict()))
    assert not hasattr(load(tmp_path / "a", base_model=fresh_engine()), "report")
    assert load_report(tmp_path / "a") is None
    edit_manifest(tmp_path / "a", lambda manifest: manifest.pop("files"))
    assert load_report(tmp_path / "a") == report


def test_loading_leaves_the_given_program_as_it_was(tmp_path: Path) -> None:
    save(tuned_program(parity_engine(learner)), tmp_path / "a")
    given = dspy.Predict(Parity)
    load(tmp_path / "a", into=given, base_model=fresh_engine())
    assert (given.lm, given.demos) == (None, [])
    assert given.signature.instructions == Parity.instructions


def test_predictors_that_shared_an_lm_share_one_again(tmp_path: Path) -> None:
    engine = fresh_engine()
    program = TwoSteps()
    program.set_lm(plain_lm(engine))
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a", base_model=engine)
    assert type(loaded) is TwoSteps
    assert loaded.remark.lm is loaded.decide.lm
    assert list(manifest_of(tmp_path / "a")["lms"]) == ["lm0"]


def test_one_adapter_per_predictor_comes_back_on_its_predictor(tmp_path: Path) -> None:
    engine = fresh_engine()
    program = two_step_program(engine)
    program.remark.lm = plain_lm(engine, tuned(engine, "a").model)
    program.decide.lm = plain_lm(engine, tuned(engine, "b").model)
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a", base_model=fresh_engine())
    assert loaded.remark.lm.model == program.remark.lm.model
    assert loaded.decide.lm.model == program.decide.lm.model
    assert loaded.remark.lm.model != loaded.decide.lm.model


def test_two_adapters_from_folders_of_the_same_name_are_both_saved(tmp_path: Path) -> None:
    engine = fresh_engine()
    program = two_step_program(engine)
    for name, predictor in program.named_predictors():
        shutil.copytree(tuned(engine, name).folder, tmp_path / name / "best")
        predictor.lm = plain_lm(engine, engine.add_adapter(tmp_path / name / "best"))
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a", base_model=fresh_engine())
    assert [p.lm.model for p in loaded.predictors()] == [p.lm.model for p in program.predictors()]
    assert len(list((tmp_path / "a" / "adapters").iterdir())) == 2


def test_an_lm_that_was_not_set_stays_unset_unless_it_is_given(tmp_path: Path) -> None:
    save(TwoSteps(), tmp_path / "a")
    assert [predictor.lm for predictor in load(tmp_path / "a").predictors()] == [None, None]
    mine = dspy.LM("openai/gpt-4o-mini")
    assert [predictor.lm for predictor in load(tmp_path / "a", lms={"decide": mine}).predictors()] == [None, mine]


def test_given_lms_take_the_place_of_saved_ones(tmp_path: Path) -> None:
    program = two_step_program(fresh_engine())
    save(program, tmp_path / "a")
    mine = dspy.LM("openai/gpt-4o-mini")
    loaded = load(tmp_path / "a", base_model=fresh_engine(), lms={"remark": mine})
    assert loaded.remark.lm is mine
    assert loaded.decide.lm.model == "local/fake"
    with pytest.raises(ArtifactError, match="remrak"):
        load(tmp_path / "a", base_model=fresh_engine(), lms={"remrak": mine})


class Nested(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [dspy.Predict("a -> b"), {"x": dspy.ChainOfThought("b -> c")}]
        self.by_name = {"y": dspy.Predict("c -> d")}
        self.frozen = TwoSteps()
        self.frozen._compiled = True
        self.again = self.by_name["y"]


def test_predictors_in_lists_dicts_and_frozen_modules_are_all_saved(tmp_path: Path) -> None:
    program = Nested()
    program.frozen.remark.signature = program.frozen.remark.signature.with_instructions("Frozen")
    program.by_name["y"].demos = [dspy.Example(c="1", d="2")]
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert list(parameters_of(loaded)) == ["parts[0]", "by_name['y']", "frozen.remark", "frozen.decide"]
    assert loaded.frozen.remark.signature.instructions == "Frozen"
    assert loaded.by_name["y"].demos == [dspy.Example(c="1", d="2")]
    assert loaded.again is loaded.by_name["y"]


class Passage(pydantic.BaseModel):
    title: str
    score: float = 0.5


class Rich(dspy.Signature):
    """Find."""

    passages: list[Passage] = dspy.InputField(desc="what to read")
    limits: tuple[int, int] = dspy.InputField()
    note: str | None = dspy.InputField()
    found: Passage = dspy.OutputField()
    kind: Literal["a", "b, -> c"] = dspy.OutputField()


def test_typed_demos_give_the_same_prompt_after_loading(tmp_path: Path) -> None:
    program = dspy.ChainOfThought(Rich)
    demo = dspy.Example(passages=[Passage(title="x")], limits=(1, 2), note=None, found=Passage(title="y"), kind="a")
    program.predict.demos = [dspy.Example(**demo.toDict(), reasoning="r"), dspy.Example(note="only", kind="a")]
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a", into=dspy.ChainOfThought(Rich))
    inputs = {"passages": [Passage(title="z")], "limits": (3, 4), "note": "n"}
    assert prompts(loaded, **inputs) == prompts(program, **inputs)


class Plain(dspy.Signature):
    """Label the text."""

    text: str = dspy.InputField(desc="words")
    tags: list[str] | None = dspy.InputField()
    old: Optional[dict[str, int]] = dspy.InputField()  # noqa: UP045
    label: Literal["a", "b, -> c", 3] = dspy.OutputField()
    sure: bool = dspy.OutputField(desc="really?")


@pytest.mark.parametrize("kind", [dspy.Predict, dspy.ChainOfThought])
def test_a_plain_program_is_made_anew_from_the_folder_alone(tmp_path: Path, kind: Any) -> None:
    program = kind(Plain, temperature=0.7)
    save(program, tmp_path / "a")
    loaded = load(tmp_path / "a")
    inputs = {"text": "t", "tags": None, "old": {"x": 1}}
    assert type(loaded) is kind
    assert prompts(loaded, **inputs) == prompts(program, **inputs)
    assert loaded.predictors()[0].config == {"temperature": 0.7}


class Bounded(dspy.Signature):
    text: str = dspy.InputField()
    grade: int = dspy.OutputField(ge=1, le=6)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [(Rich, r"'passages' of type list\[Passage\].*"), (Bounded, "'grade' of type int .*constraints .*less.* 6.*")],
)
def test_a_plain_program_with_types_or_bounds_of_its_own_needs_into(
    tmp_path: Path, signature: type[dspy.Signature], reason: str
) -> None:
    save(dspy.Predict(signature), tmp_path / "a")
    with pytest.raises(ArtifactError, match=f"{reason}into=program"):
        load(tmp_path / "a")
    assert load(tmp_path / "a", into=dspy.Predict(signature)).signature.fields.keys() == signature.fields.keys()


class NeedsArguments(dspy.Module):
    def __init__(self, hops: int) -> None:
        super().__init__()
        self.hops = [dspy.Predict("question -> query") for _ in range(hops)]


def test_a_program_with_arguments_needs_into(tmp_path: Path) -> None:
    save(NeedsArguments(2), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"NeedsArguments can't be made without arguments.*into=program"):
        load(tmp_path / "a")
    assert len(load(tmp_path / "a", into=NeedsArguments(2)).hops) == 2


def test_a_program_class_that_is_gone_needs_into(tmp_path: Path) -> None:
    class Local(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = dspy.Predict("a -> b")

    save(Local(), tmp_path / "a")
    with pytest.raises(ArtifactError, match="into=program"):
        load(tmp_path / "a")
    assert type(load(tmp_path / "a", into=Local())) is Local


def test_another_structure_is_refused_with_what_differs(tmp_path: Path) -> None:
    save(NeedsArguments(2), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"hops\[1\] was saved, the program has none"):
        load(tmp_path / "a", into=NeedsArguments(1))
    with pytest.raises(ArtifactError, match=r"hops\[2\] is in the program, it was not saved"):
        load(tmp_path / "a", into=NeedsArguments(3))


def test_another_signature_is_refused_with_both_field_lists(tmp_path: Path) -> None:
    save(dspy.Predict("question -> answer: str"), tmp_path / "a")
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "a", into=dspy.Predict("question -> answer: int"))
    assert "(input question: str, output answer: int), saved were (input question: str, output answer: str)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (list[Passage], "list[Passage]"),
        (Optional[int], "int | None"),  # noqa: UP045
        (int | None, "int | None"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Literal["a", 1], "Literal['a', 1]"),
        (Any, "Any"),
    ],
)
def test_a_type_is_named_without_its_module(annotation: Any, text: str) -> None:
    assert annotation_text(annotation) == text


def test_the_public_functions_are_those_of_the_package() -> None:
    import bettertogether

    assert (bettertogether.save, bettertogether.load, bettertogether.merge) == (save, load, artifact.merge)


@pytest.mark.parametrize(
    ("state", "options"),
    [
        ({"dtype": "float32", "device": "cpu", "chat_template_kwargs": None}, {}),
        ({"dtype": "bfloat16", "device": "cuda:0"}, {}),
        ({"dtype": "bfloat16", "device": "cpu"}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "device": "mps"}, {}),
        ({"dtype": "float32", "device": "mps"}, {"dtype": "float32"}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"chat_template_kwargs": {"enable_thinking": True}}),
    ],
)
def test_engine_options_are_saved_where_they_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], options: dict[str, Any]
) -> None:
    engine = fresh_engine()
    monkeypatch.setattr(engine, "dump_state", lambda: {"base_name": "fake", "adapters": [], **state}, raising=False)
    save(parity_program(engine), tmp_path / "a")
    assert manifest_of(tmp_path / "a")["lms"]["lm0"]["engine_options"] == options
