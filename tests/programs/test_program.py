"""A program's predictors, copies, prompts and keys."""

from __future__ import annotations

import json
import threading
import types
from typing import Any, Literal

import dspy
import pytest
from fakes import Parity, TwoSteps, api_lm, numbers, parity_engine, parity_program, plain_lm, two_step_program
from pydantic import BaseModel

from bettertogether import CompileReport
from bettertogether.errors import ProgramError
from bettertogether.programs.behaviour import program_key
from bettertogether.programs.copies import copy_program
from bettertogether.programs.program import (
    copy_for_step,
    load_prompts,
    model_names,
    predictors_of,
    prompts_state,
    require_program,
    with_prompts,
)
from bettertogether.records import StepRecord
from bettertogether.steps.prompt_capture import render_prompt
from bettertogether.testing import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(lambda *_: True)


def test_a_copy_shares_lms_and_owns_its_demos(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    copied = copy_program(program)
    copied.remark.demos.append("demo")
    assert copied.remark.lm is program.remark.lm
    assert copied.decide.lm is program.remark.lm
    assert program.remark.demos == []


def test_a_copy_does_not_copy_the_history_of_an_lm(engine: FakeEngine) -> None:
    program = parity_program(engine)
    program(number=1)
    assert copy_program(program).lm.history is program.lm.history


def test_what_an_optimizer_hung_on_a_program_is_no_part_of_its_copies_and_key(engine: FakeEngine) -> None:
    program = parity_program(engine)
    key = program_key(program)
    program.candidate_programs = [{"program": two_step_program(engine), "score": 1.0}]
    program.trial_logs = {1: {"program": two_step_program(engine)}}
    program.report = CompileReport((StepRecord(0, "", "", "complete"),), 0, 0, "p")
    copied = copy_program(program)
    assert [name for name in ("candidate_programs", "trial_logs", "report") if hasattr(copied, name)] == []
    assert len(program.candidate_programs) == 1
    assert program_key(program) == program_key(copied) == key


def test_a_tool_that_is_the_programs_own_method_is_bound_to_the_copy(engine: FakeEngine) -> None:
    class Agent(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()
            self.react = dspy.ReAct("question -> answer", tools=[self.search])

        def search(self, query: str) -> str:
            """Search."""
            return query

        def forward(self, question: str) -> dspy.Prediction:
            return self.react(question=question)

    copied = copy_program(program := Agent())
    assert copied.react.tools["search"].func.__self__ is copied
    assert copied.lock is program.lock


def test_what_cannot_be_copied_is_shared(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    program.lock, program.nested = threading.Lock(), {"locks": [threading.Lock()]}
    copied = copy_program(program)
    assert copied.lock is program.lock
    assert copied.nested["locks"][0] is program.nested["locks"][0]
    assert copied.remark is not program.remark


def test_a_tool_that_cannot_be_copied_is_shared(engine: FakeEngine) -> None:
    class Client:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def search(self, query: str) -> str:
            """Search."""
            return query

    program = dspy.ReAct("question -> answer", tools=[Client().search])
    program.set_lm(plain_lm(engine))
    copied = copy_program(program)
    assert copied.tools["search"].func.__self__ is program.tools["search"].func.__self__
    assert copied.react is not program.react


def test_a_bound_method_of_a_copy_is_bound_to_the_copy(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    program.lock = threading.Lock()
    program.forward = types.MethodType(TwoSteps.forward, program)  # type: ignore[method-assign]
    assert copy_program(program).forward.__self__ is not program


def test_a_copy_for_a_step_is_not_marked_as_compiled(engine: FakeEngine) -> None:
    program = parity_program(engine)
    program._compiled = True
    assert copy_for_step(program)._compiled is False
    assert program._compiled is True


def test_predictors_of_compiled_sub_modules_are_frozen(engine: FakeEngine) -> None:
    program = dspy.Module()
    program.inner, program.own = two_step_program(engine), dspy.Predict("a -> b")
    program.inner._compiled = True
    assert list(predictors_of(program)) == ["own"]


def test_a_program_must_be_a_module_with_predictors_that_have_lms(engine: FakeEngine) -> None:
    with pytest.raises(ProgramError, match=r"student must be a dspy\.Module, got str"):
        require_program("program")
    with pytest.raises(ProgramError, match="teacher program has no predictors"):
        require_program(dspy.Module(), "teacher")
    program = two_step_program(engine)
    program.decide.lm = None
    with pytest.raises(ProgramError, match=r"language model set on every predictor, but these have none: \['decide'\]"):
        require_program(program)


class Part(BaseModel):
    name: str
    sizes: list[int]


class Typed(dspy.Signature):
    """Take it apart."""

    history: dspy.History = dspy.InputField()
    thing: Part = dspy.InputField()
    kind: Literal["a", "b"] = dspy.OutputField()
    parts: list[Part] = dspy.OutputField()
    note: str | None = dspy.OutputField()


def typed_demo() -> dspy.Example:
    history = dspy.History(messages=[{"thing": "x", "kind": "a"}])
    parts = [Part(name="wheel", sizes=[1, 2]), Part(name="bell", sizes=[])]
    bike = Part(name="bike", sizes=[3])
    return dspy.Example(augmented=True, history=history, thing=bike, kind="a", parts=parts, note=None)


def test_prompts_loaded_from_json_render_as_before(engine: FakeEngine, adapter: dspy.Adapter) -> None:
    program = dspy.ChainOfThought(Typed)
    program.set_lm(plain_lm(engine))
    program.predict.demos = [typed_demo(), dspy.Example(thing=Part(name="car", sizes=[4]), kind="b")]
    program.predict.signature = program.predict.signature.with_instructions("Take it apart, carefully.")
    inputs = {"history": dspy.History(messages=[]), "thing": Part(name="boat", sizes=[])}
    state = json.loads(json.dumps(prompts_state(program)))
    fresh = dspy.ChainOfThought(Typed)
    fresh.set_lm(plain_lm(engine))
    loaded = load_prompts(fresh, state)
    before, after = (render_prompt(p.predict, engine, inputs, p.predict.demos) for p in (program, loaded))
    assert after == before
    assert "carefully" in before[0]["content"]
    assert prompts_state(loaded) == state


def test_loading_prompts_keeps_the_lms_and_leaves_the_program_alone(engine: FakeEngine) -> None:
    program = parity_program(engine)
    program.demos = numbers(2)
    fresh = parity_program(engine)
    loaded = load_prompts(fresh, prompts_state(program))
    assert loaded.lm is fresh.lm
    assert [dict(demo.items()) for demo in loaded.demos] == [dict(demo.items()) for demo in numbers(2)]
    assert fresh.demos == []


def test_prompts_of_another_program_are_refused(engine: FakeEngine) -> None:
    with pytest.raises(ProgramError, match=r"are for predictors \['self'\], the program has \['decide', 'remark'\]"):
        load_prompts(two_step_program(engine), prompts_state(parity_program(engine)))


def test_the_prompts_of_a_program_whose_lm_cannot_be_saved_can_be_read() -> None:
    program = dspy.Predict(Parity)
    program.set_lm(api_lm(lambda _: ""))
    assert prompts_state(program)["self"]["demos"] == []


def test_with_prompts_takes_prompts_from_one_and_lms_from_the_other(engine: FakeEngine) -> None:
    tuned, prompted = parity_program(engine), parity_program(engine)
    prompted.demos = numbers(1)
    prompted.signature = prompted.signature.with_instructions("Think.")
    prompted.fields = {"parity": {"threshold": 0.3}}
    both = with_prompts(tuned, prompted)
    assert both.lm is tuned.lm
    assert both.demos == prompted.demos
    assert both.demos is not prompted.demos
    assert both.signature.instructions == "Think."
    assert both.fields == prompted.fields
    assert both.fields["parity"] is not prompted.fields["parity"]
    assert (tuned.demos, tuned.fields) == ([], {})


def test_model_names_are_by_predictor(engine: FakeEngine) -> None:
    program = two_step_program(engine)
    program.decide.lm = api_lm(lambda _: "")
    assert model_names(program) == {"remark": "local/fake", "decide": "local/api"}


def changed(change: Any, engine: FakeEngine) -> bool:
    """Whether a change to a program changes its key."""
    program = TwoSteps()
    program.limit, program.inner = 3, dspy.Predict(Parity)
    program.inner._compiled = True
    program.set_lm(plain_lm(engine))
    program.inner.lm = program.remark.lm
    before = program_key(program)
    assert before == program_key(copy_program(program))
    change(program)
    return program_key(program) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.decide.demos.extend(numbers(1)),
        lambda p: setattr(p.decide, "signature", p.decide.signature.with_instructions("x")),
        lambda p: setattr(p.decide, "lm", p.decide.lm.copy(model="local/fake@r1-00000000")),
        lambda p: setattr(p.decide, "lm", p.decide.lm.copy(temperature=0.5)),
        lambda p: setattr(p.decide, "config", {"temperature": 0.5}),
        lambda p: setattr(p, "limit", 4),
        lambda p: p.inner.demos.extend(numbers(1)),
    ],
    ids=["demos", "instructions", "model", "temperature", "config", "attribute", "frozen demos"],
)
def test_the_key_changes_with_all_that_decides_answers(change: Any, engine: FakeEngine) -> None:
    assert changed(change, engine)


def test_the_key_does_not_change_with_the_mark_of_a_compiled_program(engine: FakeEngine) -> None:
    assert not changed(lambda program: setattr(program, "_compiled", True), engine)


def test_the_key_changes_with_the_adapter_and_its_options(engine: FakeEngine) -> None:
    keys = set()
    for adapter in (None, dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.ChatAdapter(use_json_adapter_fallback=False)):
        with dspy.context(adapter=adapter):
            keys.add(program_key(parity_program(engine)))
    assert len(keys) == 4


def test_programs_of_two_classes_of_one_name_have_two_keys(engine: FakeEngine) -> None:
    def make(answer: str) -> dspy.Module:
        class Program(dspy.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = dspy.Predict("q -> a")

        Program.__module__ = answer
        return Program()

    assert program_key(make("one")) != program_key(make("two"))


def test_a_program_with_a_patched_forward_has_no_key(engine: FakeEngine) -> None:
    program = parity_program(engine)
    program.forward = lambda **inputs: None
    assert program_key(program) is None
